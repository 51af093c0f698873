"""Each test of this folder runs against ranks that are processes and ranks that are threads."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from contract_worker import Worker

from rankwise import WorkerGroup, WorkerGroupError

WORLD_SIZE = 3
ENTERED = 20.0  # seconds for a rank to come to its gate


@pytest.fixture(scope="session", params=["local", "inline"])
def backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


class Shared:
    """The group that the tests share, made anew where one of them has broken it."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._group: WorkerGroup | None = None

    def get(self) -> WorkerGroup:
        group = self._group
        if group is not None:
            try:
                group.flush(timeout=2)
                if group.healthy:
                    return group
            except WorkerGroupError:
                pass
            self.end()
        made = WorkerGroup(Worker, WORLD_SIZE, args=("a",), kwargs={"b": 2}, backend=self._backend)
        self._group = made
        # The callback thread lives as long as the group: it is no leak of the test that needs it.
        made.submit(Worker.get_rank).add_done_callback(lambda future: future.result())
        # So does what it has mapped for large payloads: memory that is new, and memory used again.
        for _ in range(3):
            made.call(lambda worker, data: None, bytes(1 << 20))
        made.flush()
        return made

    def end(self) -> None:
        if self._group is not None:
            self._group.kill()


@pytest.fixture(scope="session")
def shared(backend: str) -> Iterator[Shared]:
    made = Shared(backend)
    made.get()
    yield made
    made.end()


@pytest.fixture
def group(shared: Shared) -> WorkerGroup:
    """Three ranks of `Worker`, shared by the tests, which leave it usable."""
    return shared.get()


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
            self._ends[rank] = self._writing_end(rank)

    def _writing_end(self, rank: int) -> int:
        # Not an open() that waits: where the rank has been killed, that would be for ever.
        limit = time.monotonic() + ENTERED
        while True:
            try:
                return os.open(self._fifos[rank], os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            assert time.monotonic() < limit, f"rank {rank} has not come to its gate"
            time.sleep(0.002)

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
