"""The real launcher process, driven by a harness: how ranks start, and how everything ends."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import launcher_harness
import pytest
from launcher_harness import BORN, FAMILY, SECONDS, Start, ended, ends, lives

from rankwise import _procfs
from rankwise._messages import Exited, Spawned, SpawnFailed


def status_of(text: str, key: str) -> int:
    """A signal mask in /proc/PID/status."""
    found = re.search(rf"^{key}:\s*([0-9a-f]+)$", text, re.M)
    assert found
    return int(found[1], 16)


# -- starting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_rank_gets_its_own_environment_descriptors_group_limits_and_signals(
    start: Start, start_method: str
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    ignored = (signal.SIGUSR1, signal.SIGCHLD)
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[0] - 1, limits[1]))
    try:
        group = start(3, start_method=start_method, environment={"MINE": "x=y"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)
    assert sorted(group.pids) == [0, 1, 2]
    for spawned in group.all_of(Spawned):
        process = _procfs.stat(spawned.pid)
        assert process is not None
        assert spawned.starttime == process.starttime
        assert (process.pgrp, process.ppid) == (spawned.pid, group.process.pid)
    for rank in range(3):
        seen = group.ask(
            """
import resource, signal
def target(fd):
    try: return os.readlink(f"/proc/self/fd/{fd}")
    except OSError: return None  # the listing itself
