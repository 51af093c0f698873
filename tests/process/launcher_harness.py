"""A driver's half of the launcher protocol, with a stand-in worker that runs what it is told.

    Group > Popen(launcher) ==Launch=> launcher > stand-in worker
          > ask(rank, code) ==one line of JSON=> exec ==one line of JSON=> `result`

The stand-in is found because it lies in a package `rankwise` of its own, in which all else is
a link to the real one. Run as a script this file is a driver that can be killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rankwise._messages
from rankwise import _procfs
from rankwise._messages import (
    Exited,
    Finish,
    Gone,
    Launch,
    Output,
    Preloaded,
    Shown,
    Signal,
    Spawned,
    SpawnFailed,
)
from rankwise._preload import LAUNCHER
from rankwise.wire.control import ControlChannel

__all__ = ["BORN", "FAMILY", "SECONDS", "Group", "Start", "ended", "ends", "lives"]

SECONDS = 60.0  # no wait of these tests should take a tenth of it

WORKER = """
import json, os, socket, sys

def main():
    serve_process(*map(int, sys.argv[2:6]), sys.argv[6])

def serve_process(rank, call_fd, status_fd, crash_fd, name, forked=False):
    for fd in (call_fd, status_fd, crash_fd):
        os.set_inheritable(fd, False)
    sock = socket.socket(fileno=call_fd)
    space = dict(os=os, sys=sys, rank=rank, name=name,
                 call_fd=call_fd, status_fd=status_fd, crash_fd=crash_fd)
    with sock.makefile("rb") as lines:
        for line in lines:
            space["result"] = None
            exec(json.loads(line), space)
            sock.sendall(json.dumps(space["result"]).encode() + b"\\n")
"""


def make_root(directory: Path) -> Path:
    """A directory whose package `rankwise` is the real one with the stand-in worker."""
    package = directory / "rankwise"
    package.mkdir(parents=True)
    real = Path(rankwise._messages.__file__).parent
    for path in real.iterdir():
        if path.name not in ("_worker.py", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "_worker.py").write_text(WORKER)
    return directory


def lives(pid: int) -> bool:
    process = _procfs.stat(pid)
    return process is not None and process.state not in "ZX"


def ended(pidfd: int, seconds: float = SECONDS) -> bool:
    """Whether a process ends in time: the kernel's word, and no sleep."""
    return bool(select.select([pidfd], [], [], seconds)[0])


# What a rank may leave behind. Each prints the pid of a process that lives and heeds no SIGTERM.
BORN = """
import os, signal, subprocess, sys
def born(*steps):
    'A descendant: orphaned, in a session or a group of its own, with a bare environment'
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "group" in steps: os.setpgid(0, 0)
        if "session" in steps: os.setsid()
        if "orphan" in steps and os.fork(): os._exit(0)
        os.write(write_end, str(os.getpid()).encode())
        if "bare" in steps: os.execve("/bin/sleep", ["sleep", "1000"], {})
        while True: signal.pause()
    if "orphan" in steps: os.waitpid(pid, 0)
    os.close(write_end)
    found = int(os.read(read_end, 20))
    os.close(read_end)
    return found
"""
KINDS = "born(), born('orphan'), born('session'), born('group'), born('session', 'orphan')"
FAMILY = f"{BORN}\nresult = [{KINDS}]"


class ends:
    """`with ends(*pids):` these processes live at the beginning and have ended soon after."""

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.pidfds = [os.pidfd_open(pid) for pid in pids]

    def __enter__(self) -> ends:
        assert not any(ended(fd, 0) for fd in self.pidfds)
        return self

    def __exit__(self, *exc: object) -> None:
        alive = [pid for pid, fd in zip(self.pids, self.pidfds, strict=True) if not ended(fd)]
        for fd in self.pidfds:
            os.close(fd)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        assert not alive, f"{alive} still ran after {SECONDS} s"


