"""Waiting for other threads of ours where a signal handler may strike: `Bell`, `Background`.

`threading` has Condition, Event and Thread.join for this, and none of them stands an exception out
of a signal handler in the middle: a Condition may lose its lock, and a struck `join` of CPython
3.11 and 3.12 takes a running thread for ended (bpo-45274). One lock a wait, thrown away after it,
does.
"""

from __future__ import annotations

import threading
import time

from rankwise._deadline import clock, left
from rankwise._shielded import Shielded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


LAST_STEPS = 0.5  # seconds for which a thread that has done its work may still be listed


class Bell:
    """Wakes who waits for something to happen. What happens is the caller's to store first."""

    def __init__(self) -> None:
        self._gates: list[threading.Lock] = []

    def ring(self) -> None:
        """Have everybody who waits look again. From any thread; never waits."""
        for gate in tuple(self._gates):
            try:
                gate.release()
            except RuntimeError:
                pass  # it is open: he is about to look

    def wait_for(self, happened: Callable[[], bool], until: float | None) -> bool:
        """Wait until `happened()` is true (True) or the clock reads `until` (False)."""
        gate = threading.Lock()
        gate.acquire()
        try:
            self._gates.append(gate)
            while not happened():
                timeout = left(until)
                if timeout == 0.0:
                    return False
                gate.acquire(timeout=-1 if timeout is None else timeout)
            return True
        finally:
            if gate in self._gates:
                self._gates.remove(gate)


class Background:
    """Runs `run` in a daemon thread called `name`, from `start` on."""

    def __init__(self, run: Callable[[], object], name: str) -> None:
        self.name = name
        self._run_it = run
        self._ended = False
        self._bell = Bell()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Raises RuntimeError or MemoryError where no thread can be made. What a signal handler
        raises here says nothing of that: see `started`.

        Shielded: a struck `Thread.start` may leave a thread that never runs.
        """
        if threading._active_limbo_lock._is_owned():  # type: ignore[attr-defined]
            self._thread.start()  # in a handler inside `threading` itself, which no other may enter
            return
        start = Shielded(self._thread.start)
        try:
            start.run()
        except BaseException:
            start.settle()
            raise

    def _run(self) -> None:
        try:
            self._run_it()
        finally:
            self._ended = True
            self._bell.ring()

    @property
    def started(self) -> bool:
        """Whether it is known to run, or to have run. Not yet, where a handler has interrupted
        `start` before the thread ran: to join it there may be to wait for oneself."""
        return self._thread.ident is not None

    def is_current(self) -> bool:
        """Whether this very thread is it."""
        return threading.get_ident() == self._thread.ident

    def join(self, until: float | None = None) -> None:
        """Wait until it has ended, or the clock reads `until`; not at all in the thread itself."""
        if self.is_current() or not self._bell.wait_for(lambda: self._ended, until):
            return
        # It is a few instructions from its end, for which nothing else rings. Not Thread.join: see
        # above. Not threading.enumerate: whom a handler interrupts in it holds the lock that the
        # thread needs to end, and the handler may be the next to wait here. So it is bounded.
        soon = clock() + LAST_STEPS
        listed: dict[int | None, object] = threading._active  # type: ignore[attr-defined]
        while listed.get(self._thread.ident) is self._thread and clock() < soon:
            time.sleep(1e-5)
