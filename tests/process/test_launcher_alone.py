"""The real launcher process, driven by a harness, with a stand-in worker that runs what it is told."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import launcher_harness
import pytest
from launcher_harness import SECONDS, Group, ended, ends, make_root

from rankwise import _procfs
from rankwise._messages import Exited, Finish, Gone, Shown, Spawned, SpawnFailed

Start = Callable[..., Group]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Starts groups; at the end none of their processes is left."""
    groups: list[Group] = []

    def start(*args: object, **kwargs: object) -> Group:
        groups.append(Group(root, *args, **kwargs))  # type: ignore[arg-type]
        return groups[-1]

    yield start
    for group in groups:
        pids = [pid for pid in group.pids.values() if _procfs.stat(pid)]
        group.close()
        assert [pid for pid in pids if (s := _procfs.stat(pid)) and s.state not in "ZX"] == []


# What a rank may leave behind. Each prints the pid of a process that lives and heeds no SIGTERM.
BORN = """
import os, signal, subprocess, sys
def born(*steps):
    'A descendant: a child of a child where it says "orphan", of its own session where "session"'
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "group" in steps: os.setpgid(0, 0)
        if "session" in steps: os.setsid()
        if "orphan" in steps and os.fork(): os._exit(0)
        os.write(write_end, str(os.getpid()).encode())
        while True: signal.pause()
    if "orphan" in steps: os.waitpid(pid, 0)
    os.close(write_end)
    found = int(os.read(read_end, 20))
    os.close(read_end)
    return found
"""
KINDS = "born(), born('orphan'), born('session'), born('group'), born('session', 'orphan')"
FAMILY = f"{BORN}\nresult = [{KINDS}]"


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
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    try:
        group = start(3, start_method=start_method, environment={"MINE": "x=y"})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGCHLD, before[1])
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
        assert seen["limits"][0] == soft
        assert seen["sigint"]
        assert status_of(seen["status"], "SigBlk") == 0
        usual = (1 << signal.SIGPIPE - 1) | (1 << signal.SIGXFSZ - 1)
        assert status_of(seen["status"], "SigIgn") == usual
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
        assert group.ask("print('here', flush=True); result = os.readlink('/proc/self/fd/1')", rank)
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
    assert not ended(os.pidfd_open(group.process.pid), 0)
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
    others = group.ask(FAMILY, 1)
    # A fork keeps the environment of the rank, so an orphan in a session of its own is known.
    with ends(*family):  # type: ignore[misc]
        group.tell("os._exit(1)", 0)
        group.exited(0)
    for pid in others:  # type: ignore[attr-defined]
        assert (process := _procfs.stat(pid)) and process.state != "Z"
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
        assert time.monotonic() - began < 2.0
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
    assert time.monotonic() - began < 2.0


# -- output -----------------------------------------------------------------------------------


def test_lines_carry_a_prefix_and_partial_ones_wait_for_their_end(start: Start) -> None:
    group = start(2)
    group.ask("os.write(1, b'one\\ntwo'); os.write(2, b'err\\r\\n')", 0)
    group.ask("os.write(1, b'half')", 1)
    zero = b"(g rank=0 pid=%d) " % group.pids[0]
    one = b"(g rank=1 pid=%d) " % group.pids[1]
    group.until(lambda: b"one" in group.shown[1] and b"err" in group.shown[2])
    assert bytes(group.shown[1]) == zero + b"one\n"
    assert bytes(group.shown[2]) == zero + b"err\n"
    group.tell("os.write(1, b' -- and dead'); os._exit(1)", 0)
    assert group.exited(0).log_tail == "one\ntwoerr\r\n -- and dead"
    assert group.finish() == []
    lines = group.shown[1].splitlines(keepends=True)
    assert lines == [zero + b"one\n", zero + b"two -- and dead\n", one + b"half\n"]


def test_color_marks_the_prefix_only(start: Start) -> None:
    group = start(1, color=True)
    group.ask("os.write(1, b'text\\n')")
    assert group.finish() == []
    pid = group.pids[0]
    assert group.shown[1] == b"\x1b[36m(g rank=0 pid=%d)\x1b[0m text\n" % pid


