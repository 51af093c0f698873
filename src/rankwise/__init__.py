"""rankwise: one stateful worker process a rank, called as if the group were one object.

    with WorkerGroup(Shard, world_size=8, args=("model",)) as group:
        outputs = group.call(Shard.forward, x)      # a list, in rank order

It never hangs, it dies as one, and it says why.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._context import CurrentCall, current_call, worker_info
    from rankwise._future import GroupFuture
    from rankwise._group import WorkerGroup
    from rankwise._health import RankHealth
    from rankwise._late import Late
    from rankwise._rankinfo import RankInfo
    from rankwise._restart import Restart
    from rankwise._spec import per_rank
    from rankwise._stacks import RankStack, Stacks
    from rankwise.errors import (
        CallTimeout,
        GroupBroken,
        GroupClosed,
        RemoteError,
        SerializationError,
        StartupError,
        StartupTimeout,
        WorkerDied,
        WorkerGroupError,
    )

__version__ = "0.1.0"

# Where each public name lives. They are imported when they are first asked for: a worker process
# needs two of them, and the driver's half costs more than all that a worker needs.
_HOMES = {
    "CallTimeout": "errors",
    "CurrentCall": "_context",
    "GroupBroken": "errors",
    "GroupClosed": "errors",
    "GroupFuture": "_future",
    "Late": "_late",
    "RankHealth": "_health",
    "RankInfo": "_rankinfo",
    "RankStack": "_stacks",
    "RemoteError": "errors",
    "Restart": "_restart",
    "SerializationError": "errors",
    "Stacks": "_stacks",
    "StartupError": "errors",
    "StartupTimeout": "errors",
    "WorkerDied": "errors",
    "WorkerGroup": "_group",
    "WorkerGroupError": "errors",
    "current_call": "_context",
    "per_rank": "_spec",
    "worker_info": "_context",
}

__all__ = [
    "CallTimeout",
    "CurrentCall",
    "GroupBroken",
    "GroupClosed",
    "GroupFuture",
    "Late",
    "RankHealth",
    "RankInfo",
    "RankStack",
    "RemoteError",
    "Restart",
    "SerializationError",
    "Stacks",
    "StartupError",
    "StartupTimeout",
    "WorkerDied",
    "WorkerGroup",
    "WorkerGroupError",
    "current_call",
    "per_rank",
    "worker_info",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
