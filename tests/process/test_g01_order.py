"""Guarantee 1: one order of calls a group, fixed when `submit` returns; each rank keeps to it.

Workers write down what they run. Two ranks that both ran two calls must have run them in the same
order, and what one thread submitted later is run later, on every rank that has both.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import threading

import pytest
from drivers import SECONDS, in_thread, remove_fifo
from g01_order_ranks import Worker

from rankwise import CallTimeout, WorkerGroup

SIZE = 3
AHEAD = 64  # so many calls are sent ahead to a rank: what comes after them is queued


@pytest.fixture(scope="module")
def shared():
    group = WorkerGroup(Worker, SIZE, name="order")
    group.submit("take_ran").add_done_callback(lambda future: future.result())
    group.flush()
    yield group
    group.kill()


@pytest.fixture
def group(shared):
    shared.call("take_ran")
    return shared


@pytest.fixture(autouse=True)
def threads_take_turns_often():
    """A thread that submits its hundred calls within one turn races with nobody."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def fifo(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    yield path
    remove_fifo(path)


def assert_one_order(seen):
    """No two ranks disagree about any two items, nor about any longer chain of them."""
    after = {}
    for ran in seen:
        for earlier, later in itertools.pairwise(ran):
            after.setdefault(earlier, set()).add(later)
            after.setdefault(later, set())
    before = dict.fromkeys(after, 0)
    for laters in after.values():
        for later in laters:
            before[later] += 1
    free = [item for item, count in before.items() if not count]
    done = 0
    while free:
        done += 1
        for later in after[free.pop()]:
            before[later] -= 1
            if not before[later]:
                free.append(later)
    assert done == len(after), "the ranks' orders contradict each other"


def assert_each_in_order(ran, submitters):
    """Items are (submitter, number): each submitter's numbers rise."""
    for submitter in submitters:
        numbers = [number for who, number, *_ in ran if who == submitter]
        assert numbers == sorted(numbers)


def test_the_check_finds_a_contradiction_over_three_ranks():
    assert_one_order([[1, 2], [2, 3], [1, 3]])
    with pytest.raises(AssertionError):
        assert_one_order([[1, 2], [2, 3], [3, 1]])


def test_every_rank_runs_the_calls_of_many_threads_in_the_same_order(group):
    count, threads = 150, 8
    go = threading.Barrier(threads)

    def submits(who):
        go.wait(SECONDS)
        return [group.submit("note", (who, number)) for number in range(count)]

    running = [in_thread(lambda who=who: submits(who)) for who in range(threads)]
    for thread in running:
        thread.value()
    seen = group.call("take_ran")
    assert len(seen[0]) == count * threads
    assert seen == [seen[0]] * SIZE
    assert_each_in_order(seen[0], range(threads))


def test_calls_to_views_that_overlap_have_one_order(group):
    """Every pair of ranks sees its common calls alike, though no rank sees all of them."""
    views = [[0, 1], [1, 2], [2, 0], [0], [1], [2], [2, 1, 0], [0, 1, 2]]
    go = threading.Barrier(6)

    def submits(who):
        choice = random.Random(who)
        go.wait(SECONDS)
        sent = {rank: [] for rank in range(SIZE)}
        for number in range(150):
            ranks = choice.choice(views)
            group[ranks].submit("note", (who, number))
            for rank in ranks:
                sent[rank].append((who, number))
        return sent

    running = [in_thread(lambda who=who: submits(who)) for who in range(6)]
    sent = [thread.value() for thread in running]
    seen = group.call("take_ran")
    for rank, ran in enumerate(seen):
        for who in range(6):
            assert [item for item in ran if item[0] == who] == sent[who][rank], "once, in order"
    assert_one_order(seen)


def test_a_call_that_was_submitted_later_by_another_thread_runs_later(group):
    """`submit` has fixed the place when it returns: a baton passes through the threads."""
    turns = 200
    batons = [threading.Semaphore(0) for _ in range(4)]

    def submits(who):
        for number in range(who, turns, 4):
            assert batons[who].acquire(timeout=SECONDS)
            group[[number % SIZE, (number + 1) % SIZE]].submit("note", number)
            batons[(who + 1) % 4].release()

    running = [in_thread(lambda who=who: submits(who)) for who in range(4)]
    batons[0].release()
    for thread in running:
        thread.value()
    for rank, ran in enumerate(group.call("take_ran")):
        assert ran == [n for n in range(turns) if rank in (n % SIZE, (n + 1) % SIZE)]


def test_all_verbs_share_one_order(group):
    """call, submit, submit_each, scatter, collective_rpc, by name and by value."""

    def noted(worker, item):
        return worker.note(item)

    go = threading.Barrier(4)

    def verbs(who):
        go.wait(SECONDS)
        items = iter((who, number) for number in range(1000))
        for _ in range(20):
            group.submit("note", next(items))
            group.submit_each("note", next(items))
            group.call(noted, next(items))
            group[::-1].scatter("note", [next(items)] * SIZE)
            group.collective_rpc("note", args=(next(items),))
            group.collective_rpc(noted, args=(next(items),), non_block=True)
            group.options(reply_from=1).call(Worker.note, next(items))
            group.options(return_exceptions=True).call("fails", next(items))
        return next(items)[1]

    running = [in_thread(lambda who=who: verbs(who)) for who in range(4)]
    counts = [thread.value() for thread in running]
    seen = group.call("take_ran")
    assert seen == [seen[0]] * SIZE
    for who, count in enumerate(counts):
        assert [item for item in seen[0] if item[0] == who] == [(who, n) for n in range(count)]


