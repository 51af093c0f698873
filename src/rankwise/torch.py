"""torch.distributed inside a worker: who am I, on which device, and where do we meet.

    rank 0      listen on a free port > TCPStore(master_listen_fd=) > publish round and port
    all others  read them from rank 0's status page > TCPStore > "joined/RANK"
    every rank  wait until all have joined, wanting one backend > torch's init_process_group(store=)

The usual way is to choose a free port, let go of it, and have rank 0 bind it again later: whoever
binds it in between has it. Here the socket whose port is told listens from the moment the kernel
chose the port, and goes to torch as it is; nothing is let go of.

A round is one life of a default process group, counted by rank 0. A rank takes only a round later
than the last that it has completed, so a port that is no more is never mistaken for the next one,
whichever rank comes to the next round first.

Nothing else of rankwise imports this file.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed

from rankwise._context import current_place, worker_info
from rankwise._deadline import check_timeout, clock, deadline, left
from rankwise._status import PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from rankwise._rankinfo import RankInfo

    class Store(Protocol):
        """What the rendezvous needs of torch's stores."""

        def set(self, key: str, value: str) -> None: ...
        def wait(self, keys: list[str], timeout: timedelta) -> None: ...
        def check(self, keys: list[str]) -> bool: ...
        def multi_get(self, keys: list[str]) -> list[bytes]: ...
        def set_timeout(self, timeout: timedelta) -> None: ...


__all__ = ["device", "init_process_group"]

dist: Any = torch.distributed  # torch's annotations do not tell that its stores are public

_WHO = "rankwise.torch.init_process_group"
_PORT_BITS = 16
_OURS = ("init_method", "rank", "store", "world_size")
_PATIENCE = 1800.0  # seconds: torch's own limit for a rendezvous

_completed = 0  # the last round that this process has been through


def device() -> torch.device:
    """The device of this rank: ``cuda:INDEX`` as ``worker_info().device`` says, else ``cpu``.

    It is ``cpu`` where the group was made without ``devices`` and where torch finds no GPU. The
    current device is left as it is. Raises RuntimeError outside a worker, and where the rank's
    index is beyond the GPUs that its process sees.
    """
    info = worker_info()
    if info.device is None or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if info.device >= visible:
        raise RuntimeError(
            f"rank {info.rank} of {info.group} has device {info.device}, but its process sees "
            f"{visible}: start at most as many ranks as there are GPUs, or give "
            "WorkerGroup(devices=[...]) one entry a rank"
        )
    return torch.device("cuda", info.device)


def init_process_group(
    backend: str | None = None, *, timeout: float | timedelta | None = None, **kw: Any
) -> None:
    """Make torch.distributed's default process group of all ranks of this worker's group.

    Every rank calls it, in the target's ``__init__`` or in one call to the whole group. After
    ``torch.distributed.destroy_process_group()`` on every rank it may be called again.

    backend: "nccl", "gloo" or another that torch knows; None picks nccl where `device()` is a GPU
        and this torch has nccl, else gloo.
    timeout: seconds, or a timedelta: how long a rank waits for the others to come, and torch's
        limit for each collective afterwards. None: 30 minutes, and then torch's own default.
    kw: anything else that ``torch.distributed.init_process_group`` takes; init_method, rank, store
        and world_size are known here, and giving one is a TypeError.

    Where `device()` is a GPU it becomes the current device, and with nccl it is passed as
    device_id. gloo's own sockets stay on loopback, unless GLOO_SOCKET_IFNAME says otherwise.

    Raises RuntimeError outside a worker process, ValueError where a default group is there
    already, TimeoutError naming the ranks that did not come, ConnectionError where rank 0 gave up,
    RuntimeError where the ranks' backends differ.
    """
    info, words = _where()
    seconds = _seconds(timeout)
    for name in _OURS:
        if name in kw:
            raise TypeError(f"{_WHO} takes no {name}: it knows it from the group; leave it out")
    if dist.is_initialized():
        raise ValueError(
            f"rank {info.rank} of {info.group} has a default process group already: call "
            "torch.distributed.destroy_process_group() on every rank first"
        )
    backend, kw = _choose(info, backend, kw)
    try:
        store = _meet(info, words, seconds, backend)
        dist.init_process_group(
            backend,
            timeout=None if seconds is None else timedelta(seconds=seconds),
            store=store,
            rank=info.rank,
            world_size=info.world_size,
            **kw,
        )
    except BaseException:
        if info.rank == 0:
            words[PORT] = words[PORT] >> _PORT_BITS << _PORT_BITS  # this round comes to nothing
        raise


def _where() -> tuple[RankInfo, memoryview]:
    """This rank, and the status page of rank 0."""
    place = current_place()
    if place is None:
        raise RuntimeError(
            f"{_WHO} was called outside a worker: call it in code that a WorkerGroup runs"
        )
    if place.rank0 is None:
        raise RuntimeError(
            f"{_WHO} needs a process a rank, and the ranks of {place.info.group} are threads of "
            "one: make the group with backend='local' instead of 'inline'"
        )
    return place.info, place.rank0


def _seconds(timeout: float | timedelta | None) -> float | None:
    seconds = check_timeout(timeout.total_seconds() if isinstance(timeout, timedelta) else timeout)
    if seconds is not None and seconds <= 0:
        raise ValueError(f"timeout must be more than 0 seconds, not {timeout!r}")
    return seconds


