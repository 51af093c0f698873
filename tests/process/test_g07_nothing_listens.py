"""Guarantee 7: nothing listens, and nothing of a group has a name that another could find."""

from __future__ import annotations

import os
import re

import pytest

from rankwise import WorkerGroup

LISTEN = "0A"  # the state of a listening TCP socket in /proc/net/tcp
KINDS = re.compile(
    r"socket:\[\d+\]|pipe:\[\d+\]|anon_inode:\[?[a-z]+\]?|/dev/null|/memfd:rankwise.* \(deleted\)"
)


class Worker:
    def echo(self, value):
        return value

    def parent(self):
        return os.getppid()


def sockets_of(pid):
    """The inodes of the sockets that process `pid` holds."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def listening():
    """The inodes of TCP sockets that listen, and of UNIX sockets that listen or have a name."""
    found = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        found |= {row[9] for row in rows if row[3] == LISTEN}
    with open("/proc/net/unix") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    # Flag 0x10000: it accepts connections. An eighth word is its name.
    return found | {row[6] for row in rows if int(row[3], 16) & 0x10000 or len(row) > 7}


def files(pid):
    """What process `pid` has open, but for its standard descriptors, which are the user's."""
    fds = [fd for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2]
    return {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in fds}


def names():
    """The named things that processes could share: POSIX memory and semaphores, System V."""
    found = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    found |= {f"/dev/mqueue/{name}" for name in _listed("/dev/mqueue")}
    for kind in ("shm", "sem", "msg"):
        with open(f"/proc/sysvipc/{kind}") as file:
            found |= {f"{kind} {line.split()[1]}" for line in file.readlines()[1:]}
    return found


def _listed(path):
    try:
        return os.listdir(path)
    except OSError:
        return []


@pytest.fixture(params=["spawn", "forkserver"])
def group(request, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with WorkerGroup(Worker, 2, start_method=request.param) as made:
        made.call("echo", bytes(1 << 20))
        yield made
    assert os.listdir(tmp_path) == []


def test_no_process_of_a_group_listens_on_anything(group):
    before = sockets_of(os.getpid())
    theirs = {pid: sockets_of(pid) for pid in {*group.pids, *group.call("parent")}}
    assert len(theirs) == 3, "two workers and their launcher"
    assert all(theirs.values()), "each has at least the socket that it is spoken to by"
    heard = listening()
    for held in theirs.values():
        assert not held & heard
    with WorkerGroup(Worker, 1) as second:
        second.call("echo", 1)
        assert not (sockets_of(os.getpid()) - before) & listening()


def test_nothing_of_a_group_has_a_name(group, tmp_path):
    before = names()
    with WorkerGroup(Worker, 2) as second:
        second.call("echo", bytes(4 << 20))
        assert names() == before
        assert os.listdir(tmp_path) == []
        for pid in {*second.pids, *second.call("parent")}:
            strange = {target for target in files(pid) if not KINDS.fullmatch(target)}
            assert not strange, f"process {pid} holds something that has a name"
