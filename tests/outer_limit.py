"""The outer limit of each test, kept by a process of its own, so that a hang ends with evidence.

    pytest (conftest.py)  ==a line a test==>  watchdog
                          <==STACKS========   the limit has passed: pytest's own stacks ...
                          <==SIGKILL=======   ... and when it has told of every child, the end

A limit inside pytest cannot be trusted here: what hangs may be its main thread in C code, or a lock
that a timer's thread needs too. The watchdog needs nothing of pytest but its pid. It leaves when
pytest does, and tells then which test was running, and ends what it left.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # isolated: this very rankwise is not on the path
    sys.path.insert(0, sys.argv[2])

import rankwise
from rankwise.testing._processes import Family, Process, end

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pytest

# Above every wait that a test itself bounds, so that those fail, with words, before this one kills
# the run; and above what three times the usual time makes of the longest.
DEFAULT = 180.0

ROOT = str(Path(rankwise.__file__).parent.parent)

# Not SIGUSR1: a test may want that one for itself. rankwise asks its workers by SIGRTMAX - 2.
STACKS = signal.SIGRTMIN + 7

# What the report may take in all, and what it shows of captured output.
REPORT_TIME = 30.0
CAPTURED = 8192


class OuterLimit:
    """pytest's end: tells the watchdog which test runs, and for how long it may."""

    def __init__(self, stderr: int) -> None:
        """`stderr`: a descriptor of the real one, not of what pytest captures."""
        self._stderr = stderr
        faulthandler.register(STACKS, file=stderr, all_threads=True)
        # A session of its own: ^C is for pytest. It forks and is then nobody's child: a test may
        # well count pytest's children.
        with subprocess.Popen(
            [sys.executable, "-I", __file__, str(os.getpid()), ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        ) as parent:
            assert parent.stdin is not None and parent.stdout is not None
            watchdog = int(parent.stdout.read())
            self._stdin = os.dup(parent.stdin.fileno())
        self._pidfd = os.pidfd_open(watchdog)
        pipe = os.readlink(f"/proc/self/fd/{self._stdin}")
        self.family = Family(os.getpid(), frozenset({watchdog}), pipe)

    def start(self, test: str, seconds: float) -> None:
        self._say({"test": test, "seconds": seconds})

    def stop(self) -> None:
        self._say({"test": None})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """pytest tells of failures when it ends: a killed one would take them along."""
        if report.failed:
            self._say({"failed": report.nodeid[-500:], "why": report.longreprtext[-1500:]})

    def close(self) -> None:
        os.close(self._stdin)
        select.select([self._pidfd], [], [], 5.0)
        os.close(self._pidfd)
        faulthandler.unregister(STACKS)
        os.close(self._stderr)

    def _say(self, message: object) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._stdin, line) :]


# --- the watchdog's own process -------------------------------------------------------------------


def watch(root: int) -> None:
    """Keep the limits that come in on stdin, until process `root`, a pytest, ends or says so."""
    try:
        pidfd = os.pidfd_open(root)
    except ProcessLookupError:
        return
    family = Family(root, frozenset({os.getpid()}), os.readlink("/proc/self/fd/0"))
    poll = select.poll()
    # Two ways to hear of the end: a child that a test forked may hold our stdin open.
    poll.register(0, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    test, seconds, until, rest = "", 0.0, None, b""
    failed: list[dict[str, str]] = []
    while True:
        patience = None if until is None else max(0.0, until - time.monotonic()) * 1000
        ready = [fd for fd, _ in poll.poll(patience)]
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "failed" in message:
                    failed.append(message)
                elif message["test"] is None:
                    until = None
                else:
                    test, seconds = message["test"], message["seconds"]
                    until = time.monotonic() + seconds
        elif pidfd in ready:
            if until is not None:
                tell(failed)
                say(f"pytest (pid {root}) has ended in {test}; what it left is killed now")
                kill(family, family.members())
            return
        elif until is not None and time.monotonic() >= until:
            tell(failed)
            say(f"{test} has run for {seconds:g} s, which is its outer limit")
            children = family.members()
            try:
                report(root, children)
            finally:
                say(f"killing pytest (pid {root}) and its {len(children)} descendants")
                kill(family, children)
            return


def tell(failed: list[dict[str, str]]) -> None:
    """What has failed before, as far as one needs it to know where to look."""
    for one in failed:
        say(f"{one['failed']} failed before that:")
        show(one["why"].splitlines()[-20:])


def report(root: int, children: list[Process]) -> None:
    """What pytest and its descendants are doing, and what the test has printed."""
    until = time.monotonic() + REPORT_TIME
    say(f"the stacks of pytest (pid {root})")
    os.kill(root, STACKS)
    time.sleep(0.5)  # its handler answers to nobody
    if not children:
        say("pytest has no descendants")
    for child in children:
        say(str(child))
        if not child.lives():
            continue
        status = child.read("status").splitlines()
        wanted = ("State:", "PPid:", "Threads:", "VmRSS:", "SigBlk:", "SigIgn:", "SigCgt:")
        show(line for line in status if line.startswith(wanted))
        for name in ("wchan", "syscall", "stack"):
            show(f"{name}: {line}" for line in child.read(name).splitlines())
        if time.monotonic() < until:
            show(python_stacks(child))
    for fd, name in ((1, "stdout"), (2, "stderr")):
        text = captured(root, fd)
        if text:
            say(f"the last of the {name} that pytest has captured")
            show(text.splitlines())


def python_stacks(process: Process) -> list[str]:
    """By py-spy, which asks nothing of `process`, where it is installed and may look."""
    spy = Path(sys.executable).with_name("py-spy")
    command = str(spy) if spy.exists() else shutil.which("py-spy")
    if command is None or "python" not in os.path.basename(_link(f"/proc/{process.pid}/exe")):
        return []
    try:
        done = subprocess.run(
            [command, "dump", "--pid", str(process.pid)],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except subprocess.TimeoutExpired:
        return ["py-spy did not answer in 5 s"]
    return (done.stdout or done.stderr).splitlines()


def captured(pid: int, fd: int) -> str:
    """The tail of what `pid` has written to its descriptor `fd`, if that is a file."""
    path = f"/proc/{pid}/fd/{fd}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - CAPTURED))
            return file.read(CAPTURED).decode(errors="replace")
    except OSError:
        return ""


def kill(family: Family, children: list[Process]) -> None:
    """SIGKILL pytest, `children`, and whatever these have started meanwhile."""
    try:
        os.kill(family.root, signal.SIGKILL)
    except ProcessLookupError:
        pass
    until = time.monotonic() + 5.0
    while children and time.monotonic() < until:
        end(children)
        time.sleep(0.02)
        # Orphans by now, known by their mark; a zombie, their new parent's affair, has lost it.
        children = family.members()


def say(text: str) -> None:
    print(f"=== outer limit: {text}", file=sys.stderr, flush=True)


def show(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"    {line}", file=sys.stderr)
    sys.stderr.flush()


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


if __name__ == "__main__":
    if own := os.fork():
        print(own, flush=True)
        os._exit(0)
    os.dup2(2, 1)  # nobody reads our stdout after that line
    watch(int(sys.argv[1]))
