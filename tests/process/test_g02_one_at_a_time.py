"""Guarantee 2: ordinary methods run one at a time on the worker's main thread, and never twice."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest
from drivers import SECONDS, Script, in_thread, remove_fifo, until
from g02_one_at_a_time_ranks import Travels, Worker, whereabouts

from rankwise import CallTimeout, WorkerDied, WorkerGroup

SIZE = 2
AHEAD = 64  # so many calls are sent ahead to a rank: what comes after them is queued


MAIN = (True, True, True)


@pytest.fixture(scope="module")
def shared():
    group = WorkerGroup(Worker, SIZE, name="one")
    # The callback thread lives as long as the group: no test that comes to need it leaks it.
    group.submit("take_ran").add_done_callback(lambda future: future.result())
    group.flush()
    yield group
    group.kill()


@pytest.fixture
def group(shared):
    shared.call("take_ran")
    return shared


@pytest.fixture
def fifo(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    yield path
    remove_fifo(path)


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_all_of_the_users_code_runs_on_the_main_thread(start_method, tmp_path):
    """CUDA contexts, signal handlers and most C libraries' state belong to one thread."""
    path = str(tmp_path / "exit")

    def by_value(worker):
        return whereabouts()

    with WorkerGroup(Worker, SIZE, start_method=start_method) as group:
        assert group.call("where") == [MAIN] * SIZE
        assert group.call(by_value) == [MAIN] * SIZE
        assert group.submit(Worker.where).result() == [MAIN] * SIZE
        assert in_thread(lambda: group[0].call("where")).value() == MAIN
        assert group.call(lambda worker: worker.threads) == [
            {"__init__": MAIN, "__enter__": MAIN}
        ] * SIZE  # fmt: skip
        group.call("tell_at_exit", path)
    for rank in range(SIZE):
        with open(f"{path}.{rank}") as file:
            assert file.read() == repr(MAIN)


def test_arguments_are_rebuilt_and_results_pickled_on_the_main_thread_too(group):
    """`__setstate__` and `__reduce__` are the user's code as well."""
    assert group.call(lambda worker, got: got.rebuilt, Travels()) == [MAIN] * SIZE
    assert [made.reduced for made in group.call(lambda worker: Travels())] == [MAIN] * SIZE


@pytest.mark.leaks_allowed("the epoll of a closed loop")
def test_calls_from_threads_loops_and_views_never_overlap(group):
    count = 150

    def calls(who):
        return [answer for n in range(count) for answer in group.call("alone", (who, n))]

    def submits(who):
        futures = [group[n % SIZE].submit("alone", (who, n)) for n in range(count)]
        return [future.result(SECONDS) for future in futures]

    def awaits(who):
        async def main():
            futures = [group.submit("alone", (who, n)) for n in range(count)]
            return [answer for future in futures for answer in await future]

        return asyncio.run(main())

    works = [calls, submits, awaits, calls, submits]
    running = [in_thread(lambda w=w, who=who: w(who)) for who, w in enumerate(works)]
    for thread in running:
        assert set(thread.value()) == {(1, True)}
    for rank, ran in enumerate(group.call("take_ran")):
        mine = count // SIZE + (rank < count % SIZE)
        assert Counter(who for who, _ in ran) == {0: count, 1: mine, 2: count, 3: count, 4: mine}
        assert len(set(ran)) == len(ran), "never twice"


def test_one_at_a_time_is_a_promise_of_each_rank_and_not_of_the_group(group, fifo):
    """Ranks run side by side: each end of the fifo opens only while the other is being opened."""
    futures = [group[0].submit("meet", fifo, "wb"), group[1].submit("meet", fifo, "rb")]
    assert [future.result(SECONDS) for future in futures] == [True, True]


