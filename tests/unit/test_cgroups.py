"""What control groups leave a process: CPUs, memory, and the kernel's count of its kills."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from rankwise import _procfs
from rankwise._environment import cpu_budget
from rankwise._procfs import (
    OomKills,
    cgroup_directories,
    mem_available,
    read_integers,
    read_values,
)


def tree(root: Path, files: Mapping[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


# --- the CPU budget -------------------------------------------------------------------------

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
CPUS = len(os.sched_getaffinity(0))


def quota(microseconds: int, period: int = 100000, group: str = "") -> dict[str, str]:
    directory = f"sys/fs/cgroup/cpu,cpuacct/{group}".rstrip("/")
    return {
        f"{directory}/cpu.cfs_quota_us": f"{microseconds}\n",
        f"{directory}/cpu.cfs_period_us": f"{period}\n",
    }


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


CGROUP = "proc/self/cgroup"
MOUNTS = "proc/self/mountinfo"


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 64, id="nothing-readable"),
        pytest.param({CGROUP: "0::/a/b\n", MOUNTS: V2}, 64, id="v2-without-files"),
        pytest.param(
            {CGROUP: "0::/a/b\n", MOUNTS: V2, "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"},
            4,
            id="v2-own-group",
        ),
        pytest.param(
            {CGROUP: "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"},
            4,
            id="v2-usual-place",
        ),
        pytest.param(
            {
                CGROUP: "0::/a/b\n",
                MOUNTS: V2,
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
                "sys/fs/cgroup/cpu.max": "800000 100000\n",
            },
            3,
            id="v2-parent-rounded-up",
        ),
        pytest.param(
            {CGROUP: "0::/\n", MOUNTS: V2, "sys/fs/cgroup/cpu.max": "50000 100000\n"},
            1,
            id="v2-container-half-a-cpu",
        ),
        pytest.param(
            {
                CGROUP: "0::/../outside\n",
                MOUNTS: V2,
                "sys/fs/cgroup/cpu.max": "200000 100000\n",
            },
            2,
            id="v2-outside-the-namespace",
        ),
        pytest.param(
            {CGROUP: "0::/a\n", MOUNTS: V2, "sys/fs/cgroup/a/cpu.max": "broken\n"},
            64,
            id="v2-garbage",
        ),
        pytest.param(
            {CGROUP: "0::/a\n", MOUNTS: V2, "sys/fs/cgroup/a/cpu.max/nested": ""},
            64,
            id="v2-a-directory",
        ),
        pytest.param(
            {
                CGROUP: "3:cpu,cpuacct:/job/x\n1:memory:/\n",
                MOUNTS: V1,
                **quota(300000, group="job"),
            },
            3,
            id="v1-parent",
        ),
        pytest.param(
            {
                CGROUP: "3:cpu,cpuacct:/job\n",
                MOUNTS: V1,
                **quota(-1),
                **quota(150000, group="job"),
            },
            2,
            id="v1-rounded-up",
        ),
        pytest.param(
            {
                CGROUP: "3:cpu,cpuacct:/docker/1f\n",
                MOUNTS: V1.replace("0:29 /", "0:29 /docker/1f"),
                **quota(500000),
            },
            5,
            id="v1-container-without-namespace",
        ),
        pytest.param(
            {
                CGROUP: "3:cpu,cpuacct:/docker/1f/sub\n",
                MOUNTS: V1.replace("0:29 /", "0:29 /docker/1f"),
                **quota(500000),
                **quota(200000, group="sub"),
            },
            2,
            id="v1-below-the-container",
        ),
        pytest.param(
            {
                CGROUP: "3:cpu,cpuacct:/elsewhere\n",
                MOUNTS: V1.replace("0:29 /", "0:29 /docker/1f"),
                **quota(500000),
            },
            5,
            id="v1-mount-of-another-part",
        ),
        pytest.param(
            {
                CGROUP: "3:cpu,cpuacct:/job\n0::/user\n",
                MOUNTS: V1 + V2.replace("cgroup rw", "cgroup/unified rw"),
                **quota(700000, group="job"),
                "sys/fs/cgroup/unified/user/cpu.max": "600000 100000\n",
            },
            6,
            id="both-versions",
        ),
    ],
)
def test_cpu_budget(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert cpu_budget(tree(tmp_path, files)) == expected


def test_cpu_budget_never_exceeds_the_affinity(tmp_path: Path) -> None:
    files = {CGROUP: "0::/\n", MOUNTS: V2, "sys/fs/cgroup/cpu.max": "99900000 100000\n"}
    assert cpu_budget(tree(tmp_path, files)) == CPUS


def test_cpu_budget_follows_the_affinity_of_the_process() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from rankwise._environment import cpu_budget; print(cpu_budget())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_cpu_budget_of_this_machine_is_possible() -> None:
    assert 1 <= cpu_budget() <= CPUS


# --- memory ---------------------------------------------------------------------------------

GB = 1 << 30
MEMINFO = f"MemTotal: {16 * GB >> 10} kB\nMemAvailable: {8 * GB >> 10} kB\n"
BASE_V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "proc/self/mountinfo": V2,
    "proc/meminfo": MEMINFO,
}
BASE_V1 = {
    "proc/self/cgroup": "9:cpu:/x\n4:memory:/a/b\n0::/\n",
    "proc/self/mountinfo": V1,
    "proc/meminfo": MEMINFO,
}


def v2(group: str, limit: int | str, usage: int, cached: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/{group}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{group}/memory.current": f"{usage}\n",
        f"sys/fs/cgroup/{group}/memory.stat": (
            f"anon {usage - cached}\nfile {cached}\n"
            f"inactive_file {cached // 2}\nactive_file {cached - cached // 2}\n"
        ),
    }


def v1(group: str, limit: int, usage: int, cached: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes": f"{limit}\n",
        f"sys/fs/cgroup/memory/{group}/memory.usage_in_bytes": f"{usage}\n",
        f"sys/fs/cgroup/memory/{group}/memory.stat": (
            f"inactive_file 1\nactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n"
        ),
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, sys.maxsize, id="nothing-readable"),
        pytest.param({"proc/meminfo": MEMINFO}, 8 * GB, id="no-cgroup"),
        pytest.param({**BASE_V2}, 8 * GB, id="v2-without-files"),
        pytest.param({**BASE_V2, **v2("a/b", "max", 5 * GB)}, 8 * GB, id="v2-no-limit"),
        pytest.param({**BASE_V2, **v2("a/b", 4 * GB, 1 * GB)}, 3 * GB, id="v2-own-limit"),
        pytest.param(
            {**BASE_V2, **v2("a/b", 4 * GB, 1 * GB), **v2("a", 6 * GB, 5 * GB)},
            1 * GB,
            id="v2-parent-limit",
        ),
        pytest.param(
            {**BASE_V2, **v2("a/b", 4 * GB, 4 * GB, cached=3 * GB)}, 3 * GB, id="v2-page-cache"
        ),
        pytest.param({**BASE_V2, **v2("a/b", 4 * GB, 5 * GB)}, 0, id="v2-over-the-limit"),
        pytest.param(
            {**BASE_V2, **v2("a/b", 64 * GB, 1 * GB)}, 8 * GB, id="v2-limit-above-machine"
        ),
        pytest.param(
            {**BASE_V2, "sys/fs/cgroup/a/b/memory.max": "1\n"}, 8 * GB, id="v2-usage-missing"
        ),
        pytest.param({**BASE_V1, **v1("a/b", 0x7FFFFFFFFFFFF000, GB)}, 8 * GB, id="v1-no-limit"),
        pytest.param(
            {**BASE_V1, **v1("a/b", 4 * GB, 2 * GB, cached=GB), **v1("a", 5 * GB, 4 * GB)},
            1 * GB,
            id="v1-parent-limit",
        ),
        pytest.param(
            {**BASE_V1, **v1("a/b", 4 * GB, 4 * GB, cached=2 * GB)}, 2 * GB, id="v1-page-cache"
        ),
    ],
)
def test_mem_available(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert mem_available(tree(tmp_path, files)) == expected


def test_mem_available_of_this_machine() -> None:
    assert 0 < mem_available() < read_values("/proc/meminfo")["MemTotal"] * 1024


OOM = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
EVENTS = "low 0\nhigh 0\nmax 9\noom 4\noom_kill 2\noom_group_kill 1\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, None, id="nothing-readable"),
        pytest.param({**BASE_V2}, None, id="v2-root-has-no-events"),
        pytest.param({**BASE_V2, "sys/fs/cgroup/a/b/memory.events": EVENTS}, 2, id="v2"),
        pytest.param(
            {**BASE_V2, "sys/fs/cgroup/a/b/memory.events": "oom_kill 0\n"}, 0, id="v2-none-yet"
        ),
        pytest.param({**BASE_V2, "sys/fs/cgroup/a/memory.events": EVENTS}, 2, id="v2-parent"),
        pytest.param(
            {
                **BASE_V2,
                "sys/fs/cgroup/a/b/memory.events": "oom_kill 1\n",
                "sys/fs/cgroup/a/memory.events": EVENTS,
            },
            1,
            id="v2-nearest-first",
        ),
        pytest.param({**BASE_V1, "sys/fs/cgroup/memory/a/b/memory.oom_control": OOM}, 3, id="v1"),
        pytest.param(
            {**BASE_V1, "sys/fs/cgroup/memory/a/b/memory.oom_control": "under_oom 0\n"},
            None,
            id="v1-before-4.13",
        ),
    ],
)
def test_oom_kill_count(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert OomKills(tree(tmp_path, files)).count() == expected


def test_oom_kills_are_counted_where_the_process_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def look(*args: str) -> list[str]:
        looks.append(args[0])
        return cgroup_directories(*args)

    monkeypatch.setattr(_procfs, "cgroup_directories", look)
    files = {f"sys/fs/cgroup/{name}/memory.events": EVENTS for name in ("a/b", "c")}
    root = Path(tree(tmp_path, {**BASE_V2, **files}))
    kills = OomKills(str(root))
    assert kills.count() == kills.count() == 2
    here = root / "sys/fs/cgroup/a/b/memory.events"
    here.write_text("oom_kill 5\n")
    assert kills.count() == 5
    assert len(looks) == 1, "it is looked for once"
    (root / "proc/self/cgroup").write_text("0::/c\n")
    assert kills.count() == 2
    (root / "sys/fs/cgroup/c/memory.events").unlink()
    assert kills.count() is None


def test_cgroup_directories_go_from_the_own_group_to_the_mount_point(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {**BASE_V1, "proc/self/mountinfo": V1 + V2.replace("cgroup rw", "cgroup/u rw")}
    )
    assert cgroup_directories("memory", root) == [
        f"{root}/sys/fs/cgroup/memory/a/b",
        f"{root}/sys/fs/cgroup/memory/a",
        f"{root}/sys/fs/cgroup/memory",
        f"{root}/sys/fs/cgroup/u",
    ]


# --- small files ----------------------------------------------------------------------------


def test_read_values_takes_the_lines_that_have_a_number(tmp_path: Path) -> None:
    text = "a 12\nb:\t13 kB\n\nc\nd max\ne -1\n14\nf 1 2\n"
    found = read_values(f"{tree(tmp_path, {'file': text})}/file")
    assert found == {"a": 12, "b": 13, "f": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000\n", [None, 100000]), ("-1\n", [-1]), ("", []), ("a -b 7", [None, None, 7])],
)
def test_read_integers(tmp_path: Path, text: str, expected: list[int | None]) -> None:
    assert read_integers(f"{tree(tmp_path, {'file': text})}/file") == expected


def test_a_missing_file_holds_nothing(tmp_path: Path) -> None:
    assert read_values(str(tmp_path / "none")) == {}
    assert read_integers(str(tmp_path / "none")) == []
