"""Each test of this folder runs against ranks that are processes and ranks that are threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from contract_worker import Worker

from rankwise import WorkerGroup

WORLD_SIZE = 3


@pytest.fixture(scope="module", params=["local", "inline"])
def backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


@pytest.fixture(scope="module")
def group(backend: str) -> Iterator[WorkerGroup]:
    """Three ranks of `Worker`, shared by the tests of a module, which leave it usable."""
    with WorkerGroup(Worker, WORLD_SIZE, args=("a",), kwargs={"b": 2}, backend=backend) as made:
        # The callback thread lives as long as the group: it is no leak of the test that needs it.
        made.submit(Worker.get_rank).add_done_callback(lambda future: future.result())
        made.flush()
        yield made


@pytest.fixture
def make(backend: str) -> Iterator[Callable[..., WorkerGroup]]:
    """Makes groups of the test's own; what it leaves open is killed."""
    made: list[WorkerGroup] = []

    def make(target: Any = Worker, world_size: int = 2, **options: Any) -> WorkerGroup:
        made.append(WorkerGroup(target, world_size, backend=backend, **options))
        return made[-1]

    yield make
    for group in made:
        group.kill()


class Gate:
    """Where a rank waits in `Worker.pass_gate(gate.path)` until the test lets it through.

    One FIFO a rank. Its writing end can be opened only once the rank has opened the reading one:
    `entered` returns when the rank is in the call, and `open` lets it go on.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self.path = str(folder / "gate")
        self._ends: dict[int, int] = {}
        self._fifos = [f"{self.path}.{rank}" for rank in range(world_size)]
        for fifo in self._fifos:
            os.mkfifo(fifo)

    def entered(self, *ranks: int) -> None:
        for rank in ranks:
            self._ends[rank] = os.open(self._fifos[rank], os.O_WRONLY)

    def open(self, *ranks: int) -> None:
        for rank in ranks:
            if rank not in self._ends:
                self.entered(rank)
            os.close(self._ends.pop(rank))

    def remove(self) -> None:
        """Nobody waits here any more, and who comes later finds no gate."""
        for fifo in self._fifos:
            with suppress(FileNotFoundError):
                end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
                os.unlink(fifo)
                os.close(end)
        for end in self._ends.values():
            os.close(end)
        self._ends.clear()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path, WORLD_SIZE)
    yield made
    made.remove()
