"""Facts about processes and memory, read from /proc and /sys/fs/cgroup.

The launcher imports this file on its way up and asks it while it ends a group, so it imports
little and takes no answer on trust:

- A process may vanish between any two reads; the answer is then None, [] or 0, as documented.
- A pid says which process is meant only together with its start time (``ProcStat.starttime``).
- Being out of descriptors or of memory is raised as the OSError it is: "cannot look now" must not
  read as "there is no such process", or descendants would outlive their group.
"""

from __future__ import annotations

import os
import sys
from errno import EMFILE, ENFILE, ENOMEM

TYPE_CHECKING = False

# NVIDIA's, AMD's and Huawei's accelerators.
DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/davinci")

if TYPE_CHECKING:
    from typing import NamedTuple

    class ProcStat(NamedTuple):
        state: str
        ppid: int
        pgrp: int
        session: int
        cpu_seconds: float
        starttime: int
        rss: int

else:
    from collections import namedtuple

    ProcStat = namedtuple(
        "ProcStat", "state ppid pgrp session cpu_seconds starttime rss", module=__name__
    )
    ProcStat.__doc__ = """What /proc/PID/stat says of one process.

    state        one letter: R running, S sleeping, D in the kernel, T stopped, Z zombie, ...
    ppid, pgrp, session  its parent, process group and session
    cpu_seconds  user and system time that it has used, its reaped children's not counted
    starttime    clock ticks from boot to its start; with the pid it names one process for good
    rss          resident memory in bytes (0 for a zombie)
    """


