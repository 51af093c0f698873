"""Guarantee 4: a death is seen although forked children hold the dead one's descriptors."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from drivers import SECONDS, Script, Watch, in_thread, until
from g04_death_is_the_kernels_word_ranks import Worker

from rankwise import GroupBroken, WorkerDied, WorkerGroup

HEARD = 5.0  # seconds: benchmarks/bounds.py measures it


@pytest.fixture
def group():
    made = WorkerGroup(Worker, 2, logs="off")
    yield made
    made.kill()


@pytest.mark.parametrize("verb", ["fork", "fork_in_a_thread_that_stays"])
@pytest.mark.parametrize("how", ["python", "libc"])
@pytest.mark.parametrize("stage", ["idle", "running"])
def test_a_death_is_seen_while_the_workers_child_holds_its_descriptors(
    group, how, stage, verb, tmp_path
):
    child = group[1].call(verb, how)
    with Watch([child]) as watch:
        waits = None
        if stage == "running":
            path = str(tmp_path / "fifo")
            os.mkfifo(path)
            waits = in_thread(lambda: group.call("run", path))
            with open(path, "rb") as fifo:
                assert fifo.read(1)
        began = time.monotonic()
        os.kill(group.pids[1], signal.SIGKILL)
        if waits is not None:
            with pytest.raises(WorkerDied) as caught:
                waits.value(5)
            assert caught.value.rank == 1
        else:
            until(lambda: not group.healthy, 5)
            with pytest.raises(GroupBroken):
                group.call("echo", 1)
        assert time.monotonic() - began < HEARD
        group.close()
        assert watch.left(HEARD) == []


@pytest.mark.parametrize("how", ["python", "libc"])
def test_a_worker_with_a_forked_child_goes_on_answering(group, how):
    child = group[0].call("fork", how)
    with Watch([child]) as watch:
        assert group.call("echo", 1) == [1, 1]
        assert watch.left(0) == [child]
        group.close()
        assert watch.left(HEARD) == []


@pytest.mark.parametrize("stage", ["running", "close"])
def test_the_launchers_death_is_seen_while_others_hold_its_descriptors(monkeypatch, stage):
    """As a child does that another thread of the driver forks in the middle of a start, or a
    helper that a preloaded module has forked."""
    held = []

    class HeldOpen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            held.extend(map(os.dup, kwargs["pass_fds"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", HeldOpen)
    group = WorkerGroup(Worker, 2, logs="off")
    monkeypatch.undo()
    try:
        launcher = group[0].call("parent")
        waits = group.submit("run", os.devnull) if stage == "running" else None
        os.kill(launcher, signal.SIGKILL)
        if waits is not None:
            with pytest.raises(GroupBroken, match=rf"launcher \(pid {launcher}\) was killed"):
                waits.result(5)
        in_thread(group.close).value(5)
    finally:
        group.kill()
        for fd in held:
            os.close(fd)


DRIVER = """
class Worker:
    def pids(self): return [os.getpid(), os.getppid()]
group = WorkerGroup(Worker, 2)
pids = group.call("pids")
fork = os.fork if {how!r} == "python" else ctypes.CDLL(None).fork
child = fork()
if child == 0:
    time.sleep(600)
say(pids=pids, child=child, again=group.call("pids"))
hear()
"""


@pytest.mark.parametrize("how", ["python", "libc"])
def test_the_drivers_death_is_seen_while_its_child_holds_its_descriptors(how):
    with Script(DRIVER.format(how=how)) as script:
        said = script.line()
        assert said["again"] == said["pids"]
        pids = {pid for pair in said["pids"] for pid in pair}
        with Watch([said["child"]]), Watch(pids) as watch:
            script.kill()
            assert watch.left(HEARD) == []


@pytest.mark.parametrize("how", ["python", "libc"])
def test_a_workers_death_is_seen_while_the_drivers_child_holds_its_descriptors(how):
    code = DRIVER.format(how=how) + (
        "began = time.monotonic()\n"
        "os.kill(pids[1][0], signal.SIGKILL)\n"
        "try: group.call(lambda worker: time.sleep(600))\n"
        "except WorkerGroupError as error: say(rank=getattr(error, 'rank', None) if isinstance("
        "error, WorkerDied) else error.first.rank, seconds=time.monotonic() - began)\n"
        "hear()\n"
        "began = time.monotonic()\n"
        "group.close()\n"
        "say(closed=time.monotonic() - began)\n"
    )
    with Script(code) as script:
        said = script.line()
        with Watch([said["child"]]):
            script.tell()
            heard = script.line()
            assert heard["rank"] == 1
            assert heard["seconds"] < HEARD
            script.tell()
            assert script.line()["closed"] < 10
            assert script.end() == 0


@pytest.mark.parametrize("how", ["python", "libc"])
def test_close_ends_in_order_while_the_drivers_child_holds_its_descriptors(how):
    code = DRIVER.format(how=how) + (
        "began = time.monotonic()\ngroup.close(None)\nsay(closed=time.monotonic() - began)\n"
    )
    with Script(code) as script:
        said = script.line()
        with (
            Watch([said["child"]]) as child,
            Watch({pid for pair in said["pids"] for pid in pair}) as watch,
        ):
            script.tell()
            assert script.line(SECONDS)["closed"] < 10
            assert watch.left(HEARD) == []
            assert child.left(0) == [said["child"]]
            assert script.end() == 0
