"""`worker_info()` and `current_call()`: where the code that runs is, in a worker.

A worker process has one answer for all its threads. Ranks that are threads of the driver
(`backend="inline"`) have one each.
"""

from __future__ import annotations

from _thread import _local  # what `threading.local` is: that module takes 1 ms

from rankwise._deadline import left
from rankwise._status import is_cancelled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._rankinfo import RankInfo


class CurrentCall:
    """The call that a worker is running: `id`, `method`, `remaining()`, `cancelled()`."""

    __slots__ = ("_deadline", "_words", "id", "method")

    def __init__(self, id: int, method: str, deadline: float | None, words: memoryview) -> None:
        self.id = id
        self.method = method
        self._deadline = deadline
        self._words = words

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
    """Where some code runs: the rank's info, and the call that it is in.

    What there is of a call is a few stores; the object for `current_call` is made when it is asked
    for.
    """

    __slots__ = (
        "_call", "call_id", "deadline", "forked", "info", "method", "owner", "rank0", "words",
    )  # fmt: skip

    def __init__(self, info: RankInfo, words: memoryview) -> None:
        self.info = info
        self.words = words  # the rank's status page
        self.call_id = 0  # 0: in none; stored after the rest
        self.method = ""
        self.deadline: float | None = None
        self.owner: object = None  # the worker object, where the method was looked up on it
        self._call: CurrentCall | None = None
        self.rank0: memoryview | None = None  # rank 0's status page; None for a thread's rank
        self.forked = False  # this is a child that the worker forked

    def call(self) -> CurrentCall | None:
        """The call that it is in; the same object as long as it is in that."""
        call_id = self.call_id
        if not call_id:
            return None
        if self._call is None or self._call.id != call_id:
            self._call = CurrentCall(call_id, self.method, self.deadline, self.words)
        return self._call

    def where(self) -> str:
        """The method it was in last, with the class of the worker where it is that one's own."""
        owner = self.owner
        return self.method if owner is None else f"{type(owner).__name__}.{self.method}"


_process: Place | None = None
_threads = _local()


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
    call = None if place is None else place.call()
    if call is None:
        raise RuntimeError("current_call() was called outside a call of a WorkerGroup")
    return call
