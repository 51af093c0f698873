"""GroupFuture on real processes, as users of concurrent.futures and asyncio expect it.

The contract's tests have its verbs one by one; here are those of its promises that need several
waiters at once, a thread that is busy, or a process that goes on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import signal
import threading
import time
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION

import pytest
from drivers import SECONDS, in_thread, open_fifo, remove_fifo, until
from futures_ranks import Worker

from rankwise import CallTimeout, WorkerDied, WorkerGroup

AHEAD = 64  # so many calls are sent ahead to a rank: what comes after them is queued


class Gate:
    """Where a call of `hold` waits: `entered` returns once one waits, `open` lets it go."""

    def __init__(self, path):
        self.path = str(path)
        os.mkfifo(self.path)
        self._end = None

    def entered(self):
        self._end = open_fifo(self.path)

    def open(self):
        if self._end is None:
            self.entered()
        os.close(self._end)
        self._end = None

    def remove(self):
        remove_fifo(self.path)
        if self._end is not None:
            os.close(self._end)


@pytest.fixture(scope="module")
def shared():
    group = WorkerGroup(Worker, 2, name="futures")
    # The callback thread lives as long as the group: no test that comes to need it leaks it.
    group.submit("echo", 0).add_done_callback(lambda future: future.result())
    group.flush()
    yield group
    group.kill()


@pytest.fixture
def group(shared):
    shared.options(timeout=SECONDS).call("take_ran")
    yield shared
    assert shared.options(timeout=SECONDS).call("echo", "still usable") == ["still usable"] * 2


@pytest.fixture
def gates(tmp_path):
    made = [Gate(tmp_path / f"gate{number}") for number in range(3)]
    yield made
    for gate in made:
        gate.remove()


class BusyCallback:
    """Keeps the callback thread busy from `with` on, until `let_go`."""

    def __init__(self, group):
        self._group = group
        self._entered = threading.Event()
        self._go = threading.Event()

    def __enter__(self):
        future = self._group[0].submit("until_cancelled")
        future.add_done_callback(lambda future: (self._entered.set(), self._go.wait(SECONDS)))
        assert future.cancel() is False
        assert self._entered.wait(SECONDS)
        return self

    def __exit__(self, *error):
        self._go.set()

    let_go = __exit__


# -- wait and as_completed --------------------------------------------------------------------


@pytest.mark.parametrize("when", [ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION])
def test_wait_returns_no_earlier_than_it_says(group, gates, when):
    """A call that is done, and whose waiters the busy callback thread has not told yet, is counted
    as done at once; when it is told of at last, that must not count for another one."""
    done = group[0].submit("echo", 1)
    done.add_done_callback(lambda future: None)
    done.result(SECONDS)
    with BusyCallback(group) as busy:
        early = group[0].submit("echo", 1)
        early.add_done_callback(lambda future: None)
        early.result(SECONDS)
        held = group[1].submit("hold", gates[0].path)
        gates[0].entered()
        waits = in_thread(lambda: concurrent.futures.wait([early, held], SECONDS, when))
        if when == FIRST_COMPLETED:
            assert waits.value() == ({early}, {held})
        else:
            until(lambda: held.__dict__.get("_condition") and held._waiters, what="it waits")
        busy.let_go()
        group[0].call("echo", 2)
        settled = threading.Event()
        group[0].submit("echo", 3).add_done_callback(lambda future: settled.set())
        assert settled.wait(SECONDS)  # all that was to be told before has been told
        gates[0].open()
        if when != FIRST_COMPLETED:
            assert waits.value() == ({early, held}, set())
    assert held.result(SECONDS) == "held"


def test_wait_sees_one_state_while_it_holds_the_futures(group, gates, monkeypatch):
    """It looks at the states, then counts what is open and leaves its waiter: a call that is
    settled in between must be either done for both or open for both, else nobody ends the wait."""
    import concurrent.futures._base as base

    install = base._create_and_install_waiters

    def settle_in_between(fs, when):
        gates[0].open()
        until(lambda: all(future.done() for future in fs))
        return install(fs, when)

    monkeypatch.setattr(base, "_create_and_install_waiters", settle_in_between)
    future = group[0].submit("hold", gates[0].path)
    gates[0].entered()
    led = in_thread(lambda: future.result(SECONDS))  # so that it settles, whatever `wait` does
    assert in_thread(lambda: concurrent.futures.wait([future])).value() == ({future}, set())
    led.value()

    future = group[0].submit("hold", gates[0].path)
    gates[0].entered()
    led = in_thread(lambda: future.result(SECONDS))
    assert in_thread(lambda: list(concurrent.futures.as_completed([future]))).value() == [future]
    led.value()


def test_wait_with_a_timeout_leaves_the_calls_going(group, gates):
    held = group[0].submit("hold", gates[0].path)
    other = group[1].submit("echo", 1)
    done, rest = concurrent.futures.wait([held, other], timeout=0.05)
    assert held in rest
    gates[0].open()
    assert concurrent.futures.wait([held, other], timeout=SECONDS) == ({held, other}, set())
    assert (held.result(0), other.result(0)) == ("held", 1)
    assert done <= {other}


def test_as_completed_gives_each_future_once_in_the_order_of_their_ends(group, gates):
    first = group[0].submit("hold", gates[0].path)
    second = group[1].submit("hold", gates[1].path)
    third = group[1].submit("hold_and_fail", gates[2].path)
    completed = concurrent.futures.as_completed([third, first, second, first], timeout=SECONDS)
    gates[1].open()
    assert next(completed) is second
    gates[2].open()
    assert next(completed) is third
    gates[0].open()
    assert list(completed) == [first]
    assert isinstance(third.exception(0), LookupError)


def test_as_completed_runs_out_of_patience_and_the_calls_go_on(group, gates):
    held = group[0].submit("hold", gates[0].path)
    with pytest.raises(concurrent.futures.TimeoutError):
        list(concurrent.futures.as_completed([held], timeout=0.05))
    assert not held.done()
    gates[0].open()
    assert held.result(SECONDS) == "held"


def test_futures_of_a_group_and_of_an_executor_are_waited_for_together(group, gates):
    held = group[0].submit("hold", gates[0].path)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        opens = pool.submit(gates[0].open)
        done, rest = concurrent.futures.wait([held, opens], timeout=SECONDS)
    assert (done, rest) == ({held, opens}, set())


def test_wait_hears_of_a_death(gates):
    with WorkerGroup(Worker, 2, logs="off") as group:
        futures = group.submit_each("hold", gates[0].path)
        waits = in_thread(lambda: concurrent.futures.wait(futures))
        until(lambda: futures[1].__dict__.get("_condition") and futures[1]._waiters)
        os.kill(group.pids[1], signal.SIGKILL)
        assert waits.value(5) == (set(futures), set())
        assert isinstance(futures[1].exception(0), WorkerDied)


# -- patience ---------------------------------------------------------------------------------


def test_patience_ends_one_waiter_and_nobody_else(group, gates):
    """`result(timeout)` raises and leaves the call going: other waiters, callbacks and the worker
    do not hear of it."""
    heard = threading.Event()
    future = group[0].submit("hold", gates[0].path)
    future.add_done_callback(lambda future: heard.set())
    patient = in_thread(lambda: future.result(SECONDS))
    gates[0].entered()
    for ask in (future.result, future.exception):
        began = time.monotonic()
        with pytest.raises(CallTimeout) as caught:
            ask(0.05)
        assert 0.045 < time.monotonic() - began < 5
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, concurrent.futures.TimeoutError)
    assert (future.done(), future.running(), future.cancelled()) == (False, True, False)
    assert not heard.is_set()
    assert group[1].call("echo", "meanwhile") == "meanwhile"
    gates[0].open()
    assert patient.value() == "held"
    assert heard.wait(SECONDS)
    assert future.result(0) == "held"


def test_an_impatient_waiter_that_led_hands_the_lead_on(group, gates):
    """The first who waits reads the sockets for all. When it leaves, the next goes on."""
    future = group[0].submit("hold", gates[0].path)
    gates[0].entered()
    impatient = in_thread(lambda: future.result(0.2))
    others = [in_thread(lambda: future.result(SECONDS)) for _ in range(4)]
    with pytest.raises(CallTimeout):
        impatient.value()
    gates[0].open()
    assert [other.value() for other in others] == ["held"] * 4


def test_no_patience_at_all_is_a_look(group, gates):
    future = group[0].submit("hold", gates[0].path)
    with pytest.raises(CallTimeout):
        future.result(0)
    with pytest.raises(CallTimeout):
        future.exception(timeout=0)
    gates[0].open()
    future.result(SECONDS)
    assert future.result(0) == future.result(timeout=None) == "held"


# -- done, running, cancel ----------------------------------------------------------------------


def test_the_states_follow_the_call(group, gates):
    held = group[0].submit("hold", gates[0].path)
    gates[0].entered()
    queued = [group[0].submit("echo", number) for number in range(AHEAD + 5)][-1]

    def states(future):
        return future.running(), future.done(), future.cancelled()

    assert states(held) == (True, False, False)
    assert states(queued) == (False, False, False)
    assert queued.cancel() is True
    assert states(queued) == (False, True, True)
    assert held.cancel() is False
    assert states(held) == (True, False, False)
    gates[0].open()
    held.result(SECONDS)
    assert states(held) == (False, True, False)
    assert held.cancel() is False
    group.flush(SECONDS)
    assert AHEAD + 4 not in group[0].call("take_ran")


@pytest.mark.parametrize("wait", ["result", "exception", "wait", "as_completed", "callback"])
def test_cancel_ends_a_wait_that_has_begun(group, gates, wait):
    held = [group[rank].submit("hold", gates[rank].path) for rank in range(2)]
    for _ in range(AHEAD + 5):
        group.submit("echo", 1)
    queued = group.submit("echo", "dropped")
    begun = threading.Event()

    def waits():
        if wait == "callback":
            heard = threading.Event()
            queued.add_done_callback(lambda future: heard.set())
            begun.set()
            return heard.wait(SECONDS)
        begun.set()
        if wait == "wait":
            return concurrent.futures.wait([queued]) == ({queued}, set())
        if wait == "as_completed":
            return list(concurrent.futures.as_completed([queued])) == [queued]
        with pytest.raises(concurrent.futures.CancelledError):
            getattr(queued, wait)()
        return True

    waiter = in_thread(waits)
    assert begun.wait(SECONDS)
    assert queued.cancel() is True
    assert waiter.value(5) is True
    for rank in range(2):
        gates[rank].open()
        held[rank].result(SECONDS)
    assert all("dropped" not in ran for ran in group.call("take_ran"))


def test_cancelling_what_runs_leaves_its_waiters_waiting_for_its_value(group):
    future = group.submit("until_cancelled")
    waiter = in_thread(lambda: future.result(SECONDS))
    until(future.running)
    assert future.cancel() is False
    assert waiter.value() == ["saw it"] * 2
    assert not future.cancelled()


# -- callbacks ----------------------------------------------------------------------------------


def test_all_callbacks_run_on_one_thread_that_holds_no_socket(group, gates):
    """A callback that blocks delays callbacks, and no call of anybody."""
    names = []
    last = threading.Event()
    with BusyCallback(group):
        futures = [group.submit("echo", number) for number in range(20)]
        for future in futures:
            future.add_done_callback(lambda future: names.append(threading.current_thread()))
        futures[-1].add_done_callback(lambda future: last.set())
        # The callback thread is busy: calls go on, in this thread and in others.
        assert group.options(timeout=SECONDS).call("echo", "on") == ["on"] * 2
        assert in_thread(lambda: group[0].call("echo", "too")).value() == "too"
        already = len(names)
    assert last.wait(SECONDS)
    mine = threading.current_thread()
    threads = set(names) - {mine}  # at once in the caller's where the call was done already
    assert len(names) == 20 and already == names.count(mine)
    assert {thread.name for thread in threads} <= {"rankwise-futures-callbacks"}


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_what_a_callback_raises_is_logged_and_the_next_ones_run(group, gates, caplog, error):
    def fail(future):
        raise error("of a callback")

    after = threading.Event()
    other = threading.Event()
    future = group[0].submit("hold", gates[0].path)
    future.add_done_callback(fail)
    future.add_done_callback(lambda future: after.set())
    with caplog.at_level(logging.ERROR):
        gates[0].open()
        assert after.wait(SECONDS), "a callback of the same future"
        group[1].submit("until_cancelled").cancel()
        future = group[0].submit("hold", gates[1].path)
        future.add_done_callback(lambda future: other.set())
        gates[1].open()
        assert other.wait(SECONDS), "a callback of another future"
    assert "of a callback" in caplog.text
    assert future.result(SECONDS) == "held"


def test_a_callback_is_called_once_with_its_future_whoever_waits(group):
    """Callbacks that are added while the call is being settled, by several threads."""
    calls = []
    for _ in range(100):
        future = group[0].submit("echo", 1)
        heard = [threading.Event() for _ in range(3)]

        def add(event, future=future):
            future.add_done_callback(lambda done: (calls.append(done is future), event.set()))

        threads = [in_thread(lambda event=event: add(event)) for event in heard[:2]]
        future.result(SECONDS)
        add(heard[2])
        assert all(event.wait(SECONDS) for event in heard)
        for thread in threads:
            thread.value()
    assert calls == [True] * 300


def test_a_future_with_a_callback_need_not_be_kept(group, gates):
    """Nobody but the group holds it until it is done."""
    heard = concurrent.futures.Future()
    group[0].submit("hold", gates[0].path).add_done_callback(
        lambda future: heard.set_result(future.result())
    )
    gc.collect()
    gates[0].open()
    assert heard.result(SECONDS) == "held"


def test_a_callback_may_submit_and_wait_for_calls(group, gates):
    heard = concurrent.futures.Future()

    def chain(future):
        further = group.submit("echo", future.result())
        concurrent.futures.wait([group[0].submit("echo", "aside")], timeout=0)
        heard.set_result(further.result(SECONDS))

    group[0].submit("hold", gates[0].path).add_done_callback(chain)
    gates[0].open()
    assert heard.result(SECONDS) == ["held"] * 2


# -- event loops --------------------------------------------------------------------------------

# The group keeps one descriptor of a closed loop, until the next loop comes or its own close.
awaits = pytest.mark.leaks_allowed("the epoll of a closed loop")


@awaits
def test_two_loops_and_a_thread_wait_for_one_future(group, gates):
    future = group[0].submit("hold", gates[0].path, ["one", "object"])
    awaiting = [threading.Event(), threading.Event()]

    def loop(event):
        async def main():
            task = asyncio.ensure_future(asyncio.wait_for(asyncio.shield(wait()), SECONDS))
            await asyncio.sleep(0)
            event.set()
            return await task

        async def wait():
            return await future

        return asyncio.run(main())

    loops = [in_thread(lambda event=event: loop(event)) for event in awaiting]
    plain = in_thread(lambda: future.result(SECONDS))
    assert all(event.wait(SECONDS) for event in awaiting)
    gates[0].open()
    values = [waiter.value() for waiter in (*loops, plain)]
    assert values == [["one", "object"]] * 3
    assert values[0] is values[1] is values[2], "it is decoded once"


@awaits
def test_a_loop_that_leaves_does_not_take_the_value_from_another(group, gates):
    """A cancelled waiter cancels the call, which runs already: the flag is set, the value comes."""
    future = group[0].submit("until_cancelled")
    until(future.running)
    awaiting = threading.Event()

    def stays():
        async def main():
            task = asyncio.ensure_future(wait())
            await asyncio.sleep(0)
            awaiting.set()
            return await task

        async def wait():
            return await future

        return asyncio.run(main())

    def leaves():
        async def main():
            with pytest.raises(asyncio.TimeoutError):
                async with asyncio.timeout(0.05):
                    await future

        asyncio.run(main())

    stayer = in_thread(stays)
    assert awaiting.wait(SECONDS)
    in_thread(leaves).value()
    assert stayer.value() == "saw it"


@awaits
def test_a_failure_is_the_same_for_everybody_who_asks(group, gates):
    future = group[0].submit("hold_and_fail", gates[0].path)
    gates[0].open()

    async def main():
        with pytest.raises(LookupError) as caught:
            await future
        with pytest.raises(LookupError) as wrapped:
            await asyncio.wrap_future(future)
        return caught.value, wrapped.value

    awaited, wrapped = asyncio.run(main())
    assert awaited is wrapped is future.exception(0)
    with pytest.raises(LookupError):
        future.result(0)
