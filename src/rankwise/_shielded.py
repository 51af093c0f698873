"""Work that no signal handler may strike in the middle: it is done by a thread of its own."""

from __future__ import annotations

import _thread
import threading
from typing import Generic, TypeVar

from rankwise._interrupts import is_interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Shielded(Generic[T]):
    """Runs `function` where no signal handler strikes: in a thread of its own.

    Handlers run in the main thread alone. What makes processes and descriptors one by one cannot be
    made safe against an exception between any two steps, so the main thread only waits for it.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._started: list[int] = []  # the thread, from the moment that it exists
        self._finished = threading.Lock()
        self._finished.acquire()
        self._value: T
        self._error: BaseException | None = None

    def run(self) -> T:
        """The value of the function, or raises what it raised. See `settle` for ^C."""
        if threading.get_ident() != threading.main_thread().ident:
            return self._function()
        try:
            # One C call makes the thread and notes it, so `settle` knows whether there is one.
            self._started.extend(map(_thread.start_new_thread, (self._run,), ((),)))
        except RuntimeError:
            if self._started:
                raise  # a handler's, after the thread was made
            return self._function()  # an interpreter that exits makes no more threads
        with self._finished:
            pass
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._finished.release()

    def settle(self) -> None:
        """After an exception: wait until the function has ended, however often we are struck."""
        while self._started:
            try:
                with self._finished:
                    return
            except BaseException as error:
                if not is_interrupt(error):
                    raise
