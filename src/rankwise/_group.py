"""WorkerGroup and its views: the verbs of a user. It wires the parts and decides nothing.

group.call(f, x) > View._make: resolve, encode > View._run > Engine.run > take > value
group.submit     > View._make                  > View._submit > Engine.submit > GroupFuture
group[2:6], group.options(...) > another View of the same engine
"""

from __future__ import annotations

import threading
import weakref

from rankwise import _lifetime
from rankwise._answers import broken
from rankwise._calls import Closed
from rankwise._deadline import check_timeout, deadline
from rankwise._health import RankHealth, health_of, stacks_of
from rankwise._options import DEFAULTS
from rankwise._seat import Seat
from rankwise._shared_array import make_shared_array
from rankwise._spec import GroupSpec, check_spec
from rankwise._views import ManyView, OneView
from rankwise.backends import launch
from rankwise.backends.boot import check_ready
from rankwise.errors import GroupBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self

    from rankwise._calls import Call
    from rankwise._engine import Engine
    from rankwise._rankinfo import RankInfo
    from rankwise._restart import Restart
    from rankwise._spec import per_rank
    from rankwise._stacks import Stacks
    from rankwise._start import GroupStart

    Env = Mapping[str, str] | Sequence[Mapping[str, str]] | Callable[[RankInfo], Mapping[str, str]]


