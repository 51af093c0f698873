"""The group's own soft limit: what is logged, when, and how often."""

from __future__ import annotations

import itertools
import sys

from rankwise._calls import Call
from rankwise._cpu import CpuUse, cpu_seconds
from rankwise._messages import BOOT
from rankwise._slow import SLOW_AFTER, SlowCalls

ids = itertools.count(1)


def call(method="forward", **options):
    made = Call(method, b"", (0, 1), **options)
    made.id = next(ids)  # as the ledger does when it places a call
    return made


def test_it_keeps_no_call_whose_answers_may_be_large():
    slow = SlowCalls()
    one = call()
    slow.look([one], 0.0)
    kept = sys.getrefcount(one)
    slow.look([one], SLOW_AFTER)
    other = call()
    assert sys.getrefcount(one) == kept == sys.getrefcount(other)


def test_a_call_is_told_of_once_when_it_has_taken_a_minute():
    slow = SlowCalls()
    one = call()
    assert slow.look([one, one], 100.0) == []
    assert slow.look([one], 100.0 + SLOW_AFTER - 0.1) == []
    assert slow.look([one], 100.0 + SLOW_AFTER) == [(one, SLOW_AFTER)]
    assert slow.look([one], 100.0 + 100 * SLOW_AFTER) == []


def test_what_is_queued_behind_it_has_its_own_minute():
    slow = SlowCalls()
    first, second = call("a"), call("b")
    slow.look([first], 0.0)
    assert slow.look([second], 50.0) == []
    assert slow.look([second], 109.0) == []
    assert slow.look([second], 110.0) == [(second, SLOW_AFTER)]


def test_a_method_that_has_taken_long_before_has_twice_that_time():
    slow = SlowCalls()
    epoch = call("epoch")
    slow.look([epoch], 0.0)
    assert slow.look([epoch], 60.0)
    slow.look([], 600.0)  # it has ended
    again, other = call("epoch"), call("step")
    assert slow.look([again, other], 1000.0) == []
    assert slow.look([again, other], 1060.0) == [(other, SLOW_AFTER)]
    assert slow.look([again], 2199.0) == []
    assert slow.look([again], 2200.0) == [(again, 1200.0)]


def test_calls_with_a_limit_of_their_own_and_the_start_are_left_alone():
    slow = SlowCalls()
    left = [call(slow=(5.0, 5.0)), call(slow=()), call(kind=BOOT)]
    slow.look(left, 0.0)
    assert slow.look(left, 1000.0) == []


def test_a_settled_call_is_not_told_of():
    slow = SlowCalls()
    one = call()
    slow.look([one], 0.0)
    one.done = True
    assert slow.look([one], 1000.0) == []


def test_a_program_that_makes_up_names_does_not_fill_the_memory():
    slow = SlowCalls()
    for number in range(1000):
        one = call(f"f{number}")
        slow.look([one], 0.0)
        slow.look([one], 100.0)
        slow.look([], 100.0)
    assert len(slow._longest) <= 256
    assert not slow._since and not slow._limits


# -- CPU --------------------------------------------------------------------------------------


def test_the_share_is_that_of_the_last_two_looks():
    used = {7: 10.0}
    cpu = CpuUse(used.get)
    assert cpu.share(7, 0.0) is None, "nobody has looked yet"
    cpu.sample(7, 0.0)
    assert cpu.share(7, 0.01) is None, "too short a time"
    used[7] = 10.5
    assert cpu.share(7, 1.0) == 0.5
    cpu.sample(7, 1.0)
    cpu.sample(7, 1.25)
    used[7] = 10.75
    assert cpu.share(7, 1.5) == 0.5
    assert cpu.share(7, 60.0) is None, "an old look says nothing of now"


def test_an_old_look_is_forgotten_and_so_is_a_process_that_has_ended():
    used = {7: 1.0}
    cpu = CpuUse(used.get)
    cpu.sample(7, 0.0)
    cpu.sample(7, 100.0)
    assert cpu.share(7, 100.05) is None
    del used[7]
    cpu.sample(7, 100.1)
    assert cpu.share(7, 101.0) is None


def test_the_clock_of_a_process_runs_with_it():
    import os

    before = cpu_seconds(os.getpid())
    while sum(range(10_000)) and cpu_seconds(os.getpid()) < before + 0.01:
        pass
    assert cpu_seconds(0) is None
    assert cpu_seconds(4_194_304) is None, "above every pid"
