"""A worker that goes wrong at a named stage, in a named way. Imported by the ranks as a module."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

STAGES = ("import", "construct", "enter", "idle", "load", "run", "reply", "exit", "atexit")
FAULTS = ("raise", "SystemExit", "os._exit", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM")
RANK = 1  # the rank that goes wrong


class Oops(Exception):
    """What the fault "raise" raises."""


def go_wrong(fault: str) -> None:
    match fault:
        case "raise":
            raise Oops("as planned")
        case "SystemExit":
            sys.exit(3)
        case "os._exit":
            os._exit(3)
        case "SIGSEGV":
            ctypes.string_at(0)
        case "SIGABRT":
            os.abort()
        case "hold-gil":
            hold_gil()
        case "sleep":
            time.sleep(600)
        case name:
            os.kill(os.getpid(), getattr(signal, name))


def hold_gil() -> None:
    # Again, for a signal ends the call early: somebody has asked for stacks.
    while True:
        ctypes.PyDLL(None).sleep(600)


class Bomb:
    """Goes off in the worker, when it is unpickled there."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __reduce__(self) -> tuple[object, ...]:
        return _explode, (self.fault,)


def _explode(fault: str) -> object:
    if os.environ.get("RANK") == str(RANK):
        go_wrong(fault)
    return None


class ReplyBomb:
    """Goes off in the worker, when its result is pickled there."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __reduce__(self) -> tuple[object, ...]:
        go_wrong(self.fault)
        return (ReplyBomb, (self.fault,))


class Faulty:
    """A rank that goes wrong at `stage`, if it is rank 1."""

    def __init__(self, stage: str, fault: str, bomb: object = None) -> None:
        self.stage = stage
        self.fault = fault
        self.mine = os.environ["RANK"] == str(RANK)
        self._at("construct")
        if stage == "atexit" and self.mine:
            import atexit

            atexit.register(go_wrong, fault)

    def _at(self, stage: str) -> None:
        if self.mine and self.stage == stage:
            go_wrong(self.fault)

    def __enter__(self) -> Faulty:
        self._at("enter")
        return self

    def __exit__(self, *exc: object) -> None:
        self._at("exit")

    def work(self, argument: object = None) -> object:
        self._at("run")
        if self.stage == "reply" and self.mine:
            return ReplyBomb(self.fault)
        return int(os.environ["RANK"])

    def wait_for_a_file(self, path: str) -> int:
        """A fake collective: the ranks that do not fail block until the end of time."""
        self._at("run")
        while not os.path.exists(path):
            time.sleep(0.01)
        return int(os.environ["RANK"])

    def pid(self) -> int:
        return os.getpid()

    def thread_then_go_wrong(self, fault: str, read_end: int) -> None:
        """Go wrong from a second thread once the rank is idle and the descriptor is readable."""
        import threading

        def run() -> None:
            os.read(read_end, 1)
            go_wrong(fault)

        threading.Thread(target=run, daemon=True).start()