fds = {int(fd): target(fd) for fd in os.listdir("/proc/self/fd")}
result = dict(
    fds={fd: where for fd, where in fds.items() if where},
    known=[0, 1, 2, call_fd, status_fd, crash_fd],
    environ=dict(os.environ),
    limits=resource.getrlimit(resource.RLIMIT_NOFILE),
    status=open("/proc/self/status").read(),
    sigint=signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    argv=sys.argv,
)
""",
            rank,
        )
        assert isinstance(seen, dict)
        assert sorted(map(int, seen["fds"])) == sorted(seen["known"])
        assert seen["fds"]["0"] == "/dev/null"
        assert seen["environ"]["MINE"] == "x=y"
        assert seen["environ"]["RANK"] == str(rank)
        assert seen["environ"].get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
        assert seen["limits"] == [limits[0] - 1, limits[1]]
        assert seen["sigint"]
        assert status_of(seen["status"], "SigBlk") == 0
        usual = (1 << signal.SIGPIPE - 1) | (1 << signal.SIGXFSZ - 1)
        # 32 and 33 are glibc's own: its posix_spawn, which make uses, leaves them ignored.
        assert status_of(seen["status"], "SigIgn") & ~(3 << 31) == usual
    assert group.finish() == []


def test_an_interpreter_that_cannot_be_executed_is_named_with_the_reason(start: Start) -> None:
    group = start(2, python=["/no/such/python"], wait=False)
    for failed in group.failures():
        assert "/no/such/python" in failed.reason
        assert "[Errno 2] No such file or directory" in failed.reason
    assert [group.exited(rank).exitcode for rank in (0, 1)] == [127, 127]
    kinds = [type(m) for m in group.heard if getattr(m, "rank", None) == 0]
    assert kinds == [Spawned, SpawnFailed, Exited]
    assert group.finish() == []


def test_a_rank_for_which_no_descriptor_is_left_is_named_with_the_reason(start: Start) -> None:
    limit = ["/bin/sh", "-c", 'ulimit -n 24 && exec "$@"', "sh"]
    group = start(6, wrapper=limit, wait=False)
    group.until(lambda: len(group.all_of(Spawned)) + len(group.all_of(SpawnFailed)) == 6)
    failures = group.all_of(SpawnFailed)
    assert failures
    assert all("Too many open files" in failed.reason for failed in failures)
    assert group.calls[failures[0].rank].recv(1) == b""  # the driver sees the end of its channel
    assert group.finish() == []


def test_a_driver_without_standard_descriptors_can_start_ranks(start: Start) -> None:
    closed = ["/bin/sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh"]
    group = start(2, wrapper=closed)
    for rank in range(2):
        code = "print('here', flush=True); result = os.readlink('/proc/self/fd/0')"
        assert group.ask(code, rank) == "/dev/null"
    group.until(lambda: group.shown[1].count(b"here") == 2)
    assert group.finish() == []


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "exitcode"),
    [
        ("os._exit(3)", 3),
        ("raise SystemExit(4)", 4),
        ("raise RuntimeError('on purpose')", 1),
        ("os.abort()", -signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import signal; signal.raise_signal(40)", -40),
    ],
    ids=["exit-3", "SystemExit", "raise", "abort", "segfault", "kill", "realtime"],
)
def test_a_death_is_reported_with_its_status_last_output_stack_and_memory(
    start: Start, code: str, exitcode: int
) -> None:
    group = start(2)
    group.tell(
        "import faulthandler; faulthandler.enable(crash_fd)\n"
        "buffer = bytearray(50 << 20); buffer[::4096] = bytes(len(buffer[::4096]))\n"
        f"print('last words', end='', flush=True)\n{code}"
    )
    report = group.exited()
    assert report.exitcode == exitcode
    assert report.oom_killed in ((False, None) if exitcode == -9 else (False,))
    assert report.log_tail.startswith("last words")
    assert ("on purpose" in report.log_tail) == ("on purpose" in code)
    assert report.peak_rss is not None
    assert 50 << 20 < report.peak_rss < 1 << 30
    crashed = exitcode in (-signal.SIGABRT, -signal.SIGSEGV)
    assert ("Fatal Python error" in (report.stack or "")) == crashed
    assert group.ask("result = 'alive'", 1) == "alive"
    assert group.finish() == []
    assert group.ended[1].exitcode == -signal.SIGKILL
    assert group.ended[1].oom_killed is False


def test_an_orderly_end_is_status_0_and_the_launcher_stays_until_finish(start: Start) -> None:
    group = start(2)
    for sock in group.calls:
        sock.shutdown(1)
    assert [group.exited(rank).exitcode for rank in (0, 1)] == [0, 0]
    assert group.process.poll() is None
    assert group.finish() == []


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_finish_that_comes_with_the_launch_is_heard(start: Start, start_method: str) -> None:
    """A driver whose start was interrupted says both before the launcher has begun to listen."""
    group = start(2, start_method=start_method, wait=False)
    assert group.finish() == []


def test_a_signal_goes_to_the_ranks_that_are_named_and_to_their_children(start: Start) -> None:
    group = start(3)
    (child,) = group.ask(f"{BORN}\nresult = [born()]", 1)  # type: ignore[misc]
    with ends(group.pids[1], child):  # the child ignores SIGTERM; it goes with its rank
        group.signal(signal.SIGTERM, 1)
        assert group.exited(1).exitcode == -signal.SIGTERM
    assert group.ask("result = 1", 0) == group.ask("result = 1", 2) == 1
    group.signal(signal.SIGKILL, 0, 1)
    assert group.exited(0).exitcode == -signal.SIGKILL
    assert group.exited(0).oom_killed is False
    group.signal(12345, 2)
    assert group.ask("result = 1", 2) == 1
    assert group.finish() == []


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(os.getpid(), 19)",
        "import ctypes; ctypes.PyDLL(None).sleep(30)",
        "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; signal.pause()",
        "os.close(1); os.close(2); import signal; signal.pause()",
        "os.setpgid(0, os.getppid()); import signal; signal.pause()",
    ],
    ids=["stopped", "holds-the-gil", "ignores-signals", "closed-1-and-2", "left-its-group"],
)
def test_finish_kills_a_rank_whatever_it_does(start: Start, code: str) -> None:
    group = start()
    group.ask("")
    group.tell(code)
    with ends(group.pids[0]):
        assert group.finish() == []
    assert group.exited().exitcode == -signal.SIGKILL


def test_after_gone_no_descendant_is_left(start: Start) -> None:
    group = start(2)
    family = [pid for rank in range(2) for pid in group.ask(FAMILY, rank)]  # type: ignore[attr-defined]
    with ends(*family) as watched:
        assert group.finish() == []
        assert all(ended(fd, 0) for fd in watched.pidfds)  # before Gone, not soon after it


def test_a_dead_rank_takes_its_own_descendants_and_no_others(start: Start) -> None:
    group = start(2)
    family = group.ask(FAMILY, 0)
    others = group.ask(FAMILY + "\nresult.append(born('orphan', 'bare'))", 1)
    # A fork keeps the environment of the rank, so an orphan in a session of its own is known.
    with ends(*family):  # type: ignore[misc]
        group.tell("os._exit(1)", 0)
        group.exited(0)
    for pid in others:  # type: ignore[attr-defined]
        assert lives(pid)
    assert group.finish() == []


def test_descendants_that_fork_while_they_are_killed_are_caught(start: Start) -> None:
    group = start()
    group.ask(
        "import time\n"
        "for _ in range(20):\n"
        "    if not os.fork():\n"
        "        os.setsid()\n"
        "        while not os.fork(): time.sleep(0.001)\n"
        "        os._exit(0)\n"
    )
    assert group.finish() == []
    assert _procfs.children(os.getpid()) == []


# -- the driver's end, the launcher's end --------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped-ranks"])
def test_a_killed_driver_takes_everything_though_its_forked_child_holds_the_socket(
    root: Path, stopped: bool
) -> None:
    paths = os.pathsep.join(sys.path)
    driver = subprocess.Popen(
        [sys.executable, launcher_harness.__file__, str(root), "4", FAMILY],
        stdout=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=paths),
    )
    assert driver.stdout
    holder, *pids = json.loads(driver.stdout.readline())
    with ends(holder):
        with ends(driver.pid, *pids):
            if stopped:
                for pid in pids[1:]:
                    os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            driver.kill()
        assert time.monotonic() - began < 10.0
        os.kill(holder, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()


def test_the_ranks_of_a_killed_launcher_are_killed_by_the_kernel(start: Start) -> None:
    group = start(3)
    group.tell("import ctypes; ctypes.PyDLL(None).sleep(30)", 1)
    with ends(*group.pids.values()):
        group.process.kill()
    with pytest.raises(EOFError):
        while True:
            group.hear()


def test_a_driver_that_closes_its_socket_ends_everything(start: Start) -> None:
    group = start(2)
    with ends(group.process.pid, *group.pids.values(), *group.ask(FAMILY)):  # type: ignore[misc]
        group.control.close()


def test_a_bad_frame_ends_everything_and_is_said_on_stderr(start: Start) -> None:
    group = start(2, stderr=subprocess.PIPE)
    with ends(*group.pids.values(), *group.ask(FAMILY)):  # type: ignore[misc]
        group.control._sock.send(b"\xff" * 8)
        assert group.process.wait(SECONDS) == 1
    assert group.process.stderr
    with group.process.stderr as stderr:
        assert b"ValueError: bad frame on the control channel" in stderr.read()


def test_64_ranks_are_gone_within_moments_of_their_driver(start: Start, tmp_path: Path) -> None:
    light = tmp_path / "light"
    light.write_text("#!/bin/sh\nexec sleep 1000\n")
    light.chmod(0o755)
    group = start(64, python=[str(light)])
    with ends(group.process.pid, *group.pids.values()):
        began = time.monotonic()
        group.control.close()
    assert time.monotonic() - began < 10.0
