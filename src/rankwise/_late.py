"""Values that are not there yet when a method returns: a second thread of the rank answers then.

    serve > your method > Late > put > queue > get() > value ==reply==> the driver
      `---> the next call, meanwhile               under one lock with serve's own replies

The thread is there from the first `Late` on. Late answers leave in the order of their calls; those
of other calls may overtake them, each is for its own call. As long as one is owed the status page
says so: a rank that sleeps, or has finished a later call, has not lost it (`_lookout.py`).
"""

from __future__ import annotations

import os
from _queue import SimpleQueue
from _thread import allocate_lock

from rankwise._context import Place, enter_thread
from rankwise._messages import ACK, FAILED, FAILED_LENT, OK, OK_LENT, WANT_VALUE
from rankwise._outcome import Failed, encode_failure
from rankwise._status import LATE
from rankwise.wire.codec import encode_result
from rankwise.wire.lending import Lent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Thread
    from typing import Any, Protocol

    from rankwise.wire.arena import Arena

    class Replies(Protocol):
        """What answers need of a channel."""

        @property
        def arena(self) -> Arena | None: ...
        def reply(self, kind: int, call_id: int, body: bytes) -> None: ...
        def hang_up(self) -> None: ...


class Late:
    """What a method returns whose value is still being made, on a GPU, say.

    get: called without arguments on a second thread of the rank, once, while the rank goes on with
        its next call. The caller gets what it returns, or raises.

    Calls that return a Late are answered in their order. `current_call()` works in `get`.
    """

    __slots__ = ("get",)

    def __init__(self, get: Callable[[], object]) -> None:
        if not callable(get):
            raise TypeError(f"Late takes a callable without arguments, not {type(get).__name__}")
        self.get = get

    def __reduce__(self) -> Any:
        raise TypeError("a Late cannot travel: return it from a method, by itself")


class LateAnswers:
    """The second thread of the rank at `place`, and the lock that it shares with the first."""

    def __init__(self, channel: Replies, place: Place) -> None:
        import threading  # 1 ms, and only a rank that needs it

        self._channel = channel
        self._place = place
        self._lock = allocate_lock()
        self._queue: SimpleQueue[tuple[Late, int, int, str, float | None] | None] = SimpleQueue()
        name = f"rankwise-{place.info.group}-{place.info.rank}-late"
        self._thread: Thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, late: Late, call_id: int, flags: int) -> None:
        """Answer call `call_id`, which `place` has been in, with the value of `late`."""
        with self._lock:
            self._place.words[LATE] += 1
        place = self._place
        self._queue.put((late, call_id, flags, place.where(), place.deadline))

    def reply(self, kind: int, call_id: int, body: bytes) -> None:
        """The channel's own, for the thread that serves."""
        with self._lock:
            self._channel.reply(kind, call_id, body)

    def end(self) -> None:
        """Answer what is owed, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._answer_all()
        except BaseException:
            self._channel.hang_up()  # what it owes would never come, and nobody is to wait for it
            raise

    def _answer_all(self) -> None:
        arena = self._channel.arena
        place = Place(self._place.info, self._place.words)
        place.rank0 = self._place.rank0
        enter_thread(place)
        while (item := self._queue.get()) is not None:
            late, call_id, flags, where, place.deadline = item
            place.method, place.call_id = where.rpartition(".")[2], call_id
            try:
                value = late.get()
                place.call_id = 0
                kind, answer = (
                    (OK, encode_result(value, arena)) if flags & WANT_VALUE else (ACK, b"")
                )
            except BaseException as error:  # as in `serve`: a worker's exit is not the driver's
                place.call_id = 0
                kind, answer = FAILED, encode_failure(Failed(error), where, arena)
            del item, late
            value = None
            if self._place.forked:
                os._exit(0)  # a child that `get` forked has come out of it: the parent answers
            if type(answer) is Lent:
                kind = OK_LENT if kind == OK else FAILED_LENT
                answer.hold.pending.clear()
            with self._lock:
                self._channel.reply(kind, call_id, answer)
                self._place.words[LATE] -= 1
            del answer
