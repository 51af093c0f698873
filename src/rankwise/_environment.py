"""What each rank finds in its environment, decided before any process exists.

base (the driver's) without what an outer launcher left
    < devices, threads < the user's env < RANK and its kin, one PYTHONHASHSEED      (`<`: loses to)

A clash between the user's ``env`` and what rankwise sets never comes so far: it is an error.
Nothing here reads or writes ``os.environ``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from rankwise._checks import check_hash_seeds, check_variables, is_hash_seed
from rankwise._procfs import cgroup_directories, read_integers
from rankwise._rankinfo import RankInfo
from rankwise._spec import (
    RANK_VARIABLES,
    THREAD_VARIABLES,
    VISIBILITY_VARIABLES,
    GroupSpec,
    reserved_variables,
)

# Left by a torchrun around the driver. Some of it misleads: under TORCHELASTIC_USE_AGENT_STORE,
# for one, rank 0 would wait for a store that the outer agent keeps, where it has to make its own.
_OUTER_PREFIX = "TORCHELASTIC_"
_OUTER_VARIABLES = frozenset(
    {
        *RANK_VARIABLES,
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
    }
)

# HIP reads CUDA's variable where its own is missing, so a list in one of them narrows both.
_STANDS_IN = {
    "CUDA_VISIBLE_DEVICES": "HIP_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES": "CUDA_VISIBLE_DEVICES",
}


def rank_infos(spec: GroupSpec, master_addr: str, master_port: int) -> list[RankInfo]:
    """Every rank's place, in rank order, where one node has them all."""
    return [
        RankInfo(
            rank=rank,
            world_size=spec.world_size,
            local_rank=rank,
            local_world_size=spec.world_size,
            node_rank=0,
            num_nodes=1,
            group=spec.name,
            device=_device_index(spec, rank),
            master_addr=master_addr,
            master_port=master_port,
        )
        for rank in range(spec.world_size)
    ]


def rank_environments(
    spec: GroupSpec,
    infos: Sequence[RankInfo],
    base: Mapping[str, str],
    *,
    hash_seed: int,
    budget: int,
    cpus: Sequence[Sequence[int]] | None = None,
) -> list[dict[str, str]]:
    """The whole environment of each rank in ``infos``, in their order.

    base: the driver's environment at construction; it is not changed.
    hash_seed: PYTHONHASHSEED for all of them (0 to 2**32 - 1), where neither the user's ``env``
        nor ``base`` has a number there.
    budget: how many CPUs the ranks of one node share under ``threads="auto"``; see ``cpu_budget``.
    cpus: those that each rank is confined to, which are then its own; see ``rank_cpus``.

    Calls the user's ``env``, where it is a function, once a rank; what that raises passes through,
    with a note that names the rank. TypeError or ValueError for what it must not return, ValueError
    where ``base`` has narrowed the visible devices to fewer than the ranks need.
    """
    own = {info.rank: _own_variables(spec, info) for info in infos}
    check_hash_seeds(own)
    inherited = {
        name: value
        for name, value in base.items()
        if name not in _OUTER_VARIABLES and not name.startswith(_OUTER_PREFIX)
    }
    return [
        inherited
        | _visibility(spec, info, base)
        | _thread_limits(
            spec,
            inherited | own[info.rank],
            budget // info.local_world_size if cpus is None else len(cpus[info.rank]),
        )
        | own[info.rank]
        | _rank_variables(info)
        | {"PYTHONHASHSEED": _hash_seed(inherited | own[info.rank], hash_seed)}
        for info in infos
    ]


