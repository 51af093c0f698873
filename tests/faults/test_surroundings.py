"""What surrounds a rank goes wrong: launcher, memory, descriptors, output, disk."""

from __future__ import annotations

import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any

import pytest
from faulty import Faulty
from surroundings_ranks import (
    KillsItsLauncher,
    Prints,
    Wanting,
    WantsAtStart,
    Worker,
    exhaust_descriptors,
)
from untold import explained
from waiters import NAMES, Everybody

from rankwise import (
    CallTimeout,
    GroupBroken,
    RemoteError,
    SerializationError,
    StartupError,
    WorkerGroup,
)

cell = pytest.mark.cell
methods = pytest.mark.parametrize(
    "options",
    [{"start_method": "spawn"}, {"start_method": "forkserver", "preload": ("json",)}],
    ids=["spawn", "forkserver"],
)


@methods
@cell(
    stage="run",
    waiter=NAMES,
    gets="GroupBroken: its launcher, and how that ended; the ranks are gone",
    within=8,
)
@pytest.mark.parametrize("fault", ["launcher killed"])
def test_the_launchers_death_ends_every_wait(options: dict[str, Any], fault: str) -> None:
    with WorkerGroup(Faulty, 2, args=("run", "sleep"), **options) as group:
        launcher = group[0].call(lambda worker: os.getppid())
        everybody = Everybody(group)
        while group.health()[1].method != "work":
            pass
        os.kill(launcher, signal.SIGKILL)
        for name, error in everybody.errors().items():
            assert isinstance(error, GroupBroken), name
            assert f"launcher (pid {launcher}) was killed by SIGKILL" in str(error), name


