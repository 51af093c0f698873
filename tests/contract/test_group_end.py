"""close, aclose, kill, shutdown, with: what happens to calls, workers and threads."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from concurrent.futures import CancelledError

import pytest
from contract_worker import LAST_WINDOW, Managed, Worker
from untold import untold

from rankwise import GroupClosed


def threads_of(name):
    return [t.name for t in threading.enumerate() if t.name.startswith(f"rankwise-{name}")]


def wait_for_threads_of(name):
    """Until none is left; one may start another that ends the group."""
    limit = time.monotonic() + 10
    while threads_of(name):
        assert time.monotonic() < limit, threads_of(name)
        for thread in threading.enumerate():
            if thread.name in threads_of(name):
                thread.join(1)


def assert_closed(group):
    assert not group.healthy
    assert group.failure is None
    for refused in (
        lambda: group.call(Worker.get_rank),
        lambda: group.submit(Worker.get_rank),
        lambda: group.submit_each(Worker.get_rank),
        lambda: group.scatter(Worker.add, [0] * len(group)),
        lambda: group.collective_rpc("get_rank"),
        lambda: group[0].call(Worker.get_rank),
        lambda: group.options(timeout=1).call(Worker.get_rank),
    ):
        with pytest.raises(
            GroupClosed, match=f"^{group.name} is closed and takes no more calls: make a new gr"
        ):
            refused()
    group.flush()
    assert len(group.health()) == len(group)
    assert {health.state for health in group.health()} == {"dead"}
    assert threads_of(group.name) == []


def test_close_waits_for_what_was_submitted(make):
    group = make(world_size=1, name="ends")
    futures = [group.submit(Worker.add, n, 0) for n in range(LAST_WINDOW * 2)]
    group.close()
    assert [future.result() for future in futures] == [[n] for n in range(LAST_WINDOW * 2)]
    assert_closed(group)
    group.close()
    group.kill()
    group.shutdown()


def test_close_gives_up_after_its_timeout(make, gate):
    group = make(world_size=1, name="slow")
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    group.close(timeout=0.1)
    with pytest.raises(GroupClosed) as caught:
        future.result()
    assert str(caught.value) == "pass_gate() of slow was not answered: the group was closed"


def test_kill_settles_every_open_call_with_group_closed(make, gate):
    group = make(world_size=1, name="killed")
    futures = [group.submit(Worker.pass_gate, gate.path)]
    futures += [group.submit(Worker.get_rank) for _ in range(LAST_WINDOW + 5)]
    gate.entered(0)
    group.kill()
    for future in futures:
        with pytest.raises(GroupClosed):
            future.result(timeout=10)
    gate.open(0)


def test_kill_of_an_idle_group_leaves_no_thread(make):
    group = make(world_size=1, name="idle")
    group.kill()
    wait_for_threads_of("idle")
    assert_closed(group)


def test_with_waits_for_all_after_a_normal_body(make):
    with make(world_size=1, name="normal") as group:
        futures = [group.submit(Worker.add, n, 0) for n in range(LAST_WINDOW * 2)]
    assert futures[-1].result() == [2 * LAST_WINDOW - 1]
    assert_closed(group)


def test_with_drops_what_is_queued_after_an_exception(make, gate):
    with pytest.raises(KeyError, match="body"), make(world_size=1, name="exc") as group:
        running = group.submit(Worker.cancelled_at_gate, gate.path)
        gate.entered(0)
        queued = [group.submit(Worker.note, n) for n in range(LAST_WINDOW + 5)]
        opener = threading.Thread(target=_open_when, args=(queued[-1], gate))
        opener.start()
        raise KeyError("body")
    opener.join()
    assert running.result() == [True], "its cancel flag was set, and it was waited for"
    with pytest.raises(GroupClosed, match=r"^note\(\) of exc was not answered: the group was cl"):
        queued[-1].result()
    assert_closed(group)


def _open_when(future, gate):
    """Open the gate of rank 0 once `future` is settled."""
    while not future.done():
        os.sched_yield()
    gate.open(0)


def test_a_context_manager_is_left_when_the_body_fails_too(make, tmp_path):
    with pytest.raises(ValueError), make(Managed, 1, args=(str(tmp_path),)):
        raise ValueError
    assert (tmp_path / "0").read_text() == "enter\nexit None None None\n"


def test_close_from_another_thread_ends_a_waiter(make, gate):
    group = make(world_size=1)
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    closer = threading.Thread(target=group.close, args=(0.1,))
    closer.start()
    with pytest.raises(GroupClosed):
        future.result(timeout=20)
    closer.join()
    gate.open(0)


def test_close_from_a_callback(make):
    group = make(world_size=1, name="inner")
    closed = threading.Event()

    def close(future):
        group.close()
        closed.set()

    group.submit(Worker.get_rank).add_done_callback(close)
    assert closed.wait(20)
    with pytest.raises(GroupClosed):
        group.call(Worker.get_rank)


def test_shutdown_waits(make):
    group = make(world_size=1, name="down")
    futures = [group.submit(Worker.add, n, 0) for n in range(LAST_WINDOW * 2)]
    group.shutdown()
    assert all(future.done() for future in futures)
    assert futures[-1].result() == [2 * LAST_WINDOW - 1]
    assert_closed(group)


def test_shutdown_without_waiting_refuses_at_once_and_ends_in_the_background(make, gate):
    group = make(world_size=1, name="later")
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    group.shutdown(wait=False)
    with pytest.raises(GroupClosed):
        group.call(Worker.get_rank)
    assert not future.done()
    gate.open(0)
    assert future.result() == [0]
    group.shutdown()
    assert {health.state for health in group.health()} == {"dead"}, "it has waited for the other"
    wait_for_threads_of("later")
    assert_closed(group)


def test_shutdown_can_cancel_what_is_queued(make, gate):
    """As in an Executor: what runs, or is with the rank, ends by itself."""
    group = make(world_size=1, name="drop")
    running = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    queued = [group.submit(Worker.note, n) for n in range(LAST_WINDOW + 5)]
    opener = threading.Thread(target=_open_when, args=(queued[-1], gate))
    opener.start()
    group.shutdown(cancel_futures=True)
    opener.join()
    assert running.result() == [0]
    assert not queued[0].cancelled() and queued[0].result() == [1]
    assert queued[-1].cancelled()
    with pytest.raises(CancelledError):
        queued[-1].result()


def test_who_waits_in_a_call_that_a_shutdown_cancels_hears_of_that(make, gate):
    group = make(world_size=1, name="shut")
    group.submit(Worker.pass_gate, gate.path)
    gate.entered(0)
    queued = [group.submit(Worker.get_rank) for _ in range(LAST_WINDOW + 5)]
    told = []

    def call():
        try:
            group.call(Worker.get_rank)
        except GroupClosed as error:
            told.append(str(error))

    waits = threading.Thread(target=call)
    waits.start()
    expected = queued[-1]._call.id + 1
    while group.submit(Worker.get_rank)._call.id == expected:
        expected += 1  # until that call is in the order of calls, before this one
    group.shutdown(wait=False, cancel_futures=True)
    waits.join()
    assert told == ["get_rank() of shut was not sent: the group was shut down"]
    gate.open(0)
    group.close()


def test_aclose_does_not_block_the_loop(make, gate):
    group = make(world_size=1, name="async")
    future = group.submit(Worker.pass_gate, gate.path)
    gate.entered(0)

    async def main():
        closing = asyncio.create_task(group.aclose())
        while group.healthy:
            await asyncio.sleep(0)
        assert not closing.done()
        gate.open(0)
        await closing

    asyncio.run(main())
    assert future.result() == [0]
    assert_closed(group)


@pytest.mark.parametrize("timeout", ["1", True, float("nan")])
def test_a_wrong_timeout_of_close_names_it(group, timeout):
    with pytest.raises((TypeError, ValueError), match="timeout must be seconds"):
        group.close(timeout)
    assert group.call(Worker.get_rank) == [0, 1, 2], "nothing was closed"


def test_a_group_that_is_collected_unclosed_warns_and_ends(backend):
    import gc

    from rankwise import WorkerGroup

    group = WorkerGroup(Worker, 1, name="lost", backend=backend)
    assert threads_of("lost")
    with pytest.warns(ResourceWarning, match="the WorkerGroup 'lost' was collected without"):
        del group
        gc.collect()
    wait_for_threads_of("lost")


def test_a_close_that_has_waited_its_time_says_for_whom(make, gate, caplog, backend):
    for _ in range(5):
        group = make()
        future = group[1].submit(Worker.pass_gate, gate.path)
        gate.entered(1)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rankwise"):
            group.close(timeout=0.05)
        gate.open(1)
        assert isinstance(future.exception(0), GroupClosed)
        if backend == "inline":
            return  # a thread is left where it is
        (text,) = (record.getMessage() for record in caplog.records)
        if not untold(text):
            break
    assert re.match(
        rf"workers: close\(\) has waited its time, and rank 1 had not left: SIGTERM, then "
        rf"SIGKILL\n  rank 1: pid {group.pids[1]}, running pass_gate\(\) for [0-9.]+ s, in ",
        text,
    )


def test_a_kill_says_nothing_of_those_whom_it_ends(make, gate, caplog):
    group = make()
    group[1].submit(Worker.pass_gate, gate.path)
    gate.entered(1)
    with caplog.at_level(logging.WARNING, "rankwise"):
        group.kill()
    gate.open(1)
    assert caplog.records == []


def test_what_no_call_tells_of_a_groups_failure_is_logged(make, gate, caplog):
    """The caller has the first failure by then, and may make no call any more."""
    group = make()
    with caplog.at_level(logging.ERROR, "rankwise"):
        with pytest.raises(ValueError):
            group.options(grace=0.1).call(Worker.fail_or_wait, [0], gate.path)
        until = time.monotonic() + 10
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
    (text,) = (record.getMessage() for record in caplog.records)
    assert text == str(group.failure)
    assert "rank 1: pid " in text
