"""Other ways to call a method on N processes, each as its own documentation shows it.

`call(x)` has every worker answer with `x`. A library that is not installed has no row:
`make bench-peers` installs those that are not in the standard library.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol


class Peer(Protocol):
    def call(self, value: object) -> object: ...
    def close(self) -> None: ...


def echo(value: object) -> object:
    return value


class Executors:
    """One `ProcessPoolExecutor` of one worker a rank: an executor cannot call a worker by rank."""

    def __init__(self, world_size: int) -> None:
        self._pools = [ProcessPoolExecutor(1) for _ in range(world_size)]
        self.call(0)

    def call(self, value: object) -> object:
        futures = [pool.submit(echo, value) for pool in self._pools]
        return [future.result() for future in futures]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()


class RayActors:
    """One actor a rank; `ray.get` of all their references."""

    def __init__(self, world_size: int) -> None:
        import ray  # type: ignore[import-not-found, unused-ignore]

        self._ray: Any = ray
        # Its logs stay behind otherwise. The path must be short: sockets are made below it.
        self._folder = tempfile.mkdtemp(prefix="ray-")
        ray.init(
            num_cpus=world_size,
            logging_level="ERROR",
            include_dashboard=False,
            _temp_dir=self._folder,
        )

        class Actor:
            def echo(self, value: object) -> object:
                return value

        remote: Any = ray.remote(num_cpus=0)(Actor)
        self._actors = [remote.remote() for _ in range(world_size)]
        self.call(0)

    def call(self, value: object) -> object:
        return self._ray.get([actor.echo.remote(value) for actor in self._actors])

    def close(self) -> None:
        self._ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


class MonarchActors:
    """A mesh of actors on processes of this host; one endpoint call to all of them."""

    def __init__(self, world_size: int) -> None:
        from monarch.actor import (  # type: ignore[import-not-found, unused-ignore]
            Actor,
            endpoint,
            this_host,
        )

        class EchoActor(Actor):  # type: ignore[misc, unused-ignore]
            @endpoint  # type: ignore[untyped-decorator, unused-ignore]
            def echo(self, value: object) -> object:
                return value

        self._mesh: Any = this_host().spawn_procs(per_host={"ranks": world_size})
        self._actors = self._mesh.spawn("echo", EchoActor)
        self.call(0)

    def call(self, value: object) -> object:
        return self._actors.echo.call(value).get()

    def close(self) -> None:
        self._mesh.stop().get()


def _if_there(name: str, kind: Callable[[int], Peer]) -> Callable[[int], Peer | None]:
    def start(world_size: int) -> Peer | None:
        from importlib.util import find_spec

        if find_spec(name) is None:
            return None
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        return kind(world_size)

    return start


PEERS: dict[str, Callable[[int], Peer | None]] = {
    "concurrent.futures": Executors,
    "Ray actors": _if_there("ray", RayActors),
    "Monarch actors": _if_there("monarch", MonarchActors),
}
