"""How a rank's process ends: as any Python program does, but for the interpreter's own teardown.

    the worker's __exit__ > the object goes > non-daemon threads joined > atexit functions
        > garbage collected > open files flushed > C's exit, or a flush of C's buffers and _exit

What is left out is that every module and all that it holds is taken apart, object by object, only
for the kernel to free the pages. It runs no `__del__` that Python promises to run.

C's own exit functions and destructors run in a rank that was spawned, or has an accelerator open:
profilers and coverage of C code write their files there, and torch takes away its files of shared
CUDA memory. In a rank that was forked they are the launcher's, and would be run once a rank; it
leaves by `_exit`, as multiprocessing's forked processes do. Both would first have to copy the
pages of what they free: docs/ending.md has the figures.
"""

from __future__ import annotations

import gc
import os
import sys
from _io import _IOBase

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

# What Python exits with when it cannot write what was printed.
UNWRITTEN = 120


def end_process(forked: bool) -> NoReturn:
    """End this process in order: status 0, or 120 where standard output cannot be written.

    To be called by the main thread, with nothing of the user's on its stack.
    """
    try:
        threading = sys.modules.get("threading")
        if threading is not None:
            _take(threading._shutdown)
        import atexit

        _take(atexit._run_exitfuncs)
        if gc.isenabled():
            gc.collect()
        written = _flush_standard()
        _flush_files()
        _leave(0 if written else UNWRITTEN, forked)
    finally:
        os._exit(UNWRITTEN)  # a signal handler has raised in between


def _take(step: Callable[[], object]) -> None:
    """One step of the user's own; what it raises does not keep the next from being taken."""
    try:
        step()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)


def _flush_standard() -> bool:
    """Whether all that was printed could be written."""
    written = True
    for stream in (sys.stdout, sys.stderr):
        if stream is None or getattr(stream, "closed", False):
            continue
        try:
            stream.flush()
        except Exception:
            written = False
    return written


def _flush_files() -> None:
    """Write what is buffered in files that are still open, as the interpreter does at its end.

    Layer by layer: text goes into the buffers below it. A forked rank's collector does not know
    the launcher's own files (`gc.freeze`), which would otherwise be written once a rank.
    """
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, _IOBase)}
    files = [thing for thing in objects if type(thing) in kinds]
    for text in (True, False):
        for file in files:
            if hasattr(type(file), "encoding") is text:
                try:
                    if not file.closed:
                        file.flush()
                except Exception:
                    pass  # as where a file is collected


def _leave(status: int, forked: bool) -> NoReturn:
    # Not `ctypes`, which takes a millisecond and more.
    from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_PYTHONAPI, CFuncPtr, call_function, dlopen, dlsym

    libc = dlopen(None, 0)  # type: ignore[arg-type]
    if forked:
        from rankwise._procfs import open_device

        if open_device() is None:
            call_function(dlsym(libc, "fflush"), (None,))
            os._exit(status)

    class Function(CFuncPtr):
        # With the GIL held: other threads stop where they next want it, as they do in an
        # interpreter that has been finalized, and touch nothing that C++ destroys.
        _flags_ = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI
        _restype_ = None

    Function(dlsym(libc, "exit"))(status)
    raise AssertionError("C's exit has returned")