def test_inherit_passes_bytes_through_and_off_shows_none(start: Start) -> None:
    written = b"\r 10%\r\nhalf"
    for mode, shown in (("inherit", written), ("off", b"")):
        group = start(1, mode=mode)
        group.ask(f"os.write(1, {written!r})")
        assert group.finish() == []
        assert bytes(group.shown[1]) == shown
        assert group.ended[0].log_tail == written.decode()


def test_a_line_of_10_mb_arrives_whole_and_memory_of_the_tail_is_bounded(start: Start) -> None:
    group = start()
    group.tell("out = b'x' * (10 << 20) + b'end\\n'\nwhile out: out = out[os.write(1, out):]")
    group.until(lambda: group.shown[1].endswith(b"end\n"))
    line = bytes(group.shown[1])
    assert line.removeprefix(b"(g rank=0 pid=%d) " % group.pids[0]) == b"x" * (10 << 20) + b"end\n"
    assert group.answer() is None
    assert group.finish() == []
    assert len(group.ended[0].log_tail) == 1 << 16


def test_a_flood_that_nobody_shows_is_dropped_counted_and_told(start: Start) -> None:
    group = start(2)
    group.acknowledge = False
    group.ask("result = 1", 1)
    before = _procfs.peak_rss(group.process.pid)
    lines = 1_000_000
    group.tell(
        "out = b''.join(b'%07d' % i + b'x' * 92 + b'\\n' for i in range(1000))\n"
        f"for _ in range({lines} // 1000):\n"
        "    left = out\n"
        "    while left: left = left[os.write(1, left):]\n"
    )
    while not select.select([group.calls[0]], [], [], 0)[0]:
        group.hear(0.05)
    group.answer()  # the rank was never made to wait for us
    while group.hear(0.2):
        pass
    shown = group.shown[1].count(b"\n")
    assert len(group.shown[1]) <= 16 << 20
    assert len(group.shown[1]) > 15 << 20
    assert group.shown[1].endswith(b"\n")
    assert _procfs.peak_rss(group.process.pid) - before < 64 << 20
    assert group.shown[2] == b""
    group.acknowledge = True
    group.send(Shown(len(group.shown[1])))
    group.until(lambda: b"dropped" in group.shown[2])
    told = b"(g) %d lines were dropped: the reader of this output is too slow\n" % (lines - shown)
    assert bytes(group.shown[2]) == told
    group.ask("print('again', flush=True)", 1)
    group.until(lambda: b"again" in group.shown[1])
    assert group.finish() == []
    assert bytes(group.shown[2]) == told


def test_what_was_dropped_is_told_at_the_end_at_the_latest(start: Start) -> None:
    group = start(1)
    group.acknowledge = False
    group.ask("for _ in range(20): os.write(1, b'y' * (1 << 20) + b'\\n')")
    assert group.finish() == []
    dropped = 20 - group.shown[1].count(b"\n")
    assert 1 < dropped < 20
    assert group.shown[2].startswith(b"(g) %d lines were dropped" % dropped)


def test_a_death_overtakes_output_that_the_driver_has_not_read(start: Start) -> None:
    group = start(2)
    group.ask("for _ in range(8): os.write(1, b'z' * (1 << 20) + b'\\n')")
    group.tell("os._exit(7)", 1)
    # The answer shows that all has been read by the launcher; what follows is read slowly.
    assert group.exited(1).exitcode == 7
    assert group.shown[1].count(b"\n") < 8
    assert group.finish() == []
    assert group.shown[1].count(b"\n") == 8


def test_a_descendant_that_holds_the_pipe_does_not_delay_the_report(start: Start) -> None:
    group = start(1)
    # In a session of its own and with another RANK: it is taken for a living rank's and is spared.
    group.ask(
        "import subprocess\n"
        "env = dict(os.environ, RANK='1')\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True, env=env)\n"
        "os.write(1, b'half a line')"
    )
    group.tell("os._exit(0)")
    assert group.exited().log_tail == "half a line"
    assert group.finish() == []
    assert group.shown[1].endswith(b"half a line\n")


# -- forked ranks -----------------------------------------------------------------------------

