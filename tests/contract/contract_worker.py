"""What the workers of the contract's tests are. Importable, so it travels by name."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from typing import Any

from rankwise import current_call, worker_info

LAST_WINDOW = 64  # so many calls are sent ahead to a rank: what comes after them is queued


class Worker:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.info = worker_info()
        self.rank = self.info.rank
        self.seen: list[Any] = []

    # -- plain ones ---------------------------------------------------------------------------

    def get_rank(self) -> int:
        return self.rank

    def made_with(self) -> tuple[Any, Any]:
        return self.args, self.kwargs

    def echo(self, *args: Any, **kwargs: Any) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        return self.rank, args, kwargs

    def add(self, left: int, right: int = 10) -> int:
        return self.rank + left + right

    def note(self, item: Any) -> int:
        self.seen.append(item)
        return len(self.seen)

    def take_seen(self) -> list[Any]:
        seen, self.seen = self.seen, []
        return seen

    def described(self) -> tuple[int, str, float | None, bool, str]:
        call = current_call()
        return call.id, call.method, call.remaining(), call.cancelled(), repr(call)

    def get_info(self) -> Any:
        return worker_info()

    def get_pid(self) -> int:
        return os.getpid()

    def get_thread(self) -> str:
        return threading.current_thread().name

    @staticmethod
    def double(number: int) -> int:
        return 2 * number

    @classmethod
    def class_name(cls) -> str:
        return cls.__name__

    def __secret(self, word: str) -> str:
        return f"{word} of {self.rank}"

    secret = __secret

    class Inner:
        @staticmethod
        def get_rank(worker: Worker) -> int:
            return 1000 + worker.rank

    # -- ones that wait -----------------------------------------------------------------------

    def pass_gate(self, path: str, item: Any = None) -> int:
        """Return the rank once the test has opened the gate for it."""
        with open(f"{path}.{self.rank}") as gate:
            gate.read()
        if item is not None:
            self.seen.append(item)
        return self.rank

    def cancelled_at_gate(self, path: str) -> bool:
        self.pass_gate(path)
        return current_call().cancelled()

    def cancelled_now(self) -> bool:
        return current_call().cancelled()

    def fail_or_wait(self, failing: list[int], path: str, message: str = "no") -> int:
        """Fail on the ranks `failing`; the others wait at the gate."""
        if self.rank in failing:
            raise ValueError(message, self.rank)
        return self.pass_gate(path)

    def fail_in_turn(self, path: str) -> None:
        """Fail on rank 1; the others fail once the gate is opened for them."""
        if self.rank == 1:
            raise ValueError("the cause")
        self.pass_gate(path)
        raise ConnectionError("a peer has gone\nand more of it")

    def fail_behind_gate(self, path: str) -> None:
        """Fail once the gate is opened for this rank."""
        self.pass_gate(path)
        raise ValueError("late", self.rank)

    def interrupting(self) -> Any:
        return Interrupting()

    # -- ones that fail -----------------------------------------------------------------------

    def fail(self, kind: type[BaseException], *args: Any, ranks: Any = None) -> int:
        """Raise `kind(*args)` on `ranks` (None: on all)."""
        if ranks is None or self.rank in ranks:
            raise kind(*args)
        return self.rank

    def fail_by_name(self, name: str) -> None:
        raise {
            "asyncio": asyncio.CancelledError,
            "futures": concurrent.futures.CancelledError,
            "own": CancelledError,
        }[name]("gone")

    def fail_with_cause(self) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    def fail_with(self, error: str) -> None:
        raise {
            "lock": lambda: Holding(threading.Lock()),
            "picky": lambda: Picky(3, word="x"),
            "at home": lambda: AtHome("only here"),
            "nasty": lambda: Nasty(),
        }[error]()

    def give(self, what: str) -> Any:
        if what == "lock":
            return {"cfg": [1, threading.Lock()]}
        return {"at home": OnlyThere()}


class Base(Worker):
    pass


class Loud(Worker):
    """Overrides what `Worker` has."""

    def get_rank(self) -> int:
        return -self.rank


class CancelledError(Exception):
    """A user's own class, which has nothing to do with asyncio's."""


class Holding(Exception):
    """Its args cannot be pickled."""


class Picky(Exception):
    """Its __init__ takes more than it passes on."""

    def __init__(self, number: int, *, word: str) -> None:
        super().__init__(f"{number} {word}")
        self.number = number
        self.word = word


class Nasty(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text of mine")


def _only_in_a_worker() -> Any:
    worker_info()
    return OnlyThere()


class OnlyThere:
    """Can be rebuilt in a worker, and nowhere else."""

    def __reduce__(self) -> Any:
        return _only_in_a_worker, ()


def _error_only_in_a_worker(*args: Any) -> AtHome:
    worker_info()
    return AtHome(*args)


class AtHome(Exception):
    def __reduce__(self) -> Any:
        return _error_only_in_a_worker, self.args


class Managed:
    """Writes down when it is entered and left."""

    def __init__(self, folder: str, broken: bool = False) -> None:
        self.folder = folder
        self.rank = worker_info().rank
        self.broken = broken
        self.entered = False

    def _write(self, word: str) -> None:
        with open(f"{self.folder}/{self.rank}", "a") as file:
            file.write(word + "\n")

    def __enter__(self) -> Managed:
        self._write("enter")
        self.entered = True
        return self

    def work(self) -> bool:
        self._write("work")
        return self.entered

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._write(f"exit {kind} {error} {trace}")
        if self.broken:
            raise RuntimeError("cannot leave")


def make_worker(word: str) -> Worker:
    """A target that is a function."""
    return Worker("made by a function", word)


class Failing:
    """Fails to construct on rank 1."""

    def __init__(self, message: str = "no weights") -> None:
        if worker_info().rank == 1:
            raise OSError(message)


INTERRUPTS: list[Any] = []  # what is called in the middle of rebuilding an `Interrupting`, once


def interrupt() -> str:
    if INTERRUPTS:
        INTERRUPTS.pop()()
    return "rebuilt"


class Interrupting:
    """A value that is rebuilt by code of the user's, which a signal handler may interrupt."""

    def __reduce__(self) -> Any:
        return interrupt, ()
