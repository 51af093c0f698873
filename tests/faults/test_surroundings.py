"""What surrounds a rank goes wrong: memory, output, disk, and values that cannot travel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import traceback
from typing import Any

import pytest
from surroundings_ranks import Prints, Wanting, WantsAtStart, Worker
from waiters import ALL, NAMES

from rankwise import RemoteError, SerializationError, StartupError, WorkerGroup

cell = pytest.mark.cell
methods = pytest.mark.parametrize(
    "options",
    [{"start_method": "spawn"}, {"start_method": "forkserver", "preload": ("json",)}],
    ids=["spawn", "forkserver"],
)


@methods
@cell(
    stage="submit",
    waiter=NAMES,
    gets="SerializationError by the call itself, with the path to the culprit; nothing is sent",
    told="by `submit`",
    within=8,
)
@pytest.mark.parametrize("fault", ["unpicklable argument"])
def test_what_cannot_leave_the_driver_fails_its_call_only(
    options: dict[str, Any], fault: str
) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        for waiter in ALL:
            with pytest.raises(SerializationError) as caught:
                waiter(group, {"lock": threading.Lock()}, method=Worker.echo)
            assert caught.value.path == "args[0]['lock']"
        assert group.call(Worker.echo, 1) == [1, 1]


@methods
@cell(
    stage="reply",
    waiter=NAMES,
    gets="SerializationError or RemoteError with the rank and the reason; the group lives on",
    told="when every rank has answered, 50 ms after the first failure at most",
    within=8,
)
@pytest.mark.parametrize("fault", ["unpicklable", "unrebuildable", "unrebuildable exception"])
def test_what_cannot_travel_fails_its_call_only(options: dict[str, Any], fault: str) -> None:
    with WorkerGroup(Worker, 2, **options) as group:
        for waiter in ALL:
            with pytest.raises((SerializationError, RemoteError)) as caught:
                waiter(group, fault, method=Worker.give)
            assert "rank" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
        assert group.call(Worker.echo, 1) == [1, 1]


ERRORS = {"out of memory": MemoryError, "disk full": OSError}
wants = pytest.mark.parametrize("fault", ERRORS)


@methods
@cell(
    stage="receive, run, reply",
    waiter=NAMES,
    gets="the rank's own MemoryError or OSError, or it is the reason why the result cannot "
    "travel; the group lives on",
    told="when every rank has answered, 50 ms after the first failure at most",
    within=8,
)
@wants
@pytest.mark.parametrize("stage", ["load", "run", "reply"])
def test_what_the_rank_has_none_of_is_its_own_exception(
    options: dict[str, Any], fault: str, stage: str
) -> None:
    methods = {"load": Worker.echo, "run": Worker.want, "reply": Worker.wanting}
    argument = Wanting(fault) if stage == "load" else fault
    with WorkerGroup(Worker, 2, **options) as group:
        for waiter in ALL:
            with pytest.raises((ERRORS[fault], SerializationError)) as caught:
                waiter(group, argument, method=methods[stage])
            words = "".join(traceback.format_exception(caught.value))
            assert ERRORS[fault].__name__ in words
            assert "rank 0 (pid" in words or "rank 1 (pid" in words
        assert group.call(Worker.echo, 1) == [1, 1]


@methods
@cell(
    stage="start",
    gets="StartupError; its cause is the rank's own error",
    told="at once",
    within=8,
)
@wants
@pytest.mark.parametrize("stage", ["import", "construct"])
def test_what_the_rank_has_none_of_at_its_start(
    options: dict[str, Any], fault: str, stage: str
) -> None:
    argument = Wanting(fault) if stage == "import" else fault
    with pytest.raises(StartupError) as caught:
        WorkerGroup(WantsAtStart, 2, args=(argument,), **options)
    assert caught.value.phase == stage
    assert isinstance(caught.value.__cause__, ERRORS[fault])


@methods
@cell(
    stage="run, large transfer",
    waiter=NAMES,
    gets="the results: nothing of a call needs a descriptor, or waits for who shows output",
    told="when every rank has answered",
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
        for waiter in ALL:
            assert waiter(group, data, method=Worker.echo) == [data, data]


@methods
@cell(
    stage="start, close",
    waiter="the constructor, `close`",
    gets="a group that starts and ends: nobody waits for who shows output",
    told="as ever",
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
    told="when every rank has answered",
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
