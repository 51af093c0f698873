"""Who hears that a group has broken: whoever has it, once it has started, and nobody before."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from typing import Any

import pytest
from drivers import SECONDS, until
from told_ranks import Fails, FailsTheSecondTime, Worker, die

from rankwise import GroupBroken, Restart, StartupError, WorkerDied, WorkerGroup
from rankwise._seat import Seat


@pytest.mark.parametrize("how", ["exits", "raises"])
def test_a_start_that_fails_is_told_by_its_own_error_alone(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[GroupBroken] = []
    for on_failure in (told.append, None) * 5:
        with pytest.raises(StartupError):
            WorkerGroup(Fails, 2, args=(how,), logs="off", on_failure=on_failure)
    assert not told
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_rank_that_dies_before_the_start_is_awaited_is_told_of() -> None:
    told: list[GroupBroken] = []

    async def main() -> None:
        async with dead_before_it_is_awaited(on_failure=told.append) as group:
            assert not group.healthy
            until(lambda: told)

    asyncio.run(main())
    assert isinstance(told[0].first, WorkerDied) and len(told) == 1


def test_a_break_that_is_heard_of_while_the_group_takes_its_seat_is_one_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread was forgotten, where the keeper's word came between two steps of it."""

    async def main() -> None:
        start = dead_before_it_is_awaited(restart=Restart(1, 3600.0))
        engine = start._engine

        class Struck:
            """A lock whose first taker is preceded by the keeper."""

            def __init__(self) -> None:
                self.lock = threading.Lock()
                self.struck = False

            def __enter__(self) -> None:
                if not self.struck:
                    self.struck = True
                    engine.report_failure(engine.refusal())
                self.lock.acquire()

            def __exit__(self, *error: object) -> None:
                self.lock.release()

        def make(seat: Seat, *args: Any) -> None:
            init(seat, *args)
            monkeypatch.setattr(seat, "_lock", Struck())

        init = Seat.__init__
        monkeypatch.setattr(Seat, "__init__", make)
        async with start as group:
            assert group._seat._thread is not None
            assert group._seat._policy.used == 1

    asyncio.run(main())


def dead_before_it_is_awaited(**options: Any) -> Any:
    start: Any = WorkerGroup.start(Worker, 1, **options)
    engine = start._engine
    assert engine.wait(start._boot, engine.deadline(SECONDS))
    engine.learn_pids()
    os.kill(engine.ranks.pid(0), signal.SIGKILL)
    until(lambda: engine.link.gone, what="the keeper has dealt with it")
    return start


def test_a_rank_that_dies_in_on_restart_is_a_failed_start_and_no_failure_of_the_group() -> None:
    told: list[GroupBroken] = []
    starts: list[int] = []

    def reload(ranks: Any) -> None:
        starts.append(len(starts))
        if len(starts) == 1:
            ranks.call(die)

    restart = Restart(2, 0.0, on_restart=reload)
    with WorkerGroup(Worker, 2, restart=restart, on_failure=told.append) as group:
        with pytest.raises(WorkerDied):
            group[0].call(Worker.die)
        group.wait_ready(SECONDS)
        assert len(starts) == 2
    assert not told


def test_a_rank_that_dies_in_a_restart_is_no_failure_while_more_may_follow(tmp_path: Any) -> None:
    told: list[GroupBroken] = []
    path = tmp_path / "starts"
    options: dict[str, Any] = {"restart": Restart(2, 0.0), "on_failure": told.append}
    with WorkerGroup(FailsTheSecondTime, 1, args=(str(path),), **options) as group:
        with pytest.raises(WorkerDied):
            group[0].call(FailsTheSecondTime.die)
        group.wait_ready(SECONDS)
        assert path.read_text() == "xxx"
    assert not told


def test_a_group_that_restarts_tells_of_its_end_once(tmp_path: Any) -> None:
    told: list[GroupBroken] = []
    with WorkerGroup(Worker, 1, restart=Restart(1, 0.0), on_failure=told.append) as group:
        group.restart()
        for _ in range(2):
            with pytest.raises(WorkerDied):
                group[0].call(Worker.die)
            until(lambda: told or group.healthy)
        until(lambda: told)
    assert len(told) == 1
