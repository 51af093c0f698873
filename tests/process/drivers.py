"""What the tests of the promises share: drivers in processes of their own, and ends waited for.

    Script(code) > a Python process that makes groups    line(), tell(), end()
    Watch(pids)  > a pidfd each                          gone(seconds)

Nothing here sleeps to let time pass: everything waits on a descriptor, with a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = [
    "SECONDS",
    "Script",
    "Watch",
    "alive",
    "in_thread",
    "open_fifo",
    "readable",
    "remove_fifo",
    "until",
]

SECONDS = 20.0  # no wait of these tests should take a tenth of it

# What every script begins with: `say` gives the test a line, `hear` takes one from it.
PRELUDE = """
import ctypes, faulthandler, json, os, signal, sys, threading, time, warnings
from rankwise import *

faulthandler.register(signal.SIGUSR1)  # for a test that has waited long enough

# From 3.12 on Python itself warns of any fork beside a thread.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def say(**facts):
    sys.stdout.write(json.dumps(facts) + "\\n")
    sys.stdout.flush()

def hear():
    return sys.stdin.readline()
"""


def readable(fd: int, seconds: float = SECONDS) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Script:
    """A driver in a process of its own. Its worker output goes to its standard error."""

    def __init__(
        self,
        code: str,
        *argv: str,
        flags: tuple[str, ...] = (),
        wrapper: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [*wrapper, sys.executable, *flags, "-c", PRELUDE + textwrap.dedent(code), *argv]
        options.setdefault("stderr", self._errors)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        )
        self.pid = self.process.pid
        self._rest = b""

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._errors.close()

    def line(self, seconds: float = SECONDS) -> dict[str, Any]:
        """What the script says next; fails with its standard error where it says nothing."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not readable(fd, max(0.0, deadline - time.monotonic())):
                self.dump_stacks()
                raise AssertionError(f"the script said nothing for {seconds} s\n{self.errors()}")
            data = os.read(fd, 65536)
            if not data:
                raise AssertionError(f"the script has ended\n{self.errors()}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def tell(self, text: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = SECONDS) -> int:
        """Its exit status; it is given no more input."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.dump_stacks()
            raise AssertionError(f"the script goes on after {seconds} s\n{self.errors()}") from None

    def dump_stacks(self) -> None:
        """Have it write its threads' stacks to its standard error, twice: does it move? One that
        has not come to the end of its prelude ends instead."""
        for _ in range(2):
            self.kill(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)

    def output(self) -> str:
        """All that it has printed and `line` has not taken. Waits for the end of the pipe."""
        assert self.process.stdout is not None
        while readable(self.process.stdout.fileno()):
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            if not data:
                break
            self._rest += data
        return self._rest.decode()

    def errors(self) -> str:
        self._errors.flush()
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode(errors="replace")


class Watch:
    """Processes, by pidfd, so that nobody else can be meant by their number."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = list(pids)
        self._fds: dict[int, int] = {}
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                self._fds[os.pidfd_open(pid)] = pid

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._fds:
            # What a failed test leaves behind must not outlive it.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)

    def left(self, seconds: float) -> list[int]:
        """Those that are still there after `seconds`; returns as soon as all have ended."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        waiting = dict(self._fds)
        for fd in waiting:
            poll.register(fd, select.POLLIN)
        while waiting:
            events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not events:
                break
            for fd, _ in events:
                poll.unregister(fd)
                del waiting[fd]
        return list(waiting.values())


def alive(pid: int) -> bool:
    """Whether `pid` runs: a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(happened: Callable[[], Any], seconds: float = SECONDS, what: str = "") -> Any:
    """Look at something that tells nobody, often, until it is true."""
    deadline = time.monotonic() + seconds
    look = threading.Event()
    while not (value := happened()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or happened}"
        look.wait(0.005)
    return value


def open_fifo(path: str) -> int:
    """The writing end of a FIFO, once somebody has opened the reading one: not by an `open` that
    waits, which is for ever where the reader has been killed."""

    def end() -> int | None:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    deadline = time.monotonic() + SECONDS
    while (fd := end()) is None:
        assert time.monotonic() < deadline, f"nobody reads {path}"
        time.sleep(0.002)
    return fd


def remove_fifo(path: str) -> None:
    """Nobody waits at this FIFO any more, and who comes later finds none."""
    with contextlib.suppress(FileNotFoundError):
        end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        os.unlink(path)
        os.close(end)


class in_thread:  # reads as a verb
    """Run `work()` in a thread of its own: `value(seconds)` gives what it returned, or raises."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error

    def value(self, seconds: float = SECONDS) -> Any:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"it waits for longer than {seconds} s"
        if self._error is not None:
            raise self._error
        return self._value
