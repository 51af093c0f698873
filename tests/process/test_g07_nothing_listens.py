"""Guarantee 7: nothing listens and nothing has a name, in driver, launcher and workers.

    holdings(pid)   /proc/PID/fd and /proc/PID/maps, and of its sockets what /proc/net says

A driver of its own has its working, home and temporary directories empty; they stay as they are.
"""

from __future__ import annotations

import os
import re
import socket

import pytest
from drivers import Script
from g07_nothing_listens_ranks import Opener, Sockets, rows

from rankwise import WorkerGroup
from rankwise._procfs import descendants

# What a process of ours may have open. A memfd has no name that another process could open.
ANONYMOUS = re.compile(r"socket:|pipe:|anon_inode:|/memfd:rankwise|/dev/null$|/proc/|pidfd:")


WORKER = """
class Worker:
    def echo(self, value): return value
    def run(self, code):
        exec(code, self.__dict__)
        return self.__dict__.get("result")
"""


def open_files(pid):
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
    return found


def holdings(pid, known=frozenset()):
    """What the process has that listens, or that others could find by a name. `known`: targets
    that it had from elsewhere."""
    sockets = Sockets()
    found = []
    for fd, target in open_files(pid).items():
        inode = target.removeprefix("socket:[").rstrip("]")
        if target in known:
            continue
        if inode in sockets.internet:
            found.append(f"descriptor {fd}: {sockets.internet[inode]}")
        elif inode in sockets.unix:
            found.append(f"descriptor {fd}: {sockets.unix[inode]}")
        elif not ANONYMOUS.match(target):
            found.append(f"descriptor {fd}: {target}")
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            path = fields[5].strip() if len(fields) > 5 else ""
            # Anonymous shared memory reads "/dev/zero (deleted)". glibc maps a cache, read-only.
            shared = fields[1][1] == "w" and fields[1][3] == "s"
            if shared and not re.match(r"/memfd:rankwise|/dev/zero |anon_inode", path):
                found.append(f"mapping {path}")
    return found


def system_v():
    """Segments, semaphores and queues of System V that belong to this user."""
    return [
        (kind, fields[1])
        for kind in ("shm", "sem", "msg")
        for fields in rows(f"/proc/sysvipc/{kind}")
        if str(os.getuid()) in fields
    ]


def queues():
    return sorted(os.listdir("/dev/mqueue")) if os.path.isdir("/dev/mqueue") else []


@pytest.fixture
def folders(tmp_path):
    """Empty ones, and when each was last changed: a name that came and went has changed it too."""
    made = {name: tmp_path / name for name in ("cwd", "HOME", "TMPDIR", "XDG_RUNTIME_DIR")}
    for path in made.values():
        path.mkdir()
        os.utime(path, ns=(0, 0))
    yield made
    for name, path in made.items():
        assert list(path.iterdir()) == []
        assert path.stat().st_mtime_ns == 0, f"something was made and removed in {name}"


def driver(folders, code, **options):
    places = {name: str(path) for name, path in folders.items() if name != "cwd"}
    return Script(code, cwd=folders["cwd"], env={**os.environ, **places}, **options)


GROUP = """{worker}
with WorkerGroup(Worker, 2, **{options!r}) as group:
    assert group.call("echo", bytes(1_000_000)) == [bytes(1_000_000)] * 2  # large ones too
    group.submit("echo", 1).add_done_callback(lambda future: None)
    print("a line of the driver", file=sys.stderr)
    group.call("run", "import sys; print('a line of a worker', file=sys.stderr)")
    say(pids=group.pids)
    hear()
say(closed=True)
"""


@pytest.mark.parametrize(
    ("start_method", "logs"),
    [("spawn", "prefix"), ("spawn", "off"), ("forkserver", "prefix"), ("forkserver", "inherit")],
)
def test_no_process_listens_or_holds_anything_that_has_a_name(folders, start_method, logs):
    before = system_v(), queues()
    options = {"start_method": start_method, "logs": logs}
    if start_method == "forkserver":
        options["preload"] = ("json",)
    code = GROUP.format(worker=WORKER, options=options)
    with driver(folders, code) as script:
        pids = script.line()["pids"]
        mine = {target for fd, target in open_files(script.pid).items() if fd <= 2}
        family = descendants(script.pid)
        assert set(pids) < set(family), "the launcher is there too"
        assert {pid: found for pid in (script.pid, *family) if (found := holdings(pid, mine))} == {}
        assert (system_v(), queues()) == before
        script.tell()
        assert script.line() == {"closed": True}
        assert script.end() == 0


