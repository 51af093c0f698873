"""What each rank finds in its environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from rankwise._environment import (
    common_environment,
    rank_cpus,
    rank_environments,
    rank_infos,
)
from rankwise._preload import thread_count
from rankwise._rankinfo import RankInfo
from rankwise._spec import check_spec

VISIBILITY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environments(
    world_size: int = 2, base: Mapping[str, str] | None = None, budget: int = 8, **arguments: Any
) -> list[dict[str, str]]:
    spec = check_spec(dict, world_size, **arguments)
    infos = rank_infos(spec, "127.0.0.1", 29500)
    return rank_environments(spec, infos, base or {}, hash_seed=42, budget=budget)


def column(found: list[dict[str, str]], name: str) -> list[str | None]:
    return [environment.get(name) for environment in found]


# --- places ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(None, [None, None]), ("shared", [0, 1]), ("isolated", [0, 0]), ([5, "GPU-8f"], [0, 0])],
)
def test_rank_infos_count_one_node(devices: object, expected: list[int | None]) -> None:
    infos = rank_infos(check_spec(dict, 2, name="tp", devices=devices), "127.0.0.1", 29500)
    assert infos == [
        RankInfo(rank, 2, rank, 2, 0, 1, "tp", device, "127.0.0.1", 29500)
        for rank, device in enumerate(expected)
    ]


def test_ranks_find_what_torchrun_would_set() -> None:
    first, second = environments(2)
    assert {name: first[name] for name in first if name not in THREADS} == {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "PYTHONHASHSEED": "42",
    }
    assert (second["RANK"], second["LOCAL_RANK"]) == ("1", "1")


def test_ranks_of_a_second_node_get_their_own_numbers() -> None:
    spec = check_spec(dict, 4, devices="isolated", env=[{"N": str(r)} for r in range(4)])
    infos = [
        RankInfo(2 + local, 4, local, 2, 1, 2, "tp", 0, "10.0.0.1", 29500) for local in range(2)
    ]
    found = rank_environments(spec, infos, {}, hash_seed=1, budget=8)
    assert column(found, "RANK") == ["2", "3"]
    assert column(found, "LOCAL_RANK") == ["0", "1"]
    assert column(found, "CUDA_VISIBLE_DEVICES") == ["0", "1"]
    assert column(found, "OMP_NUM_THREADS") == ["4", "4"]
    assert column(found, "N") == ["2", "3"]


def test_an_outer_torchrun_leaves_no_trace_and_the_rest_is_inherited() -> None:
    base = {
        "RANK": "7",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "7",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": "7",
        "ROLE_WORLD_SIZE": "8",
        "ROLE_NAME": "default",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PATH": "/usr/bin",
        "NCCL_DEBUG": "INFO",
    }
    before = dict(base)
    (found,) = environments(1, base)
    assert base == before
    assert {name: found[name] for name in found if name not in THREADS} == {
        "PATH": "/usr/bin",
        "NCCL_DEBUG": "INFO",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "PYTHONHASHSEED": "42",
    }


# --- the user's env -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"A": "new"}, ["new", "new"]),
        ([{"A": "zero"}, {}], ["zero", "base"]),
        (lambda info: {"A": f"{info.group}-{info.rank}/{info.world_size}"}, ["tp-0/2", "tp-1/2"]),
    ],
)
def test_the_users_env_wins_over_what_is_inherited(env: object, expected: list[str]) -> None:
    assert column(environments(2, {"A": "base"}, name="tp", env=env), "A") == expected


@pytest.mark.parametrize(
    ("returned", "arguments", "error", "words"),
    [
        (
            None,
            {},
            TypeError,
            "called for rank 1, must be a mapping of str to str, not of type None",
        ),
        (
            {"A": 1},
            {},
            TypeError,
            "called for rank 1, must give 'A' a str, not a value of type int",
        ),
        ({"A=": "1"}, {}, ValueError, "called for rank 1, has 'A=', which cannot be the name"),
        ({"RANK": "1"}, {}, ValueError, "called for rank 1, must not set 'RANK', which rankwise"),
        (
            {"HIP_VISIBLE_DEVICES": "1"},
            {"devices": "isolated"},
            ValueError,
            "'HIP_VISIBLE_DEVICES', which devices='isolated' sets",
        ),
        ({"OMP_NUM_THREADS": "1"}, {"threads": 2}, ValueError, "which threads=2 sets"),
        ({"PYTHONHASHSEED": "5"}, {}, ValueError, "not None to rank 0 and '5' to rank 1"),
    ],
)
def test_what_an_env_function_returns_is_checked_and_the_rank_named(
    returned: Any, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        environments(2, env=lambda info: returned if info.rank else {}, **arguments)
    assert words in str(caught.value)


def test_what_an_env_function_raises_comes_through_with_the_rank() -> None:
    def env(info: RankInfo) -> dict[str, str]:
        return {"HOST": {0: "a"}[info.rank]}

    with pytest.raises(KeyError) as caught:
        environments(2, env=env)
    assert caught.value.args == (1,)
    assert caught.value.__notes__ == ["raised by env, called for rank 1"]


# --- one hash seed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "env", "expected"),
    [
        ({}, None, "42"),
        ({"PYTHONHASHSEED": "7"}, None, "7"),
        ({"PYTHONHASHSEED": "0"}, None, "0"),
        ({"PYTHONHASHSEED": "random"}, None, "42"),
        ({"PYTHONHASHSEED": ""}, None, "42"),
        ({"PYTHONHASHSEED": "4294967296"}, None, "42"),
        ({"PYTHONHASHSEED": "7"}, {"PYTHONHASHSEED": "9"}, "9"),
        ({"PYTHONHASHSEED": "7"}, {"PYTHONHASHSEED": "random"}, "42"),
        ({}, lambda info: {"PYTHONHASHSEED": "9"}, "9"),
    ],
)
def test_all_ranks_share_one_hash_seed(base: dict[str, str], env: object, expected: str) -> None:
    assert column(environments(3, base, env=env), "PYTHONHASHSEED") == [expected] * 3


# --- devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [None, "shared"])
def test_visibility_is_left_alone(devices: str | None) -> None:
    found = environments(2, {"CUDA_VISIBLE_DEVICES": "4"}, devices=devices)
    assert column(found, "CUDA_VISIBLE_DEVICES") == ["4", "4"]
    assert column(found, "HIP_VISIBLE_DEVICES") == [None, None]


@pytest.mark.parametrize(
    ("devices", "base", "cuda", "hip", "ascend"),
    [
        ("isolated", {}, ["0", "1"], ["0", "1"], ["0", "1"]),
        ("isolated", {"CUDA_VISIBLE_DEVICES": "4,5,6"}, ["4", "5"], ["4", "5"], ["0", "1"]),
        ("isolated", {"HIP_VISIBLE_DEVICES": "2, 3"}, ["2", "3"], ["2", "3"], ["0", "1"]),
        (
            "isolated",
            {"CUDA_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "6,7"},
            ["4", "5"],
            ["6", "7"],
            ["0", "1"],
        ),
        ("isolated", {"ASCEND_RT_VISIBLE_DEVICES": "6,7"}, ["0", "1"], ["0", "1"], ["6", "7"]),
        ("isolated", {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, ["GPU-a", "GPU-b"], None, None),
        ([3, 1], {}, ["3", "1"], ["3", "1"], ["3", "1"]),
        ([1, 0], {"CUDA_VISIBLE_DEVICES": "4,5"}, ["5", "4"], ["5", "4"], ["1", "0"]),
        ([0, 0], {"CUDA_VISIBLE_DEVICES": "4"}, ["4", "4"], ["4", "4"], ["0", "0"]),
        (["GPU-a", "MIG-b"], {"CUDA_VISIBLE_DEVICES": "4"}, *[["GPU-a", "MIG-b"]] * 3),
        (["7", 0], {"CUDA_VISIBLE_DEVICES": "4"}, ["7", "4"], ["7", "4"], ["7", "0"]),
    ],
)
def test_one_device_a_rank(
    devices: object,
    base: dict[str, str],
    cuda: list[str],
    hip: list[str] | None,
    ascend: list[str] | None,
) -> None:
    found = environments(2, base, devices=devices)
    for name, expected in zip(VISIBILITY, (cuda, hip, ascend), strict=True):
        assert expected is None or column(found, name) == expected, name


@pytest.mark.parametrize(
    ("devices", "base", "words"),
    [
        (
            "isolated",
            {"CUDA_VISIBLE_DEVICES": "4,5"},
            "each of 3 ranks, but CUDA_VISIBLE_DEVICES='4,5' leaves 2 visible",
        ),
        ("isolated", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' leaves 0 visible"),
        ("isolated", {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES='-1' leaves 0 visible"),
        ("isolated", {"CUDA_VISIBLE_DEVICES": "0,-1,1,2"}, "leaves 1 visible"),
        ("isolated", {"HIP_VISIBLE_DEVICES": "0"}, "but HIP_VISIBLE_DEVICES='0' leaves 1 visible"),
        ("isolated", {"ASCEND_RT_VISIBLE_DEVICES": "0"}, "ASCEND_RT_VISIBLE_DEVICES='0' leaves 1"),
        (
            [0, 5, 1],
            {"CUDA_VISIBLE_DEVICES": "4,5"},
            "devices names index 5 for rank 1, but CUDA_VISIBLE_DEVICES='4,5' leaves 2 visible",
        ),
    ],
)
def test_fewer_visible_devices_than_ranks_is_an_error_with_both_numbers(
    devices: object, base: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match="visible") as caught:
        environments(3, base, devices=devices)
    assert words in str(caught.value)


# --- threads --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "ranks", "expected"), [(8, 2, "4"), (9, 2, "4"), (2, 4, "1"), (1, 1, "1")]
)
def test_auto_threads_are_a_fair_share(budget: int, ranks: int, expected: str) -> None:
    found = environments(ranks, budget=budget)
    for name in THREADS:
        assert column(found, name) == [expected] * ranks


@pytest.mark.parametrize(
    ("base", "arguments", "expected"),
    [
        # MKL and OpenBLAS follow OMP_NUM_THREADS by themselves, if nothing else is set for them.
        ({"OMP_NUM_THREADS": "3"}, {}, ["3", None, None]),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"}, {}, ["3", "2", None]),
        ({"OMP_NUM_THREADS": ""}, {}, ["8", "8", "8"]),
        ({"MKL_NUM_THREADS": "3"}, {}, ["8", "3", "8"]),
        ({}, {"env": {"OMP_NUM_THREADS": "3"}}, ["3", None, None]),
        ({}, {"env": {"OPENBLAS_NUM_THREADS": "1"}}, ["8", "8", "1"]),
        ({"OMP_NUM_THREADS": "3"}, {"env": {"OMP_NUM_THREADS": "5"}}, ["5", None, None]),
        ({"OMP_NUM_THREADS": "3"}, {"threads": 2}, ["2", "2", "2"]),
        ({"OMP_NUM_THREADS": "3"}, {"threads": None}, ["3", None, None]),
        ({}, {"threads": None}, [None, None, None]),
        ({}, {"threads": None, "env": {"MKL_NUM_THREADS": "1"}}, [None, "1", None]),
    ],
)
def test_threads_and_the_users_own_settings(
    base: dict[str, str], arguments: dict[str, Any], expected: list[str | None]
) -> None:
    (found,) = environments(1, base, **arguments)
    assert [found.get(name) for name in THREADS] == expected


def test_one_ranks_own_setting_leaves_the_others_at_auto() -> None:
    found = environments(2, env=[{"OMP_NUM_THREADS": "7"}, {}])
    assert column(found, "OMP_NUM_THREADS") == ["7", "4"]
    assert column(found, "MKL_NUM_THREADS") == [None, "4"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "4"}, 4),
        ({"OMP_NUM_THREADS": " 4,2 "}, 4),
        ({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "x"}, 4),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "-1"}, None),
        ({"OMP_NUM_THREADS": ""}, None),
        ({"OPENBLAS_NUM_THREADS": "4"}, None),
    ],
)
def test_thread_count_is_what_torch_would_read(
    environment: dict[str, str], expected: int | None
) -> None:
    assert thread_count(environment) == expected


@pytest.mark.parametrize(
    ("ranks", "allowed", "expected"),
    [
        (2, {0, 1}, [(0,), (1,)]),
        (2, {7, 2, 3, 6, 5}, [(2, 3), (5, 6, 7)]),
        (3, range(8), [(0, 1), (2, 3, 4), (5, 6, 7)]),
        (4, {4, 9}, [(4,), (4,), (9,), (9,)]),
        (1, {0, 1}, [(0, 1)]),
    ],
)
def test_cpus_are_split_in_order_and_each_rank_has_one(
    ranks: int, allowed: set[int], expected: list[tuple[int, ...]]
) -> None:
    assert rank_cpus(check_spec(dict, ranks, cpus="split"), allowed) == expected


def test_cpus_that_were_named_are_not_looked_at_again() -> None:
    assert rank_cpus(check_spec(dict, 2, cpus=[[9], [8, 7]]), {0}) == [(9,), (7, 8)]
    assert rank_cpus(check_spec(dict, 2), {0, 1}) is None


def test_a_rank_computes_with_as_many_threads_as_it_has_cpus() -> None:
    spec = check_spec(dict, 2, cpus=[[0], [1, 2, 3]])
    infos = rank_infos(spec, "127.0.0.1", 29500)
    found = rank_environments(spec, infos, {}, hash_seed=1, budget=8, cpus=rank_cpus(spec, {0}))
    assert column(found, "OMP_NUM_THREADS") == ["1", "3"]


@pytest.mark.parametrize("threads", ["auto", 3])
def test_thread_count_reads_back_what_was_set(threads: object) -> None:
    (found,) = environments(1, budget=3, threads=threads)
    assert thread_count(found) == 3


# --- what is common -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        ([], {}),
        ([{"A": "1", "RANK": "0"}], {"A": "1", "RANK": "0"}),
        ([{"A": "1", "RANK": "0"}, {"A": "1", "RANK": "1"}], {"A": "1"}),
        ([{"A": "1", "B": "2"}, {"A": "1"}, {"A": "1", "B": "2"}], {"A": "1"}),
        ([{}, {"A": "1"}], {}),
    ],
)
def test_common_environment(each: list[dict[str, str]], expected: dict[str, str]) -> None:
    assert common_environment(each) == expected
