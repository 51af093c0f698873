"""Guarantee 5: the driver's end, even by SIGKILL, takes every worker and all their descendants."""

from __future__ import annotations

import os
import signal

import pytest
from drivers import Script, Watch, readable

# Seconds from the driver's end to that of the last of them: no measure of it, which is what
# benchmarks/bounds.py takes, for a busy machine has a second of its own.
WITHIN = 5.0

WORKER = """
class Worker:
    def pids(self):
        return [os.getpid(), os.getppid()]

    def loop(self, fd_path):
        self.tell(fd_path)
        while True:
            pass

    def hold_the_gil(self, fd_path):
        libc = ctypes.PyDLL(None)
        self.tell(fd_path)
        libc.sleep(600)

    def ignore_all(self, fd_path):
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_IGN)
        self.tell(fd_path)
        while True:
            time.sleep(600)

    def have_children(self, fd_path):
        import subprocess
        plain = subprocess.Popen(["sleep", "600"])
        own = subprocess.Popen(["sleep", "600"], start_new_session=True)
        read, write = os.pipe()
        if os.fork() == 0:  # the double fork of a daemon: a session and a parent of its own
            os.setsid()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                os.close(write)
                os.execvp("sleep", ["sleep", "600"])
            os.write(write, str(pid).encode())
            os._exit(0)
        os.close(write)
        daemon = int(os.read(read, 20))
        os.wait()
        self.tell(fd_path, plain.pid, own.pid, daemon)
        time.sleep(600)

    def stop(self, fd_path):
        self.tell(fd_path)
        os.kill(os.getpid(), signal.SIGSTOP)

    def tell(self, path, *pids):
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, (" ".join(map(str, pids)) + "\\n").encode())
        os.close(fd)
"""


class Fifo:
    """Where workers say that they are where the test wants them."""

    def __init__(self, folder: object) -> None:
        self.path = f"{folder}/fifo"
        os.mkfifo(self.path)
        self.fd = os.open(self.path, os.O_RDWR)

    def lines(self, count: int) -> list[str]:
        text = b""
        while text.count(b"\n") < count:
            assert readable(self.fd), "a worker did not get there"
            text += os.read(self.fd, 4096)
        return text.decode().splitlines()

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def fifo(tmp_path):
    made = Fifo(tmp_path)
    yield made
    made.close()


def assert_all_go(script: Script, pids: list[int], also: tuple[int, ...] = ()) -> None:
    with Watch(pids) as watch, Watch([script.pid]) as driver:
        assert watch.left(0) == pids
        for pid in also:
            os.kill(pid, signal.SIGKILL)
        script.kill()
        assert driver.left(5) == []
        assert watch.left(WITHIN) == []


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.parametrize(
    "busy", ["idle", "loop", "hold_the_gil", "ignore_all", "have_children", "stop"]
)
def test_a_killed_driver_takes_all_workers_and_descendants(busy, start_method, fifo):
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2, start_method={start_method!r})
pids = group.call("pids")
if {busy!r} != "idle":
    future = group.submit({busy!r}, {fifo.path!r})
say(pids=pids)
hear()
"""
    with Script(code) as script:
        pids = [pid for pair in script.line()["pids"] for pid in pair]
        if busy != "idle":
            for line in fifo.lines(2):
                pids += map(int, line.split())
        assert_all_go(script, sorted(set(pids)))


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_killed_driver_takes_workers_that_are_still_importing(start_method, fifo, tmp_path):
    (tmp_path / "slow_to_import.py").write_text(
        "import os\n"
        f"fd = os.open({fifo.path!r}, os.O_WRONLY)\n"
        "os.write(fd, b'%d %d\\n' % (os.getpid(), os.getppid()))\n"
        "os.close(fd)\n"
        "import time\n"
        "time.sleep(600)\n"
        "class Worker: pass\n"
    )
    code = f"""
    class Importer:
        def __init__(self):
            sys.path.insert(0, {str(tmp_path)!r})
            import slow_to_import
    WorkerGroup(Importer, 2, start_method={start_method!r})
    """
    with Script(code) as script:
        pids = {int(pid) for line in fifo.lines(2) for pid in line.split()}
        assert_all_go(script, sorted(pids))


@pytest.mark.parametrize("how", ["thread", "to_thread", "executor"])
def test_workers_outlive_the_thread_that_made_them_and_not_the_driver(how):
    code = f"""{WORKER}
def make():
    global group
    group = WorkerGroup(Worker, 2)

if {how!r} == "thread":
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
elif {how!r} == "to_thread":
    import asyncio
    asyncio.run(asyncio.to_thread(make))
else:
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        pool.submit(make).result()
say(pids=group.call("pids"))
hear()
say(again=group.options(timeout=10).call("pids"))
hear()
"""
    with Script(code) as script:
        pids = script.line()["pids"]
        script.tell()
        assert script.line()["again"] == pids
        assert_all_go(script, sorted({pid for pair in pids for pid in pair}))


@pytest.mark.parametrize("busy", ["idle", "loop", "hold_the_gil", "stop"])
def test_workers_go_when_driver_and_launcher_are_killed_together(busy, fifo):
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2)
pids = group.call("pids")
if {busy!r} != "idle":
    future = group.submit({busy!r}, {fifo.path!r})
say(pids=pids)
hear()
"""
    with Script(code) as script:
        pairs = script.line()["pids"]
        if busy != "idle":
            fifo.lines(2)
        launcher = pairs[0][1]
        assert_all_go(script, sorted({pid for pair in pairs for pid in pair}), also=(launcher,))


@pytest.mark.parametrize("busy", ["idle", "loop", "hold_the_gil"])
def test_a_killed_launcher_takes_the_workers_and_breaks_the_group(busy, fifo):
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2)
pids = group.call("pids")
future = None if {busy!r} == "idle" else group.submit({busy!r}, {fifo.path!r})
say(pids=pids)
hear()
began = time.monotonic()
try:
    group.call("pids") if future is None else future.result(10)
except GroupBroken as error:
    say(error=type(error).__name__, text=str(error), healthy=group.healthy)
except BaseException as error:
    say(error=repr(error), text="", healthy=group.healthy)
hear()
group.close()
say(closed=True)
"""
    with Script(code) as script:
        pairs = script.line()["pids"]
        if busy != "idle":
            fifo.lines(2)
        launcher = pairs[0][1]
        with Watch({pid for pair in pairs for pid in pair}) as watch:
            os.kill(launcher, signal.SIGKILL)
            assert watch.left(WITHIN) == []
            script.tell()
            heard = script.line()
            assert heard["error"] == "GroupBroken"
            assert "launcher" in heard["text"] and "SIGKILL" in heard["text"]
            assert heard["healthy"] is False
            script.tell()
            assert script.line()["closed"] is True
            assert script.end() == 0
        assert script.errors() == ""
