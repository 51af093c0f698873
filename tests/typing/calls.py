"""Uses of typed calls, for the type checkers alone: nobody runs this file.

A line that ends in `# error` has to be reported, and no other line.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import assert_type

from rankwise import GroupFuture, WorkerGroup, per_rank


class Shard:
    def __init__(self, path: str) -> None:
        self.path = path

    def forward(self, x: int, scale: float = 1.0) -> str:
        return self.path * int(x * scale)

    def load(self) -> None: ...

    def many(self, *items: int, key: str) -> dict[str, int]:
        return {key: sum(items)}


def helper(worker: Shard, x: int) -> bytes:
    return worker.path.encode() * x


def calls(group: WorkerGroup) -> None:
    assert_type(group.call(Shard.forward, 1), list[str])
    assert_type(group.call(Shard.forward, 1, 2.0), list[str])
    assert_type(group.call(Shard.forward, x=1, scale=2.0), list[str])
    assert_type(group.call(Shard.load), list[None])
    assert_type(group.call(Shard.many, 1, 2, key="k"), list[dict[str, int]])
    assert_type(group.call(helper, 3), list[bytes])
    group.call("forward", 1, "anything", scale=None)

    group.call(Shard.forward)  # error
    group.call(Shard.forward, "1")  # error
    group.call(Shard.forward, 1, scale="2")  # error
    group.call(Shard.forward, 1, 2.0, 3)  # error
    group.call(Shard.forward, 1, skale=2.0)  # error
    group.call(Shard.load, 1)  # error
    group.call(Shard.many, 1, 2)  # error
    group.call(Shard.many, 1, "2", key="k")  # error
    group.call(helper, "3")  # error
    group.call(helper)  # error
    group.call(5)  # error
    group.call()  # error


def submits(group: WorkerGroup) -> None:
    assert_type(group.submit(Shard.forward, 1), GroupFuture[list[str]])
    assert_type(group.submit(Shard.forward, 1).result(), list[str])
    assert_type(group[0].submit(Shard.forward, 1), GroupFuture[str])
    assert_type(group.submit_each(Shard.forward, 1), list[GroupFuture[str]])
    future: Future[list[str]] = group.submit(Shard.forward, 1)
    future.cancel()

    group.submit(Shard.forward)  # error
    group.submit(Shard.forward, "1")  # error
    group[0].submit(Shard.forward, "1")  # error
    group.submit_each(Shard.forward, "1")  # error


async def awaits(group: WorkerGroup) -> None:
    assert_type(await group.submit(Shard.forward, 1), list[str])
    assert_type(await group[0].submit(Shard.forward, 1), str)
    assert_type(await WorkerGroup.start(Shard, 2, args=("p",)), WorkerGroup)
    async with WorkerGroup.start(Shard, 2, args=("p",)) as started:
        assert_type(started, WorkerGroup)


def views(group: WorkerGroup) -> None:
    assert_type(group[0].call(Shard.forward, 1), str)
    assert_type(group[-1].call(Shard.load), None)
    assert_type(group[2:6].call(Shard.forward, 1), list[str])
    assert_type(group[[0, 4]].call(Shard.forward, 1), list[str])
    assert_type(group[2:6][0].call(Shard.forward, 1), str)
    assert_type(group[2:6][[0]].call(Shard.forward, 1), list[str])
    assert_type([one.call(Shard.forward, 1) for one in group], list[str])

    group[0].call(Shard.forward, "1")  # error
    group[2:6].call(Shard.forward)  # error
    group["0"]  # error


def options(group: WorkerGroup) -> None:
    assert_type(group.options(timeout=40).call(Shard.forward, 1), list[str])
    assert_type(group.options(timeout=40, reply_from=0).call(Shard.forward, 1), str)
    assert_type(group.options(reply_from=0).submit(Shard.forward, 1), GroupFuture[str])
    assert_type(group.options(reply_from=None).call(Shard.forward, 1), list[str])
    assert_type(group[1:].options(grace=3).call(Shard.forward, 1), list[str])
    assert_type(group[0].options(timeout=3).call(Shard.forward, 1), str)
    assert_type(group.options(on_error="continue")[0].call(Shard.forward, 1), str)

    group.options(timeout="40")  # error
    group.options(reply_from="0")  # error
    group.options(on_error="ignore")  # error
    group.options(timeuot=3)  # error
    group.options(reply_from=0).call(Shard.forward, "1")  # error


def scatters(group: WorkerGroup) -> None:
    assert_type(group.scatter(Shard.forward, [1, 2, 3]), list[str])
    assert_type(group.scatter(Shard.forward, (1, 2), 2.0), list[str])
    assert_type(group[0].scatter(Shard.forward, [1]), str)
    group.scatter("forward", ["anything"], None)

    group.scatter(Shard.forward, ["1", "2"])  # error
    group.scatter(Shard.forward, [1, 2], "2.0")  # error
    group.scatter(Shard.forward)  # error


def construction() -> None:
    WorkerGroup(Shard, 2, args=per_rank([("a",), ("b",)]), env={"A": "1"})
    WorkerGroup(Shard, 2, env=[{"A": "1"}, {}], devices=[0, "GPU-1"], threads=None)
    WorkerGroup(lambda: Shard("p"), world_size=2, env=lambda info: {"A": str(info.rank)})
    with WorkerGroup(Shard, 2) as group:
        assert_type(group, WorkerGroup)

    WorkerGroup(Shard, "2")  # error
    WorkerGroup(Shard)  # error
    WorkerGroup(Shard, 2, env={"A": 1})  # error
