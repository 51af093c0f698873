"""Guarantee 3: no caller waits for ever, whatever it waits by and whenever the rank dies."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import gc
import os
import signal
import socket
import threading
import time

import pytest
from drivers import in_thread, until

from rankwise import GroupBroken, WorkerDied, WorkerGroup

HEARD = 0.5  # seconds in which a small process's death is told; it takes a millisecond or two


class Worker:
    def echo(self, value):
        return value

    def hold(self, fd_path):
        """Say that it runs, then run until the end of the other side."""
        fd = os.open(fd_path, os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
        threading.Event().wait()

    def die(self, how):
        if how == "exit":
            os._exit(3)
        elif how == "abort":
            os.abort()
        elif how == "segfault":
            ctypes.string_at(0)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


DEATHS = {"exit": 3, "abort": -signal.SIGABRT, "segfault": -signal.SIGSEGV, "kill": -signal.SIGKILL}


@pytest.fixture
def group():
    made = WorkerGroup(Worker, 2, logs="off")
    yield made
    made.kill()


@pytest.fixture
def fifo(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, fd
    os.close(fd)


def all_hold(fifo, count):
    from drivers import readable

    seen = b""
    while len(seen) < count:
        assert readable(fifo[1])
        seen += os.read(fifo[1], 64)


def by_result(future):
    return future.result()


def by_exception(future):
    error = future.exception()
    if error is None:
        raise AssertionError("no exception")
    raise error


def by_callback(future):
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    assert done.wait(20)
    assert future.done()
    return future.result(0)


def by_wait(future):
    done, _ = concurrent.futures.wait([future], timeout=20)
    assert done == {future}
    return future.result(0)


def by_as_completed(future):
    return next(concurrent.futures.as_completed([future], timeout=20)).result(0)


def by_await(future):
    async def main():
        return await future

    return asyncio.run(main())


def by_wrap_future(future):
    async def main():
        return await asyncio.wrap_future(future)

    return asyncio.run(main())


WAITERS = [
    by_result, by_exception, by_callback, by_wait, by_as_completed, by_await, by_wrap_future,
]  # fmt: skip


@pytest.mark.parametrize("waiter", WAITERS)
@pytest.mark.parametrize("stage", ["running", "queued"])
def test_a_death_ends_every_kind_of_wait(group, fifo, waiter, stage):
    futures = [group.submit("hold", fifo[0])]
    all_hold(fifo, 2)
    if stage == "queued":
        futures += [group.submit("echo", number) for number in range(200)]
    waits = in_thread(lambda: waiter(futures[-1]))
    until(lambda: waits.thread.is_alive())
    killed = time.monotonic()
    os.kill(group.pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        waits.value()
    assert time.monotonic() - killed < HEARD
    assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)
    assert all(future.done() or future.exception(5) for future in futures)


def test_a_death_ends_a_plain_call(group, fifo):
    waits = in_thread(lambda: group.call("hold", fifo[0]))
    all_hold(fifo, 2)
    killed = time.monotonic()
    os.kill(group.pids[0], signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        waits.value()
    assert time.monotonic() - killed < HEARD
    assert caught.value.rank == 0 and caught.value.method == "hold"


def test_a_death_ends_flush(group, fifo):
    future = group.submit("hold", fifo[0])
    all_hold(fifo, 2)
    waits = in_thread(group.flush)
    os.kill(group.pids[0], signal.SIGKILL)
    assert waits.value(2) is None
    assert isinstance(future.exception(1), WorkerDied)


def test_a_death_ends_all_of_many_waiters(group, fifo):
    future = group.submit("hold", fifo[0])
    all_hold(fifo, 2)
    waits = [in_thread(lambda waiter=waiter: waiter(future)) for waiter in WAITERS * 3]
    calls = [in_thread(lambda: group.call("echo", 1)) for _ in range(5)]
    os.kill(group.pids[1], signal.SIGKILL)
    for wait in waits:
        with pytest.raises(WorkerDied):
            wait.value(5)
    for call in calls:
        with pytest.raises(GroupBroken):  # WorkerDied where it was open, GroupBroken where later
            try:
                call.value(5)
            except WorkerDied as died:
                raise GroupBroken("open when it died", first=died) from died


@pytest.mark.parametrize("how", DEATHS)
def test_the_call_in_which_a_rank_dies_says_how(group, how):
    began = time.monotonic()
    with pytest.raises(WorkerDied) as caught:
        in_thread(lambda: group[1].call("die", how)).value(5)
    assert time.monotonic() - began < 2.0  # a core dump may be written first
    assert caught.value.exitcode == DEATHS[how]
    assert (caught.value.rank, caught.value.method) == (1, "die")


def test_a_rank_that_dies_while_idle_is_told_to_the_next_call(group):
    failed = threading.Event()
    group_pids = group.pids
    os.kill(group_pids[1], signal.SIGKILL)
    until(lambda: not group.healthy, 2, "a death while idle is noticed without a call")
    with pytest.raises(GroupBroken) as caught:
        group.call("echo", 1)
    assert isinstance(caught.value.first, WorkerDied)
    assert caught.value.first.rank == 1
    assert caught.value.__cause__ is caught.value.first
    assert not failed.is_set()


def test_calls_made_right_after_a_death_all_end(group):
    """The race between a death and submits: none is left open."""
    stop = threading.Event()
    futures = []

    def submit():
        while not stop.is_set():
            try:
                futures.append(group.submit("echo", len(futures)))
            except GroupBroken:
                return
            if len(futures) > 200:
                futures[-100].exception(5)

    threads = [in_thread(submit) for _ in range(3)]
    until(lambda: len(futures) > 500)
    os.kill(group.pids[0], signal.SIGKILL)
    until(lambda: not group.healthy, 5)
    stop.set()
    for thread in threads:
        thread.value(5)
    done, open_ = concurrent.futures.wait(futures, timeout=5)
    assert not open_
    for future in done:
        assert future.exception(0) is None or isinstance(future.exception(0), WorkerDied)


def test_a_worker_that_answers_and_dies_at_once_has_answered(group):
    """The answer to a call is not thrown away because the exit is heard of first."""
    value = group[0].call(
        lambda worker: os.kill(os.getpid(), 0) or threading.Timer(0.0, os._exit, (0,)).start()
    )
    assert value is None


def call_socket():
    """This worker's end of its call channel, found as a debugger would find it."""
    for thing in gc.get_objects():
        if isinstance(thing, socket.socket) and thing.family == socket.AF_UNIX:
            return thing
    # `_socket.socket` of a worker is not tracked by gc: look through the open descriptors.
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                return socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
    raise LookupError("no socket")


def lose_the_reply(worker):
    """Have this call's answer go nowhere: its bytes leave, and nobody gets them."""
    import sys

    frame = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if type(value).__name__ == "WorkerChannel":
                send_all = value._send_all
                lost = []

                def once(part, value=value, send_all=send_all, lost=lost):
                    lost.append(part)
                    if sum(map(len, lost)) >= 24:
                        hooks.pop()(value)

                hooks = [lambda value: type(value).__dict__]
                cls = type(value)
                original = cls._send_all
                original_reply = cls.reply

                def reply(self, kind, call_id, body):
                    cls.reply = original_reply
                    self._sent += 1  # counted, never sent

                cls.reply = reply
                return original
        frame = frame.f_back
    raise LookupError("no channel in the frames of a call")