def _choose(info: RankInfo, backend: str | None, kw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The backend, and `kw` with what it needs; the rank's GPU is the current one afterwards."""
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if backend is None:
        backend = "nccl" if where.type == "cuda" and dist.is_nccl_available() else "gloo"
    if "nccl" in backend.lower():
        if where.type != "cuda":
            raise RuntimeError(
                f"rank {info.rank} of {info.group} has no GPU for backend {backend!r}: give "
                "WorkerGroup(devices='isolated') or 'shared' where torch.cuda.is_available(), or "
                "take backend='gloo'"
            )
        # With it the communicator is made now, so that what is wrong with it is said here, and
        # barrier() need not guess the device.
        kw = {"device_id": where, **kw}
    if info.num_nodes == 1:
        # gloo would listen on the address that the host's name resolves to, for anybody to
        # connect to, and fail where it resolves to none of this machine's.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return backend, kw


# -- the rendezvous ---------------------------------------------------------------------------


def _meet(info: RankInfo, words: memoryview, seconds: float | None, backend: str) -> Store:
    """A store that every rank of the group has reached, wanting the same backend."""
    global _completed
    began = clock()
    until = deadline(_PATIENCE if seconds is None else seconds)
    if info.rank == 0:
        round, tcp = _open(info, words, until)
    else:
        round, port = _published(info, words, began, until)
        tcp = _connect(info, port, until)
    # MASTER_PORT is reserved for this group as long as it lives, so the prefix is its own: were a
    # port to pass from a store that was given up to another group's, nobody would mix their keys.
    store: Store = dist.PrefixStore(f"rankwise/{info.master_port}/{round}", tcp)
    chosen = _gather(info, store, backend, began, until)
    if len(set(chosen)) > 1:
        _part(info, store, until)
        raise RuntimeError(
            f"the ranks of {info.group} do not take the same backend: "
            + ", ".join(f"rank {rank} {name}" for rank, name in enumerate(chosen))
            + ". Where none is given a rank takes gloo if its process sees no GPU: start at most "
            "as many ranks as there are GPUs, or give every rank the same backend"
        )
    tcp.set_timeout(timedelta(seconds=_PATIENCE if seconds is None else seconds))
    _completed = round
    return store


def _open(info: RankInfo, words: memoryview, until: float | None) -> tuple[int, Store]:
    round = (words[PORT] >> _PORT_BITS) + 1
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(info.world_size)
        port = listener.getsockname()[1]
        store = _store(info, port, until, master_listen_fd=listener.fileno())
        listener.detach()  # the store's own from here on: it closes it
    words[PORT] = round << _PORT_BITS | port
    return round, store


def _published(
    info: RankInfo, words: memoryview, began: float, until: float | None
) -> tuple[int, int]:
    """Wait for rank 0 to tell of a round that this rank has not been through: the round, its port.

    A word of memory has nothing to sleep on. A few looks a millisecond at first, a hundred a second
    later, cost less than a wake-up would save: this happens once in the life of a process group,
    next to connections and, mostly, an import of torch on the other side.
    """
    pause = 0.0002
    while True:
        round, port = divmod(words[PORT], 1 << _PORT_BITS)
        if port and round > _completed:
            return round, port
        remaining = left(until)
        if not remaining:
            raise TimeoutError(
                f"rank {info.rank} of {info.group} waited {clock() - began:.1f} s in {_WHO} for "
                "rank 0, which has not called it: every rank of the group must, in the target's "
                "__init__ or in one call to the whole group"
            )
        time.sleep(min(pause, remaining))
        pause = min(pause * 2, 0.01)


def _connect(info: RankInfo, port: int, until: float | None) -> Store:
    try:
        return _store(info, port, until)
    except dist.DistError as error:
        raise _gave_up(info) from error


def _gather(
    info: RankInfo, store: Store, backend: str, began: float, until: float | None
) -> list[str]:
    """Wait until every rank has joined: the backend that each has chosen.

    `TCPStore(wait_for_workers=True)` would count connections; keys can tell who is missing.
    """
    keys = [f"joined/{rank}" for rank in range(info.world_size)]
    try:
        store.set(keys[info.rank], backend.lower())
        store.wait(keys, _as_timedelta(until))
        return [value.decode() for value in store.multi_get(keys)]
    except dist.DistError as error:
        try:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        except dist.DistError:
            raise _gave_up(info) from error
        raise TimeoutError(
            f"rank {info.rank} of {info.group} waited {clock() - began:.1f} s in {_WHO} for "
            f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}: every "
            "rank of the group must call it; look at what the missing ones do, or give a longer "
            "timeout"
        ) from error


def _part(info: RankInfo, store: Store, until: float | None) -> None:
    """Have every rank read what was chosen before rank 0, whose the store is, gives it up: who came
    later would be told that it is gone, and not why."""
    keys = [f"read/{rank}" for rank in range(info.world_size)]
    with suppress(dist.DistError):
        store.set(keys[info.rank], "")
        if info.rank == 0:
            store.wait(keys, _as_timedelta(until))


def _gave_up(info: RankInfo) -> ConnectionError:
    return ConnectionError(
        f"rank {info.rank} of {info.group} found the store of rank 0 gone in {_WHO}: rank 0 waited "
        "no longer, or has failed; its own error says why. Call it on every rank again"
    )


def _store(info: RankInfo, port: int, until: float | None, **kw: Any) -> Store:
    store: Store = dist.TCPStore(
        "127.0.0.1",
        port,
        info.world_size,
        info.rank == 0,
        _as_timedelta(until),
        wait_for_workers=False,
        **kw,
    )
    return store


def _as_timedelta(until: float | None) -> timedelta:
    remaining = left(until)
    assert remaining is not None
    return timedelta(seconds=max(remaining, 0.001))  # torch takes 0 for no limit