def common_environment(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The variables that are equal for all ranks: what modules preloaded for all of them see."""
    if not environments:
        return {}
    first, *others = environments
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def rank_cpus(spec: GroupSpec, allowed: Iterable[int]) -> list[tuple[int, ...]] | None:
    """The CPUs that each rank is confined to; None where it is to none.

    allowed: those of the driver. They are split in order, neighbours to one rank, for they share a
    cache or a NUMA node; where there are fewer than ranks, ranks have one, and share it.
    """
    if spec.cpus is None or not isinstance(spec.cpus, str):
        return None if spec.cpus is None else list(spec.cpus)
    all_, ranks = sorted(allowed), spec.world_size
    cuts = [rank * len(all_) // ranks for rank in range(ranks + 1)]
    return [tuple(all_[begin : max(end, begin + 1)]) for begin, end in pairwise(cuts)]


def cpu_budget(root: str = "/") -> int:
    """How many CPUs the calling process may keep busy, at least 1.

    The least of its affinity and of the CPU quota, rounded up, of every cgroup from its own to
    the root (both versions). The machine's own count is no guide in a container. ``root`` stands
    for "/", so that a test can offer a tree of its own.
    """
    quotas = [_quota(directory) for directory in cgroup_directories("cpu", root)]
    return min([len(os.sched_getaffinity(0)), *(quota for quota in quotas if quota)])


def _own_variables(spec: GroupSpec, info: RankInfo) -> dict[str, str]:
    """What the user's ``env`` gives one rank."""
    if not callable(spec.env):
        return spec.env[info.rank]
    try:
        variables = spec.env(info)
    except Exception as error:
        error.add_note(f"raised by env, called for rank {info.rank}")
        raise
    reserved = reserved_variables(spec.devices, spec.threads)
    return check_variables(f"env, called for rank {info.rank},", variables, reserved)


def _rank_variables(info: RankInfo) -> dict[str, str]:
    return {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
        "MASTER_ADDR": info.master_addr,
        "MASTER_PORT": str(info.master_port),
    }


def _hash_seed(variables: Mapping[str, str], otherwise: int) -> str:
    seed = variables.get("PYTHONHASHSEED", "")
    return seed if is_hash_seed(seed) else str(otherwise)


def _thread_limits(spec: GroupSpec, users: Mapping[str, str], share: int) -> dict[str, str]:
    if spec.threads is None:
        return {}
    if isinstance(spec.threads, int):
        return dict.fromkeys(THREAD_VARIABLES, str(spec.threads))
    if users.get("OMP_NUM_THREADS"):
        # MKL and OpenBLAS follow it where their own variable is missing, and would not if we set
        # theirs: torch takes MKL's number before OpenMP's.
        return {}
    fair_share = str(max(1, share))
    return {name: fair_share for name in THREAD_VARIABLES if not users.get(name)}


def _device_index(spec: GroupSpec, local_rank: int) -> int | None:
    if spec.devices is None:
        return None
    return local_rank if spec.devices == "shared" else 0


def _visibility(spec: GroupSpec, info: RankInfo, base: Mapping[str, str]) -> dict[str, str]:
    """The variables that leave one device visible to this rank."""
    if spec.devices is None or spec.devices == "shared":
        return {}
    if isinstance(spec.devices, tuple):
        wanted = spec.devices[info.rank]
        needs = f"devices names index {wanted} for rank {info.rank}"
    else:
        wanted = info.local_rank
        needs = f"devices='isolated' needs one device for each of {info.local_world_size} ranks"
    if isinstance(wanted, str):
        return dict.fromkeys(VISIBILITY_VARIABLES, wanted)
    return {name: _entry(name, wanted, needs, base) for name in VISIBILITY_VARIABLES}


def _entry(name: str, index: int, needs: str, base: Mapping[str, str]) -> str:
    """What a visibility variable says for the ``index``-th device that the driver itself sees."""
    source = name if name in base else _STANDS_IN.get(name, name)
    if source not in base:
        return str(index)
    visible = _visible(base[source])
    if index >= len(visible):
        raise ValueError(f"{needs}, but {source}={base[source]!r} leaves {len(visible)} visible")
    return visible[index]


def _visible(narrowed: str) -> list[str]:
    """The devices of a list such as ``4,5`` or ``GPU-8f,GPU-c2``. As in CUDA, it ends at the first
    entry that cannot be one: "" and "-1" hide them all."""
    entries: list[str] = []
    for entry in map(str.strip, narrowed.split(",")):
        if not entry or entry.startswith("-"):
            break
        entries.append(entry)
    return entries


def _quota(directory: str) -> int | None:
    """CPUs that one cgroup grants in each period, rounded up; None where it sets no bound."""
    quota_and_period = read_integers(f"{directory}/cpu.max") or [
        *read_integers(f"{directory}/cpu.cfs_quota_us"),
        *read_integers(f"{directory}/cpu.cfs_period_us"),
    ]
    match quota_and_period:
        case [int(quota), int(period)] if quota > 0 and period > 0:
            return -(-quota // period)
    return None