def test_submit_each_takes_neighbouring_places(group):
    """Its calls, one a rank, have no other call between them: ranks that meet within one of its
    calls do not find each other in different ones."""
    go = threading.Barrier(4)

    def submits(who):
        go.wait(SECONDS)
        for number in range(150):
            group.submit_each("note", (who, number))

    running = [in_thread(lambda who=who: submits(who)) for who in range(4)]
    for thread in running:
        thread.value()
    seen = group.call("take_ran")
    assert seen == [seen[0]] * SIZE


def test_scatter_of_threads_arrives_in_one_order(group):
    go = threading.Barrier(4)

    def submits(who):
        go.wait(SECONDS)
        for number in range(60):
            parts = [(who, number, rank) for rank in range(SIZE)]
            assert group.scatter("note", parts) == parts

    running = [in_thread(lambda who=who: submits(who)) for who in range(4)]
    for thread in running:
        thread.value()
    seen = group.call("take_ran")
    assert [[item[2] for item in ran] for ran in seen] == [[r] * 240 for r in range(SIZE)]
    assert [[item[:2] for item in ran] for ran in seen] == [[i[:2] for i in seen[0]]] * SIZE
    assert_each_in_order(seen[0], range(4))


@pytest.mark.leaks_allowed("the epoll of a closed loop")
def test_event_loops_and_threads_share_one_order(group):
    go = threading.Barrier(4)

    def loop(who):
        async def main():
            futures = []
            for number in range(100):
                futures.append(group.submit("note", (who, number)))
                if number % 10 == 0:
                    assert await futures[-1] == [(who, number)] * SIZE
            assert [(await future)[0][1] for future in futures] == list(range(100))

        go.wait(SECONDS)
        asyncio.run(main())

    def thread(who):
        go.wait(SECONDS)
        for number in range(100):
            (group.call if number % 3 else group.submit)("note", (who, number))

    works = [loop, loop, thread, thread]
    running = [in_thread(lambda w=w, who=who: w(who)) for who, w in enumerate(works)]
    for one in running:
        one.value()
    seen = group.call("take_ran")
    assert seen == [seen[0]] * SIZE
    for who in range(4):
        assert [item for item in seen[0] if item[0] == who] == [(who, n) for n in range(100)]


@pytest.mark.leaks_allowed("the epoll of a closed loop")
def test_tasks_of_a_loop_run_in_the_order_in_which_they_submitted(group):
    submitted = []

    async def one(number):
        await asyncio.sleep(0)
        future = group.submit("note", number)
        submitted.append(number)
        return await future

    async def main():
        order = list(range(200))
        random.Random(1).shuffle(order)
        return await asyncio.gather(*(one(number) for number in order))

    asyncio.run(main())
    assert group.call("take_ran") == [submitted] * SIZE


def test_a_small_call_does_not_overtake_a_large_one():
    """Megabytes take longer to send, and more of them than are sent ahead wait in the driver."""
    sizes = [0, 3 << 20, 10, 200_000, 0, 5 << 20, 1] * 4
    with WorkerGroup(Worker, SIZE) as group:
        for number, size in enumerate(sizes):
            group.submit("note", number, bytes(size))
            group[number % SIZE].submit("note", (number, "small"))
        for rank, ran in enumerate(group.call("take_ran")):
            assert ran == [
                item
                for number in range(len(sizes))
                for item in [number, (number, "small")][: 1 + (number % SIZE == rank)]
            ]


def test_one_rank_that_is_slow_changes_no_order(group, fifo):
    """Rank 0 is held while far more calls are made than are sent ahead; the others go on."""
    held = group[0].submit("hold", fifo, "held")
    for number in range(3 * AHEAD):
        group.submit("note", number)
        group[1:].submit("note", (number, "others"))
    ahead = group[1:].options(timeout=SECONDS).call("take_ran")
    both = [item for number in range(3 * AHEAD) for item in (number, (number, "others"))]
    assert ahead == [both, both]
    with open(fifo, "wb"):
        pass
    held.result(SECONDS)
    assert group[0].call("take_ran") == ["held", *range(3 * AHEAD)]


def test_what_is_dropped_leaves_the_order_of_the_rest_as_it_was(group, tmp_path):
    """Cancelled calls, and those whose deadline passes in the queue, run nowhere."""
    fifos = [str(tmp_path / str(rank)) for rank in range(SIZE)]
    for rank, path in enumerate(fifos):
        os.mkfifo(path)
        group[rank].submit("hold", path, "held")
    futures = [group.submit("note", number) for number in range(AHEAD)]
    doomed, kept = [], []
    for number in range(AHEAD, 2 * AHEAD):
        if number % 3:
            kept.append(group.submit("note", number))
        elif number % 2:
            doomed.append(group.submit("note", number))
        else:
            futures.append(group.options(timeout=0.01).submit("note", number))
    assert all(future.cancel() for future in doomed)
    for future in futures[AHEAD:]:
        with pytest.raises(CallTimeout):
            future.result(SECONDS)
    for path in fifos:
        with open(path, "wb"):
            pass
    kept[-1].result(SECONDS)
    expected = ["held", *range(AHEAD), *(n for n in range(AHEAD, 2 * AHEAD) if n % 3)]
    assert group.call("take_ran") == [expected] * SIZE


def test_a_call_from_a_callback_comes_after_all_that_was_submitted_before_it(group, fifo):
    heard = threading.Event()
    futures = []

    def follow(future):
        futures.append(group.submit("note", "from the callback"))
        heard.set()

    first = group[0].submit("hold", fifo, "held")
    first.add_done_callback(follow)
    for number in range(10):
        group.submit("note", number)
    with open(fifo, "wb"):
        pass
    assert heard.wait(SECONDS)
    group.submit("note", "after")
    expected = [*range(10), "from the callback", "after"]
    assert group.call("take_ran") == [["held", *expected], expected, expected]
