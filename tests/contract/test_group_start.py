"""WorkerGroup.start, await and async with."""

from __future__ import annotations

import asyncio

import pytest
from contract_worker import Failing, Worker

from rankwise import GroupClosed, StartupError, StartupTimeout, WorkerGroup


def test_start_can_be_awaited(backend):
    async def main():
        start = WorkerGroup.start(Worker, 2, args=("s",), backend=backend, name="started")
        group = await start
        assert type(group) is WorkerGroup
        assert await start is group
        assert await group.submit(Worker.get_rank) == [0, 1]
        assert await group[1].submit(Worker.made_with) == (("s",), {})
        with pytest.raises(ValueError, match="no"):
            await group.submit(Worker.fail, ValueError, "no")
        await group.aclose()
        with pytest.raises(GroupClosed):
            group.submit(Worker.get_rank)

    asyncio.run(main())


def test_start_is_an_async_context_manager(backend):
    async def main():
        async with WorkerGroup.start(Worker, 1, backend=backend) as group:
            assert type(group) is WorkerGroup
            future = group.submit(Worker.get_rank)
        assert future.done()
        assert not group.healthy

    asyncio.run(main())


def test_an_exception_in_the_body_passes_and_the_group_is_closed(backend):
    async def main():
        with pytest.raises(KeyError, match="body"):
            async with WorkerGroup.start(Worker, 1, backend=backend) as group:
                raise KeyError("body")
        assert not group.healthy

    asyncio.run(main())


def test_a_group_is_an_async_context_manager_too(make):
    async def main():
        async with make(world_size=1) as group:
            assert await group.submit(Worker.get_rank) == [0]
        assert not group.healthy

    asyncio.run(main())


def test_a_start_that_fails_raises_where_it_is_awaited(backend):
    async def main():
        start = WorkerGroup.start(Failing, 2, args=("no disk",), backend=backend)
        with pytest.raises(StartupError, match="OSError: no disk") as caught:
            await start
        assert caught.value.rank == 1
        with pytest.raises(StartupError):
            await start

    asyncio.run(main())


def test_start_checks_its_arguments_at_once(backend):
    with pytest.raises(ValueError, match="world_size must be an int of at least 1, not 0"):
        WorkerGroup.start(Worker, 0, backend=backend)
    with pytest.raises(TypeError):
        WorkerGroup.start(Worker, 1, backend=backend, nonsense=1)


def test_start_has_a_timeout(backend, gate):
    path = gate.path

    def slow():
        with open(f"{path}.0"):
            pass
        return Worker()

    async def main():
        with pytest.raises(StartupTimeout, match=r"1 of 1 ranks were not ready after 0\.2 s"):
            await WorkerGroup.start(slow, 1, backend=backend, start_timeout=0.2)

    asyncio.run(main())


def test_two_tasks_may_wait_for_one_start(backend):
    async def main():
        start = WorkerGroup.start(Worker, 1, backend=backend)

        async def one():
            return await start

        first, second = await asyncio.gather(one(), one())
        assert first is second
        assert await first.submit(Worker.get_rank) == [0]
        await first.aclose()

    asyncio.run(main())


def test_the_loop_runs_while_a_group_starts(backend):
    async def main():
        turns = 0

        async def count():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count())
        group = await WorkerGroup.start(Worker, 1, backend=backend)
        counter.cancel()
        assert turns > 1
        await group.aclose()

    asyncio.run(main())


def test_an_argument_that_there_is_not_is_named(backend):
    with pytest.raises(TypeError, match=r"WorkerGroup\.start\(\) got an unexpected .* 'retries'"):
        WorkerGroup.start(Worker, 1, retries=3, backend=backend)