class Group:
    """A launcher with its ranks. What it says is kept in `heard`, what it shows in `shown`."""

    def __init__(
        self,
        root: Path,
        world_size: int = 1,
        *,
        start_method: str = "spawn",
        python: list[str] | None = None,
        environment: dict[str, str] | None = None,
        preload: tuple[str, ...] = (),
        mode: str = "prefix",
        color: bool = False,
        wrapper: list[str] | None = None,
        wait: bool = True,
        stderr: int | None = None,
    ) -> None:
        self.world_size = world_size
        self.heard: list[object] = []
        self.shown = {1: bytearray(), 2: bytearray()}
        self.acknowledge = True
        self.pids: dict[int, int] = {}
        self.ended: dict[int, Exited] = {}
        ours, theirs = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(world_size)]
        self.calls = [pair[0] for pair in pairs]
        far = [pair[1] for pair in pairs]
        status = os.memfd_create("status")
        driver = os.pidfd_open(os.getpid())
        fds = [theirs.fileno(), driver, status, *(sock.fileno() for sock in far)]
        flags = [] if start_method == "forkserver" else ["-I", "-S"]
        self.process = subprocess.Popen(
            [
                *(wrapper or []),
                *(
                    sys.executable,
                    *flags,
                    "-c",
                    LAUNCHER,
                    str(root),
                    "g",
                    str(fds[0]),
                    str(driver),
                    "-1",
                ),
            ],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=fds,
            start_new_session=True,
            env=dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", COMMON="1"),
        )
        self.control = ControlChannel(ours)
        base = {**os.environ, "COMMON": "1", **(environment or {})}
        self.control.send(
            Launch(
                name="g",
                start_method=start_method,
                python=python or [sys.executable],
                root=str(root),
                sys_path=[str(root), *sys.path],
                environments=[{**base, "RANK": str(rank)} for rank in range(world_size)],
                worker_fds=fds[3:],
                status_fd=status,
                preload=preload,
                mode=mode,
                color=color,
            )
        )
        self.control.flush()
        for sock in (*far, theirs):
            sock.close()
        os.close(status)
        os.close(driver)
        if wait:
            self.until(lambda: len(self.pids) == world_size)

    # -- the launcher -------------------------------------------------------------------------

    def send(self, message: object) -> None:
        self.control.send(message)
        assert self.control.flush()

    def signal(self, number: int, *ranks: int) -> None:
        self.send(Signal(ranks, number))

    def hear(self, seconds: float = SECONDS) -> bool:
        """Take what the launcher has to say; False if it says nothing for so long."""
        if not select.select([self.control], [], [], seconds)[0]:
            return False
        for message in self.control.receive():
            if isinstance(message, Output):
                self.shown[message.stream] += message.data
                if self.acknowledge:
                    self.control.send(Shown(len(message.data)))
                    self.control.flush()  # what it does not take leaves with the next
                continue
            self.heard.append(message)
            if isinstance(message, Spawned):
                self.pids[message.rank] = message.pid
            elif isinstance(message, Exited):
                assert message.rank not in self.ended
                assert self.pids[message.rank] == message.pid
                self.ended[message.rank] = message
        return True

    def until(self, happened: object) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():  # type: ignore[operator]
            assert self.hear(max(0.0, deadline - time.monotonic())), f"waited in vain: {self.heard}"

    def exited(self, rank: int = 0) -> Exited:
        self.until(lambda: rank in self.ended)
        return self.ended[rank]

    def all_of(self, kind: type) -> list:  # type: ignore[type-arg]
        return [message for message in self.heard if isinstance(message, kind)]

    def failures(self) -> list[SpawnFailed]:
        self.until(lambda: len(self.all_of(SpawnFailed)) == self.world_size)
        return self.all_of(SpawnFailed)

    def preloaded(self) -> Preloaded:
        self.until(lambda: self.all_of(Preloaded))
        return self.all_of(Preloaded)[0]

    def finish(self) -> list[int]:
        """Finish in order. Returns what is left, which is nothing."""
        self.send(Finish())
        self.until(lambda: self.all_of(Gone))
        assert self.process.wait(SECONDS) == 0
        assert set(self.ended) == set(self.pids)
        return list(self.all_of(Gone)[0].left)

    def close(self) -> None:
        """Whatever the test has left."""
        self.control.close()
        for sock in self.calls:
            sock.close()
        if self.process.poll() is None:
            self.process.wait(SECONDS)

    # -- the ranks ----------------------------------------------------------------------------

    def tell(self, code: str, rank: int = 0) -> None:
        self.calls[rank].sendall(json.dumps(code).encode() + b"\n")

    def answer(self, rank: int = 0) -> object:
        line = b""
        self.calls[rank].settimeout(SECONDS)
        while not line.endswith(b"\n"):
            data = self.calls[rank].recv(1 << 16)
            assert data, "the rank has ended"
            line += data
        return json.loads(line)

    def ask(self, code: str, rank: int = 0) -> object:
        self.tell(code, rank)
        return self.answer(rank)


Start = Callable[..., Group]

# -- fixtures: conftest.py makes them known ------------------------------------------------------


@pytest.fixture(scope="session")
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
        group.close()
        assert not [pid for pid in group.pids.values() if lives(pid)]


# -- a driver that can be killed -------------------------------------------------------------------


def main(root: str, world_size: str, code: str) -> None:
    """A driver: start ranks, run `code` in each, say who they are, then wait to be killed.

    Its forked child holds every descriptor of it, the control socket above all, and lives on.
    """
    group = Group(Path(root), int(world_size), stderr=subprocess.DEVNULL)
    pids = [group.process.pid, *group.pids.values()]
    for rank in range(int(world_size)):
        pids += group.ask(code, rank) or []  # type: ignore[operator]
    holder = os.fork()
    if not holder:
        os.close(1)
        signal.pause()
    print(json.dumps([holder, *pids]), flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