def test_a_start_and_an_end_make_no_name_either(folders):
    """Looked at from its first system call to its last: no name is made and removed again, and no
    socket is told to listen."""
    code = f"""{WORKER}
seen = []
def audit(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path, flags = os.fsdecode(args[0]), args[2]
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not path.startswith(("/dev/null", "/proc/")):
            seen.append([event, path])
    elif event in ("socket.bind", "socket.connect"):
        seen.append([event, repr(args[1])])
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "shutil.rmtree",
                   "tempfile.mkstemp", "tempfile.mkdtemp"):
        seen.append([event, repr(args)])
    elif event == "os.truncate" and not isinstance(args[0], int):
        seen.append([event, repr(args)])
import socket
listen = socket.socket.listen
socket.socket.listen = lambda self, *args: (seen.append(["listen", ""]), listen(self, *args))
sys.addaudithook(audit)
for start_method in ("spawn", "forkserver"):
    group = WorkerGroup(Worker, 2, start_method=start_method)
    group.call("echo", bytes(1_000_000))
    group.close()
say(seen=seen)
"""
    with driver(folders, code) as script:
        seen = script.line()["seen"]
        assert script.end() == 0
    # The reservation of MASTER_PORT: bound on loopback, one a group, and it does not listen.
    assert seen == [["socket.bind", "('127.0.0.1', 0)"]] * 2


def test_the_reserved_port_answers_nobody(folders):
    """MASTER_PORT is kept for torch's rendezvous: until then whoever connects to it is refused."""
    code = f"""{WORKER}
with WorkerGroup(Worker, 2) as group:
    say(ports=group.call("run", "import os; result = os.environ['MASTER_PORT']"))
    hear()
"""
    with driver(folders, code) as script:
        port, same = script.line()["ports"]
        assert port == same
        for address in ("127.0.0.1", "::1"):
            with pytest.raises(OSError) as caught:
                socket.create_connection((address, int(port)), timeout=5).close()
            assert not isinstance(caught.value, TimeoutError)
        script.tell()
        assert script.end() == 0


LISTENERS = {
    "tcp": "import socket; it = socket.socket(); it.bind(('127.0.0.1', 0)); it.listen()",
    "udp": "import socket; it = socket.socket(type=socket.SOCK_DGRAM); it.bind(('127.0.0.1', 0))",
    "unix": "import socket, os; it = socket.socket(socket.AF_UNIX); it.bind({path!r}); it.listen()",
    "abstract": "import socket; it = socket.socket(socket.AF_UNIX); it.bind('\\0rw-test-{pid}')",
    "unnamed": "import socket; it = socket.socket(socket.AF_UNIX); it.bind(''); it.listen()",
    "file": "it = open({path!r}, 'w')",
    "fifo": "import os; os.mkfifo({path!r}); it = os.open({path!r}, os.O_RDWR)",
    "mapping": "import mmap; file = open({path!r}, 'wb+'); file.truncate(9);"
    " it = mmap.mmap(file.fileno(), 9); file.close()",
}


@pytest.fixture(scope="module")
def opener():
    with WorkerGroup(Opener, 1) as group:
        yield group


@pytest.mark.parametrize("what", LISTENERS)
def test_the_look_at_a_process_finds_what_the_user_opens_in_a_worker(opener, what, tmp_path):
    """So that the tests above could fail."""
    (pid,) = opener.pids
    assert holdings(pid) == []
    opener.call("run", LISTENERS[what].format(path=str(tmp_path / "name"), pid=pid))
    assert holdings(pid) != []
    opener.call("let_go")
    assert holdings(pid) == []


def test_groups_of_one_name_do_not_meet(folders):
    """The name of a group is for people: two groups may have the same, in one driver and in two."""
    code = f"""{WORKER}
groups = [WorkerGroup(Worker, 1, name="same") for _ in range(2)]
for number, group in enumerate(groups): group.call("run", f"number = {{number}}")
say(ready=True)
hear()
say(seen=[group.call("run", "result = number") for group in groups])
for group in groups: group.close()
"""
    with driver(folders, code) as one, driver(folders, code) as other:
        for script in (one, other):
            assert script.line() == {"ready": True}
        for script in (one, other):
            script.tell()
            assert script.line() == {"seen": [[0], [1]]}
            assert script.end() == 0