class WorkerGroup(ManyView):
    """One stateful worker a rank, called as if the group were one object.

    target: a class, or any callable that returns the worker object; called in each worker as
        `target(*args, **kwargs)`. What `__main__` defines travels by value.
    world_size: how many ranks.
    args, kwargs: for all ranks, or `per_rank([...])`, one a rank.
    name: shows in process titles, logs and errors.
    env: variables for the workers: a mapping, a list of mappings (one a rank), or a function of
        RankInfo. In place before any user import there; the driver's environment is not touched.
    devices: None leaves visibility alone; "shared": all stay visible, `worker_info().device` is the
        local rank; "isolated": one visible device a rank; a list of indices or UUIDs: one a rank.
    threads: "auto" (CPUs of this process // ranks), an int, or None: for OMP, MKL, OpenBLAS, torch.
    cpus: None leaves each rank all CPUs of this process; "split": each has a share of its own; a
        list of lists of CPU numbers: one a rank. threads="auto" is then as many.
    start_method: "spawn", or "forkserver": forked from a launcher that has imported `preload`, or
        spawned, with the reason logged, where it is not clean after that.
    preload: names of modules, for "forkserver".
    start_timeout: seconds until every rank is ready; None waits.
    logs: "prefix", "inherit" or "off": how the workers' output is shown.
    restart: None: the death of a rank breaks the group; a `Restart`: it starts again, as a whole.
    on_failure: called once, on the callback thread, with the GroupBroken; with `restart` when no
        restart is left, after a failed one on the thread that tried it. Without it, what no call
        tells is logged: the death of an idle rank, a rank that stays beyond its grace.
    spin: "auto", or seconds: how long a waiter polls before it sleeps in the kernel.
    backend: "local" (processes), or "inline" (threads of the driver, for pdb and fast tests).

    Returns when every rank is ready. Raises TypeError or ValueError for a wrong argument and
    SerializationError for one that cannot travel, both before any process is started; MemoryError
    where there is no room for large ones; StartupError where a rank fails, StartupTimeout where it
    takes too long. Nothing is left of a failed start.
    """

    def __init__(
        self,
        target: Callable[..., object],
        world_size: int,
        *,
        args: Sequence[object] | per_rank = (),
        kwargs: Mapping[str, object] | per_rank | None = None,
        name: str = "workers",
        env: Env | None = None,
        devices: str | Sequence[int | str] | None = None,
        threads: int | str | None = "auto",
        cpus: str | Sequence[Collection[int]] | None = None,
        start_method: str = "spawn",
        preload: Sequence[str] = (),
        start_timeout: float | None = None,
        logs: str = "prefix",
        restart: Restart | None = None,
        on_failure: Callable[[GroupBroken], object] | None = None,
        spin: float | str = "auto",
        backend: str = "local",
    ) -> None:
        spec = check_spec(
            target,
            world_size,
            args=args,
            kwargs=kwargs,
            name=name,
            env=env,
            devices=devices,
            threads=threads,
            cpus=cpus,
            start_method=start_method,
            preload=preload,
            start_timeout=start_timeout,
            logs=logs,
            restart=restart,
            on_failure=on_failure,
            spin=spin,
            backend=backend,
        )
        try:
            engine, boot = launch(spec)
            in_time = engine.wait(boot, deadline(spec.start_timeout))
            self._adopt(spec, engine, boot, not in_time)
        except BaseException:
            _lifetime.kill_started(spec)
            raise

    @classmethod
    def start(cls, target: Callable[..., object], world_size: int, **options: Any) -> GroupStart:
        """Start a group and return at once. Takes the constructor's arguments.

        `group = await WorkerGroup.start(...)`, or `async with WorkerGroup.start(...) as group`.
        """
        from rankwise._start import GroupStart  # asyncio: 30 ms

        for name in options.keys() - (check_spec.__kwdefaults__ or {}).keys():
            raise TypeError(f"WorkerGroup.start() got an unexpected keyword argument {name!r}")
        group = cls.__new__(cls)
        return GroupStart(check_spec(target, world_size, **options), group._adopt)

    def _adopt(self, spec: GroupSpec, engine: Engine, boot: Call, timed_out: bool) -> Self:
        """Be the group of the started `engine`, or raise why it did not start."""
        check_ready(spec, engine, boot, timed_out)
        seat = Seat(spec, engine)
        self._init_view(seat, tuple(range(spec.world_size)), self, None, DEFAULTS)
        self._spec = spec
        weakref.finalize(self, _lifetime.abandon, seat, spec.name).atexit = False
        seat.take(engine)
        return self

    # -- what it is ---------------------------------------------------------------------------

    def __repr__(self) -> str:
        seat = self.__dict__.get("_seat")
        if seat is None:
            return "<WorkerGroup: not started>"  # a debugger's view of a constructor that failed
        engine = seat.engine
        cause = engine.refusal()
        state = "open" if cause is None else "closed" if isinstance(cause, Closed) else "broken"
        if engine.inert is not None:
            state = "inert in this forked child"
        return (
            f"<WorkerGroup {engine.name!r}: {engine.world_size} ranks, {self._spec.backend}, "
            f"spin={engine.spin}, {state}>"
        )

    def _own_engine(self) -> Engine:
        """The engine. Raises RuntimeError in a forked child: it knows nothing of the ranks."""
        if self._engine.inert is not None:
            raise RuntimeError(self._engine.inert)
        return self._engine

    def __reduce__(self) -> Any:
        raise TypeError(
            "a WorkerGroup cannot be pickled: it belongs to the process that made it. Pass "
            "results, or make a group where it is needed"
        )

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def world_size(self) -> int:
        return self._engine.world_size

    @property
    def pids(self) -> list[int]:
        """The ranks' process ids, in rank order (this process's, where they are threads)."""
        ranks = self._own_engine().ranks
        return [ranks.pid(rank) for rank in range(self.world_size)]

    def __iter__(self) -> Iterator[OneView]:
        return (self[rank] for rank in range(self.world_size))

    # -- large payloads -----------------------------------------------------------------------

    def shared_array(self, shape: int | tuple[int, ...], dtype: Any = "float64") -> Any:
        """A numpy array of zeros in memory that the workers map.

        Passing it, or a contiguous part of it, to a call of this group copies nothing. So do not
        write to it until the call is done, nor for as long as a worker keeps what it was given;
        what a worker writes stays its own. It stays valid after the group is closed.

        shape: its dimensions, an int for one. dtype: as numpy has it, without Python objects.
        Raises MemoryError where there is no room.
        """
        return make_shared_array(self._own_engine(), shape, dtype)

    # -- how it is ----------------------------------------------------------------------------

    def health(self) -> list[RankHealth]:
        """What each rank is doing now, in rank order. Never blocks, never calls a worker."""
        return health_of(self._own_engine())

    def stacks(self, *, native: bool = False) -> Stacks:
        """The Python stacks of all ranks now, in rank order; `str()` says where they differ.

        Also while they are in calls, in C code, or hold the interpreter's lock there. A rank that
        is stopped, or does not let itself be asked, has `stack` None after 100 ms, and a `reason`.
        Where py-spy is installed, it is asked about such a rank.

        native: ask py-spy about every rank, for the C frames too; it stops each for some 50 ms.
        Nothing is sent to a worker but for this: C code in `sleep` or `poll` may return early.
        """
        return stacks_of(self._own_engine(), native)

    @property
    def healthy(self) -> bool:
        """Whether calls are taken: the group is neither broken nor closed."""
        return self._own_engine().refusal() is None

    @property
    def failure(self) -> GroupBroken | None:
        """What broke the group: a new GroupBroken, or None."""
        cause = self._own_engine().refusal()
        return None if cause is None or isinstance(cause, Closed) else broken(cause, self._engine)

    # -- starting again -----------------------------------------------------------------------

    def restart(self, timeout: float | None = 10.0) -> None:
        """Start the whole group again: fresh objects, made of the same arguments as they are now.

        The old ranks end as by `close(timeout)`, or where the group is broken. Until the new ones
        are ready, calls are refused with GroupBroken or GroupClosed. Views and one-rank handles
        then reach the new ranks. Where a restart is under way already, it waits for that one.
        Raises StartupError where the new ranks do not start (the group then takes no calls, and
        restart() may be tried again), GroupClosed after close(). `^C` ends the group.
        """
        self._seat.restart(check_timeout(timeout))

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return once calls are taken: at once, unless the group is being restarted.

        Raises GroupBroken where no restart will come any more, GroupClosed after close(), and
        CallTimeout where `timeout` seconds were not enough.
        """
        self._seat.wait_ready(check_timeout(timeout))

    # -- its end ------------------------------------------------------------------------------

    def close(self, timeout: float | None = 10.0) -> None:
        """End in order: no new calls; wait up to `timeout` seconds (None: as long as it takes) for
        those submitted and for the workers' own exit; then SIGTERM, 1 s, SIGKILL.

        Futures that are open then get GroupClosed. Nothing is left afterwards: no process, thread,
        descriptor or memory. Again it does nothing. `^C` turns the wait into a kill.
        """
        self._close(check_timeout(timeout))

    def _close(self, timeout: float | None, *, drop: bool = False) -> None:
        self._seat.end(lambda engine: engine.close(timeout, drop=drop))

    async def aclose(self, timeout: float | None = 10.0) -> None:
        """`close`, without blocking the event loop."""
        from rankwise._start import in_thread

        await in_thread(self._close, check_timeout(timeout))

    def kill(self) -> None:
        """End at once, by SIGKILL. Open futures get GroupClosed."""
        self._seat.end(lambda engine: engine.kill())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in `concurrent.futures.Executor`: `close` without a limit; `cancel_futures` cancels
        what is queued in the driver; without `wait` a thread of its own does the closing."""
        self._engine.refuse(cancel=cancel_futures)
        if wait:
            self._close(None)
        else:
            threading.Thread(
                target=self._close, args=(None,), name=f"rankwise-{self.name}-shutdown"
            ).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._engine.inert is not None:
            return  # a forked child leaves the block: its copy is none of its business
        if kind is None:
            self._close(None)
        else:
            self._close(10.0, drop=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from rankwise._start import in_thread

        if self._engine.inert is None:
            limit = None if kind is None else 10.0
            await in_thread(self._close, limit, drop=kind is not None)
