"""`worker_info()` and `current_call()`: where the code that runs is, in a worker.

A worker process has one answer for all its threads. Ranks that are threads of the driver
(`backend="inline"`) have one each.
"""

from __future__ import annotations

import threading

from rankwise._deadline import left
from rankwise._status import is_cancelled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._rankinfo import RankInfo


class CurrentCall:
    """The call that a worker is running: `id`, `method`, `remaining()`, `cancelled()`."""

    __slots__ = ("_deadline", "_owner", "_words", "id", "method")

    def __init__(
        self,
        id: int,
        method: str,
        deadline: float | None,
        words: memoryview,
        owner: object = None,
    ) -> None:
        self.id = id
        self.method = method
        self._deadline = deadline
        self._words = words
        self._owner = owner  # the worker object, where the method was looked up on it

    @property
    def where(self) -> str:
        """The method, with the class of the worker where it is that one's own."""
        owner = self._owner
        return self.method if owner is None else f"{type(owner).__name__}.{self.method}"

    def __repr__(self) -> str:
        return f"CurrentCall(id={self.id}, method={self.method!r})"

    def remaining(self) -> float | None:
        """Seconds until the caller's deadline, 0.0 once it has passed; None where it gave none."""
        until: Callable[[float | None], float | None] = getattr(_threads, "left", left)
        return until(self._deadline)

    def cancelled(self) -> bool:
        """Whether the caller has cancelled this call. It goes on all the same, unless it looks."""
        return is_cancelled(self._words, self.id)


class Place:
    """Where some code runs: the rank's info, and the call that it is in."""

    __slots__ = ("call", "forked", "info", "rank0")

    def __init__(self, info: RankInfo) -> None:
        self.info = info
        self.call: CurrentCall | None = None
        self.rank0: memoryview | None = None  # rank 0's status page; None for a thread's rank
        self.forked = False  # this is a child that the worker forked


_process: Place | None = None
_threads = threading.local()


def enter_process(place: Place) -> None:
    """This process is a worker from now on."""
    global _process
    _process = place


def enter_thread(place: Place, left: Callable[[float | None], float | None] = left) -> None:
    """The calling thread is a worker from now on. left: how long it is until a deadline."""
    _threads.place = place
    _threads.left = left


def current_place() -> Place | None:
    """The place of the code that runs; None outside a worker."""
    return getattr(_threads, "place", _process)


def worker_info() -> RankInfo:
    """Which rank this is: rank, world_size, local_rank, local_world_size, node_rank, num_nodes,
    group, device (an index, or None), master_addr, master_port.

    Raises RuntimeError outside a worker.
    """
    place = current_place()
    if place is None:
        raise RuntimeError(
            "worker_info() was called outside a worker: only what a WorkerGroup runs has a rank"
        )
    return place.info


def current_call() -> CurrentCall:
    """The call that the worker is running. Raises RuntimeError where it runs none."""
    place = current_place()
    if place is None or place.call is None:
        raise RuntimeError("current_call() was called outside a call of a WorkerGroup")
    return place.call
