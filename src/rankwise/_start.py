"""A group that starts while its caller goes on, and ends that do not block an event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref

from rankwise import _lifetime
from rankwise._deadline import deadline, left
from rankwise.backends import launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType
    from typing import Any

    from rankwise._calls import Call
    from rankwise._engine import Engine
    from rankwise._group import WorkerGroup
    from rankwise._spec import GroupSpec


class GroupStart:
    """A group that is starting: awaitable, and an async context manager.

    Whoever stops waiting (a cancelled task) ends the start; nothing is left of it.
    """

    def __init__(
        self, spec: GroupSpec, adopt: Callable[[GroupSpec, Engine, Call, bool], WorkerGroup]
    ) -> None:
        self._spec = spec
        self._adopt = adopt
        self._until = deadline(spec.start_timeout)
        self._group: WorkerGroup | None = None
        try:
            self._engine, self._boot = launch(spec)
            self._finalizer = weakref.finalize(self, _lifetime.abandon, self._engine, spec.name)
            self._finalizer.atexit = False
        except BaseException:
            _lifetime.kill_started(spec)
            raise

    def __await__(self) -> Generator[Any, None, WorkerGroup]:
        return self._ready().__await__()

    async def _ready(self) -> WorkerGroup:
        group = self._group
        if group is None:
            try:
                async with asyncio.timeout(left(self._until)):
                    await _Settled(self._engine, self._boot)
            except TimeoutError:
                pass
            except BaseException:
                self._finalizer.detach()
                await in_thread(self._engine.kill)
                raise
            self._finalizer.detach()
            self._group = group = await in_thread(
                self._adopt, self._spec, self._engine, self._boot, not self._boot.done
            )
        return group

    async def __aenter__(self) -> WorkerGroup:
        return await self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._group is not None:
            await self._group.__aexit__(kind, error, trace)


class _Settled:
    """Awaits that `call` is settled, whatever its outcome."""

    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine = engine
        self._call = call

    def __await__(self) -> Generator[object, None, None]:
        return self._engine.await_call(self._call, asyncio.get_running_loop())


async def in_thread(function: Callable[..., Any], *args: object, **kwargs: object) -> Any:
    """Run what blocks in a thread of its own: the loop's executor may be full of waiters."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: object, error: BaseException | None) -> None:
        if done.done():
            return  # nobody waits any more
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def run() -> None:
        value: object = None
        error: BaseException | None = None
        try:
            value = function(*args, **kwargs)
        except BaseException as reason:
            error = reason
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="rankwise-end").start()
    return await done
