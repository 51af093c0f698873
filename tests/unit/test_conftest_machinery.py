"""The tests' own machinery: a test that leaves something fails, and one that hangs is killed."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
PYPROJECT = TESTS.parent / "pyproject.toml"

BEGINNING = """
import mmap, os, pathlib, select, signal, socket, subprocess, sys, tempfile, threading, time
import pytest
from rankwise.testing import _leaks as leaks

leaks.SETTLING = 0.05
kept = []
"""


def run_pytest(folder: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `tests` under copies of the machinery's files, as an ordinary run of pytest."""
    for name in ("conftest.py", "outer_limit.py"):
        shutil.copy(TESTS / name, folder)
    (folder / "test_inner.py").write_text(BEGINNING + textwrap.dedent(tests))
    command = [sys.executable, "-m", "pytest", "-c", str(PYPROJECT), "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", *options, str(folder / "test_inner.py")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=50)


LEAKS = {
    "process": ('kept.append(subprocess.Popen(["sleep", "61"]))', r"process \d+ .*: sleep 61"),
    # It says so when it is past its exec: in the middle of that it has no environment to show.
    "orphan": (
        """
        command = ["sh", "-c", "setsid sh -c 'echo; sleep 62; true' &"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as shell:
            shell.stdout.readline()
        """,
        r"process \d+ .*sleep 62",
    ),
    "zombie": (
        """
        kept.append(subprocess.Popen(["true"]))
        select.select([os.pidfd_open(kept[-1].pid)], [], [])
        """,
        r"process \d+ \(state Z.*: \[true\]",
    ),
    "thread": (
        'threading.Thread(target=time.sleep, args=(3,), name="rankwise-x-io", daemon=True).start()',
        r"thread 'rankwise-x-io'",
    ),
    "socket": ("kept.append(socket.socketpair())", r"descriptor \d+: socket:\[\d+\]"),
    "pipe": ("os.pipe()", r"descriptor \d+: pipe:\[\d+\]"),
    "eventpoll": ("kept.append(select.epoll())", r"descriptor \d+: anon_inode:\[eventpoll\]"),
    "pidfd": ("os.pidfd_open(os.getpid())", r"descriptor \d+: anon_inode:\[pidfd\]"),
    "memory": ('os.memfd_create("rankwise-x")', r"descriptor \d+: /memfd:rankwise-x"),
    "mapping": (
        """
        fd = os.memfd_create("rankwise-y")
        os.ftruncate(fd, 4096)
        kept.append(mmap.mmap(fd, 4096))
        os.close(fd)
        """,
        r"mapped memory \S+ /memfd:rankwise-y",
    ),
    "named-memory": (
        'kept.append(tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="rankwise-test-"))',
        r"  /dev/shm/rankwise-test-",
    ),
    "environment": (
        'os.environ["LEFT_HERE"] = "1"',
        r"environment variable LEFT_HERE: was not set, now '1'",
    ),
    "handler": (
        "signal.signal(signal.SIGUSR2, signal.SIG_IGN)",
        r"handler of SIGUSR2: was .*SIG_DFL.*, now .*SIG_IGN",
    ),
}


def test_a_test_that_leaves_something_behind_fails_and_is_told_what(tmp_path):
    tests = "\n".join(
        f"def test_{name.replace('-', '_')}():\n{textwrap.indent(textwrap.dedent(body), '    ')}"
        for name, (body, _) in LEAKS.items()
    )
    done = run_pytest(tmp_path, tests)
    assert done.returncode == 1, done.stdout
    assert f"{len(LEAKS)} passed, {len(LEAKS)} errors" in done.stdout, done.stdout
    sections = re.split(r"_+ ERROR at teardown of test_(\w+) _+", done.stdout)
    reports = dict(zip(sections[1::2], sections[2::2], strict=True))
    for name, (_, expected) in LEAKS.items():
        assert re.search(expected, reports[name.replace("-", "_")]), (name, done.stdout)


def test_a_test_that_cleans_up_passes(tmp_path):
    done = run_pytest(
        tmp_path,
        """
        leaks.SETTLING = 5

        def test_clean(monkeypatch, capfd):
            monkeypatch.setenv("LEFT_HERE", "1")
            subprocess.run(["true"])
            with socket.socket(), select.epoll():
                pass

        def test_settling():
            threading.Thread(target=time.sleep, args=(0.3,), name="rankwise-late").start()

        def test_a_cycle_is_not_left():
            cycle = [socket.socketpair()]
            cycle.append(cycle)

        @pytest.mark.leaks_allowed("to see what the run's end makes of it")
        def test_allowed():
            kept.append(subprocess.Popen(["sleep", "63"]))
            kept[0].returncode = 0  # or its finalizer complains

        def test_after_it():
            assert kept[0].poll() is not None
        """,
        "-W",
        "ignore::ResourceWarning",
    )
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout, done.stdout


def test_what_a_wider_fixture_leaves_fails_the_run(tmp_path):
    done = run_pytest(
        tmp_path,
        """
        @pytest.fixture(scope="module")
        def child():
            kept.append(subprocess.Popen(["sleep", "64"]))
            return kept[0].pid

        def test_it(child):
            kept[0].returncode = 0
        """,
    )
    assert "1 passed" in done.stdout, done.stdout
    assert re.search(r"have left behind .*\n.*sleep 64", done.stdout), done.stdout
    assert done.returncode == 1


def test_a_test_that_hangs_is_killed_with_all_that_it_started_and_its_stacks_are_shown(tmp_path):
    began = time.monotonic()
    done = run_pytest(
        tmp_path,
        """
        def test_fails():
            assert kept == ["something"]

        @pytest.mark.limit(1.5)
        def test_hangs():
            os.write(1, b"last words")
            code = "import time\\ndef wait_for_ever(): time.sleep(60)\\nwait_for_ever()"
            kept.append(subprocess.Popen([sys.executable, "-c", code], start_new_session=True))
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        """,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert time.monotonic() - began < 30
    report = done.stderr
    assert "test_inner.py::test_hangs has run for 1.5 s" in report, report
    assert "test_inner.py::test_fails failed before that" in report, report
    assert "assert [] == ['something']" in report, report
    assert re.search(r'File ".*test_inner.py", line \d+ in test_hangs', report), report
    assert re.search(r"outer limit: process \d+ .*wait_for_ever", report), report
    assert re.search(r"State:\s+S", report), report
    assert "wchan: " in report, report
    assert "last words" in report, report
    assert "and its 1 descendants" in report, report
    if shutil.which("py-spy", path=str(Path(sys.executable).parent)) and os.geteuid() == 0:
        assert re.search(r"wait_for_ever \(<string>:2\)", report), report
    assert_gone(report)


def test_what_a_killed_pytest_leaves_is_ended_and_the_test_is_named(tmp_path):
    done = run_pytest(
        tmp_path,
        """
        def test_dies():
            kept.append(subprocess.Popen(["sleep", "65"], start_new_session=True))
            print(f"process {kept[0].pid} ", file=sys.__stderr__)
            if os.fork() == 0:
                time.sleep(60)  # holds the watchdog's stdin open
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        "-s",
    )
    # That it has returned says that nobody holds its stderr any more.
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert "has ended in test_inner.py::test_dies" in done.stderr, done.stderr
    assert_gone(done.stderr)


def assert_gone(report: str) -> None:
    pids = [int(pid) for pid in re.findall(r"process (\d+) ", report)]
    assert pids
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([pidfd], [], [], 5)[0], f"process {pid} lives on"
        finally:
            os.close(pidfd)
