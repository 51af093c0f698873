"""Telling: settled calls go to whoever waits for them, and to the callbacks of their futures.

    Ledger.settled > watchers (a sleeper's gate, a loop's port) > announce > off the queue

By whoever has settled something: a leader, the keeper, a caller that cancels. Several may tell at
once, and an exception out of a signal handler may strike one in between. So a call leaves the queue
when all was told of it, and to be told twice does no harm.
"""

from __future__ import annotations

from rankwise._interrupts import is_interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from threading import RLock

    from rankwise._calls import Call


class Teller:
    """Tells of what is in `settled`. `announce`: called after the watchers."""

    __slots__ = ("_lock", "_settled", "announce")

    def __init__(self, settled: deque[Call], lock: RLock) -> None:
        self._settled = settled
        self._lock = lock
        self.announce: Callable[[Call], None] = lambda call: None  # futures with callbacks

    def tell(self) -> None:
        """Tell the watchers of every settled call. With no lock held."""
        settled = self._settled
        while True:
            try:
                call = settled[0]
            except IndexError:
                break
            for watcher in call.watchers or ():
                try:
                    watcher()
                except RuntimeError as error:
                    if is_interrupt(error):
                        raise
                    # a gate that is open already
            self.announce(call)
            with self._lock:
                if settled and settled[0] is call:
                    settled.popleft()
                    call.watchers = None  # an event loop's keeps the call
