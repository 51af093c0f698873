"""What the launcher's reaper says of a SIGKILL: whose it was, as far as the kernel tells."""

from __future__ import annotations

import os
import signal

import pytest

from rankwise import _procfs
from rankwise._messages import Exited
from rankwise._reaper import Reaper
from rankwise._spawn import Child


class OomCount:
    """A cgroup's oom_kill count."""

    def __init__(self, count: int | None) -> None:
        self.count = count


def killed(reaper: Reaper, rank: int, *, by_us: bool) -> Exited:
    """The report of a rank that ended by SIGKILL."""
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        while True:
            signal.pause()
    os.setpgid(pid, pid)
    child = Child("g", rank, raw=True)
    child.pid = pid
    reaper.alive[pid] = child
    if by_us:
        reaper.signal((rank,), signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    reports: list[Exited] = []
    reaper._ended = lambda child, report: reports.append(report)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    while reaper.reap() and not reports:
        pass
    (report,) = reports
    assert (report.rank, report.pid, report.exitcode) == (rank, pid, -signal.SIGKILL)
    return report


@pytest.fixture
def oom(monkeypatch: pytest.MonkeyPatch) -> OomCount:
    oom = OomCount(5)
    monkeypatch.setattr(_procfs.OomKills, "count", lambda self: oom.count)
    return oom


def make_reaper() -> Reaper:
    return Reaper(lambda child: None, lambda child, report: None)


def test_each_of_the_kernels_kills_explains_one_death(oom: OomCount) -> None:
    reaper = make_reaper()
    assert killed(reaper, 0, by_us=False).oom_killed is False
    oom.count = 7
    assert killed(reaper, 1, by_us=False).oom_killed is True
    assert killed(reaper, 2, by_us=False).oom_killed is True
    assert killed(reaper, 3, by_us=False).oom_killed is False


def test_a_kill_of_our_own_is_not_the_kernels(oom: OomCount) -> None:
    reaper = make_reaper()
    assert killed(reaper, 0, by_us=True).oom_killed is False
    oom.count = 6
    assert killed(reaper, 1, by_us=True).oom_killed is None  # one of the two was first


def test_where_no_cgroup_tells_nothing_is_claimed(oom: OomCount) -> None:
    oom.count = None
    reaper = make_reaper()
    assert killed(reaper, 0, by_us=False).oom_killed is None
    assert killed(reaper, 1, by_us=True).oom_killed is False
