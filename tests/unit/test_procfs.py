"""Facts about processes, also of those that have gone."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rankwise import _procfs
from rankwise._procfs import (
    children,
    descendants,
    peak_rss,
    stat,
    wchan,
)

GONE = 2**22 + 1  # above the highest pid that Linux gives out


@contextmanager
def program(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python child that has printed "ready" and then waits for the end of its stdin."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint('ready', flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.stdin.close()
        child.kill()
        child.wait()
        child.stdout.close()


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether a state that the kernel reaches by itself is reached in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        os.sched_yield()
    return True


# --- one process ----------------------------------------------------------------------------


def test_stat_of_this_process() -> None:
    seen = stat(os.getpid())
    assert seen is not None
    assert seen.state == "R"
    assert seen.ppid == os.getppid()
    assert seen.pgrp == os.getpgrp()
    assert seen.session == os.getsid(0)
    assert 1 << 20 < seen.rss < 1 << 40
    assert seen.cpu_seconds == pytest.approx(time.process_time(), abs=0.1)
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 < seen.starttime / os.sysconf("SC_CLK_TCK") <= uptime


@pytest.mark.parametrize("comm", ["a b", "a) R 1 1 (b", ") (", "((", "))", "\\n\\t", "\\xff é"])
def test_stat_is_not_misled_by_the_name_of_a_process(comm: str) -> None:
    with program(f"open('/proc/self/comm', 'wb').write('{comm}'.encode())") as child:
        seen = stat(child.pid)
        assert seen is not None
        assert (seen.ppid, seen.pgrp) == (os.getpid(), os.getpgrp())


def test_states_and_session() -> None:
    with program("import os; os.setsid()") as child:
        assert within(5, lambda: (seen := stat(child.pid)) is not None and seen.state == "S")
        seen = stat(child.pid)
        assert seen is not None
        assert (seen.pgrp, seen.session) == (child.pid, child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        assert within(5, lambda: (seen := stat(child.pid)) is not None and seen.state == "T")


def test_cpu_seconds_grow_with_work() -> None:
    with program("import time\nwhile time.process_time() < 0.3: pass") as child:
        seen = stat(child.pid)
        assert seen is not None
        assert 0.25 <= seen.cpu_seconds < 3


def test_a_zombie_has_a_state_and_no_memory() -> None:
    with program("") as child:
        descriptor = os.pidfd_open(child.pid)
        child.kill()
        select.select([descriptor], [], [])  # dead, not reaped
        os.close(descriptor)
        seen = stat(child.pid)
        assert seen is not None
        assert (seen.state, seen.ppid, seen.rss) == ("Z", os.getpid(), 0)
        assert peak_rss(child.pid) == 0
        assert child.pid in children(os.getpid())


def test_peak_rss_remembers_what_was_given_back() -> None:
    with program("x = bytearray(64 << 20); x[::4096] = b'1' * len(x[::4096]); del x") as child:
        seen = stat(child.pid)
        assert seen is not None
        assert peak_rss(child.pid) > 64 << 20
        assert seen.rss < 64 << 20


def test_wchan_names_where_the_kernel_sleeps_or_nothing() -> None:
    assert wchan(os.getpid()) is None  # it runs: it is reading the file
    with program("") as child:
        assert within(5, lambda: (seen := stat(child.pid)) is not None and seen.state == "S")
        name = wchan(child.pid)
        assert name is None or name.replace("_", "").isalnum()


@pytest.fixture(params=["listed", "scanned"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel's own lists of children, where it keeps them, and without."""
    if request.param == "scanned":
        monkeypatch.setattr(_procfs, "_kernel_lists_children", lambda: False)
    elif not _procfs._kernel_lists_children():
        pytest.skip("this kernel keeps no lists of children")


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("pid", [GONE, "reaped"])
def test_a_process_that_has_gone_is_no_error(pid: int | str) -> None:
    if pid == "reaped":
        done = subprocess.Popen([sys.executable, "-S", "-c", ""])
        done.wait()
        pid = done.pid
    assert isinstance(pid, int)
    assert stat(pid) is None
    assert children(pid) == []
    assert descendants(pid) == []
    assert peak_rss(pid) == 0
    assert wchan(pid) is None


# --- families -------------------------------------------------------------------------------

FAMILY = """
import os, sys, threading
def fork(then):
    pid = os.fork()
    if pid == 0:
        then()
        os.read(r, 1)  # until the parent's end closes
        os._exit(0)
    return pid
r, w = os.pipe()
done_r, done_w = os.pipe()
def leaf(): os.close(w); os.write(done_w, b"1")
def middle(): fork(leaf); leaf()
fork(middle)
thread = threading.Thread(target=lambda: (fork(leaf), os.read(r, 1)), daemon=True)
thread.start()
got = 0
while got < 3: got += len(os.read(done_r, 9))
"""


@pytest.mark.usefixtures("both_ways")
def test_children_and_descendants_are_found_whichever_thread_made_them() -> None:
    with program(FAMILY) as child:
        below = children(child.pid)
        assert len(below) == 2  # one of the main thread, one of another
        assert sorted(below) == sorted(set(below))
        (grandchild,) = [pid for parent in below for pid in children(parent)]
        found = descendants(child.pid)
        assert sorted(found) == sorted([*below, grandchild])
        seen = stat(grandchild)
        assert seen is not None
        assert found.index(seen.ppid) < found.index(grandchild)
        assert set(found) < set(descendants(os.getpid()))
        for pid in found:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.usefixtures("both_ways")
def test_looking_while_processes_come_and_go_never_raises() -> None:
    churn = "import os\nprint('on', flush=True)\nwhile True:\n    if os.fork() == 0: os._exit(0)\n"
    churn += "    os.wait()"
    child = subprocess.Popen([sys.executable, "-c", churn], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        child.stdout.readline()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            for pid in [child.pid, *descendants(child.pid)]:
                stat(pid), peak_rss(pid), wchan(pid), children(pid)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_reused_pid_does_not_make_descendants_go_in_circles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = {1: [2, 3], 2: [4], 4: [2, 1], 3: []}
    monkeypatch.setattr(_procfs, "_kernel_lists_children", lambda: True)
    monkeypatch.setattr(_procfs, "_listed_children", lambda pid: family[pid])
    assert descendants(1) == [2, 3, 4]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("look", [stat, children, descendants, peak_rss, wchan])
def test_being_unable_to_look_is_not_mistaken_for_an_absence(
    monkeypatch: pytest.MonkeyPatch, number: int, look: Callable[[int], object]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(OSError) as caught:
        look(os.getpid())
    assert caught.value.errno == number