CLEAN = """
import os, random
pid = os.getpid()
os.environ["SET_BY_IMPORT"] = "1"
os.environ["COMMON"] = "2"
print("imported")
"""
THREAD = """
import os, threading
os.environ["SET_BY_IMPORT"] = "1"
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


@pytest.fixture
def module(root: Path) -> Iterator[Callable[[str], str]]:
    made: list[Path] = []

    def module(code: str) -> str:
        name = f"preloaded_{time.monotonic_ns()}"
        made.append(root / f"{name}.py")
        made[-1].write_text(code)
        return name

    yield module
    for path in made:
        path.unlink()


def test_forked_ranks_share_what_was_imported_once(
    start: Start, module: Callable[[str], str]
) -> None:
    name = module(CLEAN)
    group = start(3, start_method="forkserver", preload=(name,), environment={"OWN": "1"})
    assert group.preloaded().refused is None
    asked = f"""
import random
result = [sys.modules[{name!r}].pid, os.environ["COMMON"], os.environ["OWN"],
          os.environ["SET_BY_IMPORT"], os.environ.get("OMP_NUM_THREADS"),
          os.popen("echo $RANK").read(), open("/proc/self/comm").read(), random.random()]
"""
    seen = [group.ask(asked, rank) for rank in range(3)]
    for rank, answer in enumerate(seen):
        assert answer[:-1] == [  # type: ignore[index]
            group.process.pid, "2", "1", "1", os.environ.get("OMP_NUM_THREADS"),
            f"{rank}\n", f"g:{rank}\n",
        ]  # fmt: skip
    assert len({answer[-1] for answer in seen}) == 3  # type: ignore[index]
    assert group.shown[1] == b""  # what the launcher had buffered is not printed by each rank
    for sock in group.calls:
        sock.shutdown(1)
    assert [group.exited(rank).exitcode for rank in range(3)] == [0, 0, 0]
    assert group.finish() == []


def test_the_end_of_a_forked_rank_is_an_ordinary_end_of_an_interpreter(
    start: Start, module: Callable[[str], str]
) -> None:
    name = module("import atexit, os\natexit.register(lambda: os.write(1, b'bye\\n'))\n")
    group = start(2, start_method="forkserver", preload=(name,))
    group.ask("sys.stdout.write('buffered\\n')", 0)
    group.calls[0].shutdown(1)
    assert group.exited(0).exitcode == 0
    assert sorted(group.exited(0).log_tail.split()) == ["buffered", "bye"]
    assert group.finish() == []
    assert b"rank=1" not in group.shown[1]  # nor by the launcher itself, which ends with os._exit


def test_a_launcher_that_is_not_clean_spawns_and_says_why(
    start: Start, module: Callable[[str], str]
) -> None:
    name = module(THREAD)
    group = start(2, start_method="forkserver", preload=(name,))
    assert "thread runs" in (group.preloaded().refused or "")
    for rank in range(2):
        asked = f"result = [{name!r} in sys.modules, os.environ.get('SET_BY_IMPORT')]"
        assert group.ask(asked, rank) == [False, None]
    assert os.listdir(f"/proc/{group.process.pid}/task") == [str(group.process.pid)]
    family = group.ask(FAMILY)
    with ends(*family):  # type: ignore[misc]
        assert group.finish() == []


@pytest.mark.parametrize("code", ["import no_such_module", "raise SystemExit(3)", "1/0"])
def test_a_preload_that_fails_fails_every_rank_with_its_traceback(
    start: Start, module: Callable[[str], str], code: str
) -> None:
    name = module(code)
    group = start(2, start_method="forkserver", preload=(name,), wait=False)
    for failed in group.failures():
        assert failed.reason.startswith(f"preload: importing {name!r} failed\n")
        assert f"{name}.py" in failed.reason
        assert code in failed.reason
    assert group.all_of(Spawned) == []
    assert [sock.recv(1) for sock in group.calls] == [b"", b""]
    assert group.finish() == []


@pytest.mark.parametrize("word", ["finish", "close"])
@pytest.mark.parametrize("holds", ["import time; time.sleep", "import ctypes; ctypes.PyDLL(None).sleep"])
def test_a_preload_that_never_returns_ends_when_the_driver_says_so(
    start: Start, module: Callable[[str], str], word: str, holds: str, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    name = module(
        "import os, subprocess\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        f"with open({str(fifo)!r}, 'w') as fifo: print(child.pid, file=fifo)\n"
        f"{holds}(1000)"
    )
    group = start(2, start_method="forkserver", preload=(name,), wait=False)
    child = int(fifo.read_text())
    with ends(group.process.pid, child):
        if word == "finish":
            group.send(Finish())
        else:
            group.control.close()
        group.process.wait(SECONDS)
    assert group.all_of(Gone) == []
