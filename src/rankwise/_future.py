"""GroupFuture: a call's outcome to come, for threads, callbacks and event loops alike.

    result()            > Engine.wait: the waiter itself leads, no thread stands between
    await               > Engine.await_call: the loop leads
    done, running, repr > Engine.attend: nobody waits, so the keeper leads from now on
    add_done_callback,  > Engine.watch: the keeper leads, the group's callback thread calls
    wait, as_completed

The call is the truth; this object is a view of it. `done` follows from the call, and the value is
decoded once, by the first who asks for it, in that one's thread. The parts of the standard
library's Future that only some need (its condition, its waiters) are made when they are first
touched: that halves what a future costs.

`concurrent.futures.wait` and `as_completed` believe that a state cannot change while they hold the
condition. A call is settled without it, so what they see is fixed when they take it (`_Standing`).
"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, LOGGER, PENDING, RUNNING
from typing import TypeVar

from rankwise._answers import take, timeout_error
from rankwise._calls import Call, Cancelled
from rankwise._deadline import check_timeout
from rankwise._interrupts import is_interrupt
from rankwise._messages import FAILED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from rankwise._engine import Engine

T = TypeVar("T")


class _Standing:
    """The lock of a future's condition, and how the call stands to whoever holds it.

    `wait` looks at the state, looks again to count what is open, and leaves a waiter, all under
    this lock. If the call were settled for it in between, or were told to a waiter that has already
    counted it as done, `wait` would never return, or return before the others are done.
    """

    __slots__ = ("__exit__", "_call", "_is_owned", "_lock", "done", "release", "untold", "waiters")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._lock: Any = threading.RLock()
        # The lock's own: no handler can strike between such a C call and the release that it makes.
        self.release = self._lock.release
        self.__exit__ = self._lock.__exit__
        self._is_owned = self._lock._is_owned  # type: ignore[attr-defined]
        self.done = False  # as it was when the lock was last taken
        self.waiters: list[Any] = []
        self.untold: list[Any] = []  # who left a waiter while it was not done: they are to be told

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken: bool = self._lock.acquire(blocking, timeout)
        if taken and self._call.done and not self.done:
            self.untold = list(self.waiters)
            self.done = True
        return taken

    __enter__ = acquire


class GroupFuture(Future[T]):
    """The outcome of one call. Made by `submit`, never by hand.

    A `concurrent.futures.Future` that can also be awaited, from any running asyncio or uvloop loop.
    Callbacks run on one thread named for the group, or at once in the caller's where the future is
    already done. `rank` is the rank whose value it is, None where it is a list.
    """

    _fetched = False  # its outcome has been asked for
    _announced = False
    _decoded = False
    _value: Any = None
    _error: BaseException | None = None

    def __init__(self, call: Call, engine: Engine, keep: object) -> None:
        # Not the standard library's __init__: see the top of this file.
        self._call = call
        self._engine = engine
        self._keep = keep  # the group lives as long as somebody may still ask it for this
        self._decoding = threading.RLock()
        call.future = self

    def __getattr__(self, name: str) -> Any:
        """The standard library's parts, when it first touches them."""
        if name == "_condition":
            self._engine.watch(self)  # first: it may have no thread to call anybody
            standing = self.__dict__.setdefault("_standing", _Standing(self._call))
            made: object = self.__dict__.setdefault("_condition", threading.Condition(standing))
            return made
        if name == "_waiters":
            return self.__dict__.setdefault("_standing", _Standing(self._call)).waiters
        if name == "_done_callbacks":
            return self.__dict__.setdefault("_done_callbacks", [])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def _state(self) -> str:  # type: ignore[override]  # read by concurrent.futures.wait, as_completed and repr
        call = self._call
        done = call.done
        standing = self.__dict__.get("_standing")
        if standing is not None and standing._is_owned():
            done = standing.done
        if not done:
            self._engine.attend(call)
            return RUNNING if call.begun else PENDING
        return CANCELLED_AND_NOTIFIED if isinstance(call.error, Cancelled) else FINISHED

    @property
    def rank(self) -> int | None:
        """The rank whose value this is; None where it is a list of several."""
        return self._call.shape

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else self._state.lower()
        return f"<GroupFuture of {self._call.method}() on {self._engine.name}: {state}>"

    def done(self) -> bool:
        call = self._call
        if not call.done:
            self._engine.attend(call)
        return call.done

    def running(self) -> bool:
        """Whether a byte of it may have been sent, and it is not done."""
        return self._call.begun and not self.done()

    def cancelled(self) -> bool:
        return isinstance(self._call.error, Cancelled)

    def cancel(self) -> bool:
        """Drop the call on every rank, if no byte of it was sent to any: True.

        Otherwise it runs on every rank, `current_call().cancelled()` is true there, and this says
        False.
        """
        return self._engine.cancel(self._call)

    # -- the outcome --------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> T:
        """The value, or raises what the call raised.

        timeout: this waiter's patience, seconds. CallTimeout after it; the call goes on and the
        future stays open.
        """
        if not self._call.done:
            self._wait("result", timeout)
        if not self._decoded:
            self._decode()
        self._fetched = True
        if self._error is not None:
            try:
                raise self._error.with_traceback(None)  # nor where it was raised before
            finally:
                self = None  # type: ignore[assignment]  # the traceback must not keep the future
        value: T = self._value
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised, or None. `timeout` as in `result`."""
        if not self._call.done:
            self._wait("exception", timeout)
        if not self._decoded:
            self._decode()
        self._fetched = True
        return self._error

    def _wait(self, verb: str, timeout: float | None) -> None:
        call, engine = self._call, self._engine
        limit = until = None
        if timeout is not None:
            limit = check_timeout(timeout)
            until = engine.deadline(limit)
        try:
            engine.wait(call, until)
        finally:
            if not call.done:
                call.future = self  # `Lead.take_or_sleep` let go of it; no frame keeps it now
                if call.done and not call.watched:
                    call.future = None
        if not call.done:
            assert limit is not None  # without a limit it would still wait
            waited = f"its {limit:g} s" if limit > 0 else "no longer"
            why = f"{verb}({limit:g}) has waited {waited}, and the call goes on"
            raise timeout_error(call, engine, why)

    def _decode(self) -> None:
        call = self._call
        if isinstance(call.error, Cancelled):
            raise CancelledError
        with self._decoding:
            if self._decoded:
                return
            try:
                value = take(call, self._engine)
                if self._decoded:
                    return  # by a signal handler in the middle of that
                self._value = value
            except Exception as error:
                if is_interrupt(error):
                    raise  # nothing is decoded yet: the next who asks does it again
                error = error.with_traceback(None)  # where it was made says nothing
                if self._decoded:
                    return  # likewise: he has taken away what was left to be read
                self._error = error
            self._decoded = True
            # The pickled values have done their work; a failure may still break the group.
            # In place: a leader puts late answers into this very dict, and counts them there.
            answers = call.answers
            for rank, (kind, _) in list(answers.items()):
                if kind != FAILED:
                    answers[rank] = (kind, b"")

    def __await__(self) -> Generator[Any, None, T]:
        call = self._call
        if not call.done:
            from asyncio import get_running_loop

            try:
                yield from self._engine.await_call(call, get_running_loop())
            except BaseException:
                if not call.done:
                    self.cancel()  # the waiter was cancelled: it leaves at once, the call as it may
                self._fetched = True
                raise
        if isinstance(call.error, Cancelled):
            from asyncio import CancelledError as AsyncCancelledError

            raise AsyncCancelledError
        return self.result()

    # -- callbacks ----------------------------------------------------------------------------

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call `fn(future)` once it is done: on the group's callback thread, or at once where it
        is done already. What `fn` raises is logged."""
        with self._condition:
            if not self._call.done:
                self._done_callbacks.append(fn)
                return
        self._call_back(fn)

    def _call_back(self, fn: Callable[[Future[T]], object]) -> None:
        try:
            fn(self)
        except BaseException as error:  # also sys.exit: it would end the callbacks of all others
            # Handlers strike the main thread alone: on the callback thread it is `fn` that raised.
            if threading.current_thread() is threading.main_thread() and is_interrupt(error):
                raise
            LOGGER.exception("exception calling callback for %r", self)

    def announce(self) -> None:
        """Tell those who do not wait in `result`. On the callback thread; again does no harm."""
        with self._condition:
            if self._announced:
                return
            self._announced = True
            callbacks = list(self._done_callbacks)
            for waiter in self._standing.untold:
                self._tell(waiter)
            self._standing.untold = []  # they keep what they were told of
            self._condition.notify_all()
        for fn in callbacks:
            self._call_back(fn)

    def _tell(self, waiter: Any) -> None:
        if self.cancelled():
            waiter.add_cancelled(self)
        elif self._failed():
            waiter.add_exception(self)
        else:
            waiter.add_result(self)

    def _failed(self) -> bool:
        call = self._call
        if self._decoded:
            return self._error is not None
        if call.error is not None:
            return True
        return call.failure() is not None and not call.return_exceptions

    def __del__(self) -> None:
        if self._fetched:
            return
        call = self.__dict__.get("_call")
        if call is None or not call.done or isinstance(call.error, Cancelled):
            return
        self._engine.unfetched(self)

    def set_running_or_notify_cancel(self) -> bool:
        raise RuntimeError("a GroupFuture is settled by its group alone")

    def set_result(self, result: T) -> None:
        raise RuntimeError("a GroupFuture is settled by its group alone")

    def set_exception(self, exception: BaseException | None) -> None:
        raise RuntimeError("a GroupFuture is settled by its group alone")