def stat(pid: int) -> ProcStat | None:
    """State, family, CPU time and memory of a process, zombies included; None if it is gone."""
    text = read_text(f"/proc/{pid}/stat")
    if text is None:
        return None
    # The second field is a name that the process chose, and may hold spaces and parentheses:
    # what follows its last ")" is fields 3 and up of proc(5).
    fields = text[text.rfind(")") + 1 :].split()
    return ProcStat(
        state=fields[0],
        ppid=int(fields[1]),
        pgrp=int(fields[2]),
        session=int(fields[3]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        starttime=int(fields[19]),
        rss=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
    )


def children(pid: int) -> list[int]:
    """Pids of a process's children at this moment, zombies included; [] if it is gone.

    The kernel may leave a child out while a sibling is being reaped. Who wants to end them all
    asks again until there are none.
    """
    return _listed_children(pid) if _kernel_lists_children() else _scan_parents().get(pid, [])


def descendants(pid: int) -> list[int]:
    """Pids of a process's children, their children and so on, each after its parent.

    What has been orphaned meanwhile belongs to its subreaper and is not found here. As with
    ``children``, one look may miss a process.
    """
    parents = None if _kernel_lists_children() else _scan_parents()
    found = [pid]
    known = {pid}  # a pid that is reused during the walk must not make it go in circles
    for parent in found:
        below = _listed_children(parent) if parents is None else parents.get(parent, [])
        found += [child for child in below if child not in known]
        known.update(below)
    return found[1:]


def peak_rss(pid: int) -> int:
    """The most resident memory that a process ever had, in bytes; 0 if it is gone or a zombie."""
    return read_values(f"/proc/{pid}/status").get("VmHWM", 0) * 1024


def wchan(pid: int) -> str | None:
    """Name of the kernel function that a process's main thread sleeps in.

    None where it does not sleep, where the kernel does not tell, or if it is gone.
    """
    name = read_text(f"/proc/{pid}/wchan")
    return name if name and name != "0" else None


def open_device() -> str | None:
    """An accelerator that this process has open, by the path of its device file; None: none."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the directory that is being listed
        if path.startswith(DEVICES):
            return path
    return None


class OomKills:
    """How many processes of the calling process's cgroup the kernel has killed for lack of memory.

    A rise between two looks is what tells. Where the own group has no such count, the nearest
    parent that has one answers for all that is below it. To find the file takes half a millisecond:
    it is kept until the process is in another group or the file cannot be read.
    """

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._group: str | None = None
        self._file: str | None = None

    def count(self) -> int | None:
        """None where no memory cgroup can be seen."""
        group = read_text(os.path.join(self._root, "proc/self/cgroup"))
        count = None
        if group == self._group and self._file is not None:
            count = read_values(self._file).get("oom_kill")
        return self._find_and_count(group) if count is None else count

    def _find_and_count(self, group: str | None) -> int | None:
        for directory in cgroup_directories("memory", self._root):
            for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
                count = read_values(f"{directory}/{name}").get("oom_kill")
                if count is not None:
                    self._group, self._file = group, f"{directory}/{name}"
                    return count
        return None


def mem_available(root: str = "/") -> int:
    """Bytes that the calling process may still take before the kernel has to kill or refuse.

    The least of the machine's MemAvailable and of what each memory cgroup on the way up leaves;
    0 where a group is at its limit, ``sys.maxsize`` where nothing could be read.
    """
    available = read_values(os.path.join(root, "proc/meminfo")).get("MemAvailable")
    least = sys.maxsize if available is None else available * 1024
    for directory in cgroup_directories("memory", root):
        left = _memory_left(directory)
        if left is not None and left < least:
            # Pages of files that were read count as used until somebody needs the room: a group
            # that has loaded a checkpoint sits at its limit and has all of that to give. So they
            # are added, as the kernel's own MemAvailable does. (Asked last: it is the dear part.)
            least = min(least, left + _page_cache(directory))
    return max(0, least)


def cgroup_directories(controller: str, root: str = "/") -> list[str]:
    """Directories that show the calling process's cgroup for a controller, then each parent's.

    Both hierarchies are named where a machine has both: a file that is missing in one of them
    simply says nothing. ``root`` stands for "/", so that a test can offer a tree of its own.
    """
    mounts = _cgroup_mounts(root)
    found: list[str] = []
    for line in (read_text(os.path.join(root, "proc/self/cgroup")) or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")  # version 2 has one hierarchy, without a name
        if names and controller not in names.split(","):
            continue
        hierarchy = controller if names else ""
        shown, point = _mount_that_shows(path, mounts.get(hierarchy, [])) or (
            "/",
            os.path.join("sys/fs/cgroup", hierarchy),
        )
        found += _upwards(os.path.join(root, point), path, shown)
    return found


def read_text(path: str) -> str | None:
    """A whole small file; None where it is missing, unreadable, or its process has gone."""
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fsdecode(file.read())
    except OSError as error:
        if error.errno in (EMFILE, ENFILE, ENOMEM):
            raise
        return None


def read_values(path: str) -> dict[str, int]:
    """The numbers of a file of lines like ``key 12`` or ``key: 12 kB``, as they stand.

    Other lines are passed over; a missing file has none.
    """
    values: dict[str, int] = {}
    for line in (read_text(path) or "").splitlines():
        key, *words = line.split() or [""]
        if words and words[0].isdigit():
            values[key.rstrip(":")] = int(words[0])
    return values


def read_integers(path: str) -> list[int | None]:
    """The numbers of a one-line file, None for each word that is none (``max``); [] without one."""
    words = (read_text(path) or "").split()
    return [int(word) if word.removeprefix("-").isdigit() else None for word in words]


def _kernel_lists_children() -> bool:
    return os.path.exists("/proc/thread-self/children")  # CONFIG_PROC_CHILDREN


def _listed_children(pid: int) -> list[int]:
    """Children by the kernel's own lists: one for each thread of ``pid``, of those it made."""
    found: list[int] = []
    for thread in _numbers_in(f"/proc/{pid}/task"):
        found += map(int, (read_text(f"/proc/{pid}/task/{thread}/children") or "").split())
    return found


def _scan_parents() -> dict[int, list[int]]:
    """Every process's children, from one look at all processes."""
    families: dict[int, list[int]] = {}
    for pid in _numbers_in("/proc"):
        seen = stat(pid)
        if seen is not None:
            families.setdefault(seen.ppid, []).append(pid)
    return families


def _numbers_in(directory: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(directory) if name.isdigit()]
    except OSError as error:
        if error.errno in (EMFILE, ENFILE, ENOMEM):
            raise
        return []


def _memory_left(directory: str) -> int | None:
    """Bytes from one memory cgroup's usage to its limit; None where it has none."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        match (
            read_integers(f"{directory}/{limit_name}"),
            read_integers(f"{directory}/{usage_name}"),
        ):
            case [int(limit)], [int(usage)]:
                return limit - usage
    return None


def _page_cache(directory: str) -> int:
    """Bytes that one memory cgroup and those below it hold as pages of files."""
    found = read_values(f"{directory}/memory.stat")
    prefix = "total_" if "total_inactive_file" in found else ""  # version 1 counts both ways
    return found.get(f"{prefix}inactive_file", 0) + found.get(f"{prefix}active_file", 0)


def _cgroup_mounts(root: str) -> dict[str, list[tuple[str, str]]]:
    """For each controller ("" for version 2): which group a mount shows as its top, and where."""
    mounts: dict[str, list[tuple[str, str]]] = {}
    for line in (read_text(os.path.join(root, "proc/self/mountinfo")) or "").splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) < 5 or len(after) < 3 or after[0] not in ("cgroup", "cgroup2"):
            continue
        for hierarchy in after[2].split(",") if after[0] == "cgroup" else [""]:
            mounts.setdefault(hierarchy, []).append((before[3], before[4].lstrip("/")))
    return mounts


def _mount_that_shows(path: str, mounts: list[tuple[str, str]]) -> tuple[str, str] | None:
    """The first mount under which a cgroup can be seen, else the first; None without any."""
    fitting = [mount for mount in mounts if _is_below(path, mount[0])]
    return next(iter(fitting or mounts), None)


def _is_below(path: str, top: str) -> bool:
    return top == "/" or path == top or path.startswith(f"{top}/")


def _upwards(point: str, path: str, shown: str) -> list[str]:
    """Where a mount at ``point``, whose top is the group ``shown``, has ``path`` and its parents.

    In a container the mount may show the hierarchy only from the container's own group down, while
    /proc/self/cgroup may or may not count from there. Where the two do not meet, the mount point
    is the nearest group that can be seen.
    """
    parts = path.removeprefix(shown).split("/") if _is_below(path, shown) else []
    below = [] if ".." in parts else [part for part in parts if part]
    return [os.path.join(point, *below[:depth]) for depth in range(len(below), -1, -1)]