@methods
@cell(stage="construct", gets="StartupError: its launcher, and how that ended", within=8)
@pytest.mark.parametrize("fault", ["launcher killed"])
def test_the_launchers_death_ends_a_start(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(StartupError, match=r"launcher \(pid \d+\) was killed by SIGKILL"):
        WorkerGroup(KillsItsLauncher, 2, args=("construct",), **options)


@methods
@cell(stage="idle", waiter="`on_failure`", gets="the same GroupBroken as later calls", within=8)
@pytest.mark.parametrize("fault", ["launcher killed"])
def test_the_launchers_death_is_told_while_nothing_runs(
    options: dict[str, Any], fault: str
) -> None:
    failures: queue.SimpleQueue[GroupBroken] = queue.SimpleQueue()
    with WorkerGroup(Worker, 2, on_failure=failures.put, **options) as group:
        os.kill(group[0].call(Worker.parent), signal.SIGKILL)
        told = failures.get(timeout=5)
        with pytest.raises(GroupBroken) as caught:
            group.call(Worker.echo, 1)
        assert str(told) == str(caught.value)
        assert "launcher" in str(told) and "SIGKILL" in str(told)


@methods
@cell(stage="exit", waiter="`close`", gets="close returns, and nothing is left", within=8)
@pytest.mark.parametrize("fault", ["launcher killed"])
def test_the_launchers_death_does_not_hold_up_close(options: dict[str, Any], fault: str) -> None:
    group = WorkerGroup(KillsItsLauncher, 2, args=("exit",), **options)
    assert group.call(Worker.echo, 1) == [1, 1]
    group.close()
    assert not group.healthy


@methods
@cell(
    stage="submit",
    gets="SerializationError by the call itself, with the path to the culprit; nothing is sent",
    within=8,
)
@pytest.mark.parametrize("fault", ["unpicklable argument"])
def test_what_cannot_leave_the_driver_fails_its_call_only(
    options: dict[str, Any], fault: str
) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        for verb in (group.call, group.submit, group.submit_each):
            with pytest.raises(SerializationError) as caught:
                verb(Worker.echo, {"lock": threading.Lock()})
            assert caught.value.path == "args[0]['lock']"
        assert group.call(Worker.echo, 1) == [1, 1]


@methods
@cell(
    stage="reply",
    gets="SerializationError or RemoteError with the rank and the reason; the group lives on",
    within=8,
)
@pytest.mark.parametrize("fault", ["unpicklable", "unrebuildable", "unrebuildable exception"])
def test_what_cannot_travel_fails_its_call_only(options: dict[str, Any], fault: str) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        with pytest.raises((SerializationError, RemoteError)) as caught:
            group.call(Worker.give, fault)
        assert "rank" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
        assert group.call(Worker.echo, 1) == [1, 1]


ERRORS = {"out of memory": MemoryError, "disk full": OSError}
wants = pytest.mark.parametrize("fault", ERRORS)


@methods
@cell(
    stage="receive, run, reply",
    gets="the rank's own MemoryError or OSError, or it is the reason why the result cannot "
    "travel; the group lives on",
    within=8,
)
@wants
@pytest.mark.parametrize("stage", ["load", "run", "reply"])
def test_what_the_rank_has_none_of_is_its_own_exception(
    options: dict[str, Any], fault: str, stage: str
) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        with pytest.raises((ERRORS[fault], SerializationError)) as caught:
            if stage == "load":
                group.call(Worker.echo, Wanting(fault))
            else:
                group.call(Worker.want if stage == "run" else Worker.wanting, fault)
        words = "".join(traceback.format_exception(caught.value))
        assert ERRORS[fault].__name__ in words
        assert "rank 0 (pid" in words or "rank 1 (pid" in words
        assert group.call(Worker.echo, 1) == [1, 1]


@methods
@cell(stage="construct", gets="StartupError; its cause is the rank's own error", within=8)
@wants
def test_what_the_rank_has_none_of_at_its_start(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(StartupError) as caught:
        WorkerGroup(WantsAtStart, 2, args=(fault,), **options)
    assert isinstance(caught.value.__cause__, ERRORS[fault])


@methods
@cell(
    stage="run, large transfer",
    gets="the results: nothing of a call needs a descriptor, or waits for who shows output",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached", "log pipe full"])
def test_what_calls_do_not_need_does_not_stop_them(options: dict[str, Any], fault: str) -> None:
    data = bytes(3 << 20)
    with WorkerGroup(Worker, 2, logs="off", **options) as group:
        if fault == "log pipe full":
            assert group.call(Worker.print_much, 5 << 20) == [5 << 20] * 2
        else:
            # The first large message has a rank import what maps it: the next row.
            assert group.call(Worker.echo, data) == [data, data]
            group.call(Worker.exhaust_descriptors)
        for _ in range(3):
            assert group.call(Worker.echo, data) == [data, data]


@methods
@cell(
    stage="the first large transfer",
    gets="the rank's OSError, in that call alone: it imports what maps a file; from the first "
    "free descriptor on, the results",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached"])
def test_a_first_large_message_wants_a_descriptor(options: dict[str, Any], fault: str) -> None:
    data = bytes(3 << 20)
    with WorkerGroup(Worker, 2, **options) as group:
        group.call(Worker.exhaust_descriptors)
        with pytest.raises(OSError, match="Too many open files"):
            group.call(Worker.echo, data)
        assert group.call(Worker.echo, 1) == [1, 1]
        group.call(Worker.release_descriptors)
        assert group.call(Worker.echo, data) == [data, data]


@methods
@cell(
    stage="run",
    waiter="call, result, flush, health",
    gets="CallTimeout, as ever: without what /proc alone tells",
    within=8,
)
@pytest.mark.parametrize("fault", ["descriptor limit reached in the driver"])
def test_a_driver_without_descriptors_is_told_of_its_deadlines(
    options: dict[str, Any], fault: str
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with WorkerGroup(Faulty, 2, args=("run", "sleep"), **options) as group:
        assert group.call(Faulty.pid) == group.pids
        taken = exhaust_descriptors()
        try:
            error = explained(lambda: group.options(timeout=1.0).call(Faulty.work))
            assert (error.answered, error.missing) == ((0,), (1,))
            assert "in go_wrong" in error.stacks[1], "the launcher has descriptors"
            with pytest.raises(CallTimeout, match="rank 1: pid"):
                group[1].submit(Faulty.pid).result(0.1)
            with pytest.raises(CallTimeout, match="rank 1: pid"):
                group.flush(0.1)
            assert [each.state for each in group.health()] == ["idle", "running"]
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            group.kill()


@methods
@cell(
    stage="start, close",
    waiter="the constructor, `close`",
    gets="a group that starts and ends: nobody waits for who shows output",
    within=8,
)
@pytest.mark.parametrize("fault", ["log pipe full"])
def test_output_without_end_holds_up_no_start_and_no_end(
    options: dict[str, Any], fault: str
) -> None:
    with WorkerGroup(Prints, 2, logs="off", **options) as group:
        assert group.call(Worker.echo, 1) == [1, 1]


TINY = """
import os
os.environ.pop("PYTHONPATH", None)
from rankwise import WorkerGroup
class Worker:
    def echo(self, data): return data
    def fails(self, data): raise ValueError(data)
data = bytes(8 << 20)
with WorkerGroup(Worker, 2, **{options!r}) as group:
    assert group.call("echo", data) == [data, data]
    try:
        group[0].call("fails", data)
    except ValueError as error:
        assert error.args == (data,)
size = os.statvfs("/dev/shm")
print(size.f_blocks * size.f_frsize, os.listdir("/dev/shm"))
"""


@methods
@cell(
    stage="start, run, large transfer, close",
    gets="the results: /dev/shm is not used",
    within=8,
)
@pytest.mark.parametrize("fault", ["/dev/shm of 64 KB"])
def test_a_tiny_dev_shm_is_no_limit(options: dict[str, Any], fault: str) -> None:
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" "$@"'
    unshare = ["unshare", "-m", *(["-Ur"] if os.getuid() else [])]
    inside = [*unshare, "sh", "-c", mount]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode:
        pytest.skip("no mount namespace of our own may be made here")
    done = subprocess.run(
        [*inside, sys.executable, "-c", TINY.format(options=options)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "65536 []\n", "")