def test_a_call_whose_caller_has_left_is_not_overlapped_by_the_next(group, fifo):
    """By its deadline, its patience or a cancel: the worker ends it before it begins another."""
    expired = group[0].options(timeout=0.05).submit("hold", fifo)
    with pytest.raises(CallTimeout):
        expired.result(SECONDS)
    after = group[0].submit("alone", "after the deadline")
    with pytest.raises(CallTimeout):
        after.result(0.05)
    assert after.cancel() is False  # it was sent ahead
    with open(fifo, "wb"):
        pass
    assert after.result(SECONDS) == (1, True)
    assert group[0].call("take_ran") == ["after the deadline"]


@pytest.mark.parametrize("error", [LookupError("x"), SystemExit(3), KeyboardInterrupt()])
def test_a_call_that_fails_is_not_tried_again(group, error):
    futures = [group.submit("fails", error, number) for number in range(20)]
    assert all(future.exception(SECONDS) is not None for future in futures)
    assert group.call("where") == [MAIN] * SIZE
    assert group.call("take_ran") == [list(range(20))] * SIZE


def test_a_call_that_was_dropped_runs_nowhere_and_the_others_once(group, tmp_path):
    fifos = [str(tmp_path / str(rank)) for rank in range(SIZE)]
    for rank, path in enumerate(fifos):
        os.mkfifo(path)
        group[rank].submit("hold", path)
    futures = [group.submit("alone", number) for number in range(3 * AHEAD)]
    cancelled = {number for number, future in enumerate(futures) if number % 2 and future.cancel()}
    assert len(cancelled) >= AHEAD
    assert all(futures[number].cancel() for number in cancelled), "again it says the same"
    for path in fifos:
        with open(path, "wb"):
            pass
    left = [number for number in range(3 * AHEAD) if number not in cancelled]
    for number in left:
        assert futures[number].result(SECONDS) == [(1, True)] * SIZE
    assert group.call("take_ran") == [left] * SIZE


def test_a_call_that_kills_a_rank_is_given_to_nobody_again(tmp_path):
    path = str(tmp_path / "ran")
    with WorkerGroup(Worker, SIZE, logs="off") as group:
        with pytest.raises(WorkerDied):
            group.call("write_then_die", path)
        until(lambda: not group.healthy)
    for rank in range(SIZE):
        with open(f"{path}.{rank}") as file:
            assert file.read() == "x"


STRUCK = """
class Worker:
    def __init__(self): self.ran = []
    def note(self, item): self.ran.append(item)
    def take(self): return self.ran

class Struck(Exception): pass
armed = False
def handler(*args):
    if armed:
        raise Struck

import random
chance = random.Random(7)
with WorkerGroup(Worker, 2) as group:
    signal.signal(signal.SIGALRM, handler)
    surely, perhaps, struck = [], [], 0
    verbs = [group.submit, group.call, group.submit_each, group[1].submit]
    for number in range(3000):
        item = (number, number % 4)
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 150e-6))
            verbs[number % 4]("note", item)
            armed = False
            surely.append(item)
        except Struck:
            armed = False
            struck += 1
            perhaps.append(item)
    signal.setitimer(signal.ITIMER_REAL, 0)
    group.flush(20)
    say(ran=group.call("take"), surely=surely, perhaps=perhaps, struck=struck)
"""


def test_a_call_that_was_struck_by_a_signal_runs_at_most_once():
    """An exception out of a handler may cut `submit` short anywhere: the caller cannot know whether
    the call was made, but it is never made twice, and it is made on all of its ranks or on none."""
    with Script(STRUCK) as script:
        said = script.line(30)
        assert script.end() == 0
    assert said["struck"] > 20, "nothing was struck"
    first, second = ([tuple(item) for item in ran] for ran in said["ran"])
    surely = [tuple(item) for item in said["surely"]]
    for ran in (first, second):
        assert len(set(ran)) == len(ran), "never twice"
        assert ran == sorted(ran), "in order"
    assert {item for item in surely if item[1] != 3} <= set(first)
    assert set(surely) <= set(second)
    assert [item for item in second if item[1] != 3] == first, "on all of its ranks or on none"
