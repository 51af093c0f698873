"""The fixtures that pytest has where rankwise is installed (entry point `pytest11`).

    leak_check     the test must leave nothing behind
    worker_group   makes groups of processes; ends what the test leaves open
    inline_group   the same, of threads: no process, so a debugger works, and it is fast
    manual_clock   deadlines and grace of inline groups pass when the test says so

Each takes its fixture's part of `rankwise.testing`; nothing of rankwise is imported before one is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rankwise import WorkerGroup
    from rankwise.testing import Fault, ManualClock


@pytest.fixture
def leak_check() -> Iterator[None]:
    """The test fails if something that it has made is there still at its end.

    That is a process, a thread of rankwise's, a descriptor, mapped memory, an entry of /dev/shm.
    For every test of a file: `pytestmark = pytest.mark.usefixtures("leak_check")`.
    """
    from rankwise.testing import Leaked, leak_check

    try:
        with leak_check():
            yield
    except Leaked as error:
        pytest.fail(f"the test has {error}", pytrace=False)


@pytest.fixture
def worker_group(request: pytest.FixtureRequest) -> Iterator[Callable[..., WorkerGroup]]:
    """`worker_group(target, world_size, *, faults=(), **options)`: a group of processes.

    faults: what `rankwise.testing.kill` and its like make. options: those of `WorkerGroup`. Groups
    that the test leaves open are killed at its end.
    """
    yield from _factory(request, "local")


@pytest.fixture
def inline_group(request: pytest.FixtureRequest) -> Iterator[Callable[..., WorkerGroup]]:
    """As `worker_group`, but the ranks are threads of this process (`backend="inline"`)."""
    yield from _factory(request, "inline")


@pytest.fixture
def manual_clock() -> Iterator[ManualClock]:
    """The time of the inline groups that the test makes: it passes by `advance(seconds)` alone."""
    from rankwise.testing import ManualClock

    with ManualClock() as clock:
        yield clock


def _factory(request: pytest.FixtureRequest, backend: str) -> Iterator[Callable[..., WorkerGroup]]:
    # In whichever order the test names them: what is left is looked for when the groups have ended.
    if "leak_check" in request.fixturenames:
        request.getfixturevalue("leak_check")
    from rankwise import WorkerGroup, testing

    with ExitStack() as made:

        def make(
            target: Callable[..., object],
            world_size: int = 2,
            *,
            faults: tuple[Fault, ...] | list[Fault] = (),
            **options: Any,
        ) -> WorkerGroup:
            with testing.faults(*faults):
                group = WorkerGroup(target, world_size, backend=backend, **options)
            made.callback(group.kill)
            return group

        yield make
