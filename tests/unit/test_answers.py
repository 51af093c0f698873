"""From a settled call to a value or an exception: the texts that users read."""

from __future__ import annotations

import types

import pytest

from rankwise._answers import broken, explain, slow_text, take, timeout_error
from rankwise._calls import Broken, Call, Cancelled, Closed, Expired, Garbled, Lost, Stuck
from rankwise._messages import ACK, FAILED, OK, Exited, Told
from rankwise._outcome import Failed, encode_failure
from rankwise._report import RankReport, look
from rankwise.errors import (
    CallTimeout,
    GroupBroken,
    GroupClosed,
    RemoteError,
    WorkerDied,
    WorkerGroupError,
)
from rankwise.wire.codec import encode_result

STACK = """Current thread 0x1 (most recent call first):
  File "/a/shard.py", line 88 in all_reduce
"""


class FakeRanks:
    def __init__(self):
        self.states = {}
        self.pids = {}
        self.reports = {}

    def pid(self, rank):
        return 100 + rank

    def phase(self, rank):
        return "ready"

    def running(self, rank):
        return 9

    def process(self, rank):
        return None

    def state(self, rank, call_id=None):
        return self.states.get(rank, ("running", 2.04))


def make_engine(name, world_size):
    owed = dict.fromkeys(range(world_size), make_call())
    return types.SimpleNamespace(
        name=name,
        outlook=None,
        retired=False,
        world_size=world_size,
        ranks=FakeRanks(),
        arena=None,
        owed=lambda: owed,
    )


@pytest.fixture
def engine():
    return make_engine("gpt", 3)


def make_call(*answers, error=None, **options):
    call = Call("forward", b"", (0, 1, 2), **options)
    call.id = 9
    call.answers = dict(answers)
    call.error = error
    call.done = True
    return call


def ok(rank, value):
    return rank, (OK, encode_result(value))


def bad(rank, error, when):
    failed = Failed(error)
    failed.when = when
    return rank, (FAILED, encode_failure(failed))


def test_values_come_in_the_order_of_the_ranks(engine):
    assert take(make_call(ok(2, "c"), ok(0, "a"), ok(1, "b")), engine) == ["a", "b", "c"]


def test_a_bare_value(engine):
    call = Call("forward", b"", (1,), shape=1)
    call.answers = dict([ok(1, "x")])
    assert take(call, engine) == "x"


def test_the_value_of_the_rank_that_replies(engine):
    call = make_call((0, (ACK, b"")), ok(1, "x"), (2, (ACK, b"")), reply_from=1, shape=1)
    assert take(call, engine) == "x"
    del call.answers[0], call.answers[2]
    assert take(call, engine) == "x"


def test_the_earliest_failure_by_the_workers_clock_is_raised(engine):
    call = make_call(bad(0, ValueError("late"), 5.0), bad(2, KeyError("early"), 4.0), ok(1, "fine"))
    with pytest.raises(KeyError, match="early") as caught:
        take(call, engine)
    assert list(caught.value.failures) == [2, 0], "in the order in which they happened"
    assert type(caught.value.failures[0]) is ValueError
    assert caught.value.failures[2] is caught.value


def test_at_the_same_moment_the_lower_rank_is_raised(engine):
    call = make_call(bad(2, ValueError(2), 4.0), bad(1, ValueError(1), 4.0))
    with pytest.raises(ValueError) as caught:
        take(call, engine)
    assert caught.value.args == (1,)


def test_exceptions_as_values(engine):
    call = make_call(ok(0, 1), bad(1, ValueError("x"), 1.0), ok(2, 3), return_exceptions=True)
    values = take(call, engine)
    assert values[::2] == [1, 3]
    assert type(values[1]) is ValueError


def test_exceptions_as_values_when_the_group_breaks(engine):
    lost = Lost(2, None, "forward", 9)
    call = make_call(ok(0, 1), error=lost, return_exceptions=True)
    values = take(call, engine)
    assert values[0] == 1
    assert type(values[1]) is GroupBroken
    assert type(values[2]) is WorkerDied


def test_a_result_that_cannot_be_rebuilt(engine):
    call = make_call(ok(0, 1), (1, (OK, b"no pickle")), ok(2, 3))
    with pytest.raises(RemoteError) as caught:
        take(call, engine)
    assert str(caught.value).startswith(
        "the result of rank 1 (pid 101) in forward could not be rebuilt in the driver: "
    )
    call.return_exceptions = True
    assert type(take(call, engine)[1]) is RemoteError


def test_a_deadline_that_passed(engine):
    engine.ranks.states = {1: ("running", 2.04), 2: ("stopped", 7.0)}
    call = make_call(ok(0, 1), error=Expired((1, 2)), timeout=30)
    with pytest.raises(CallTimeout) as caught:
        take(call, engine)
    assert str(caught.value) == (
        "forward() has 1 of 3 answers after 30.0 s; waiting for ranks 1, 2 of gpt\n"
        "  rank 1: pid 101, running forward() for 2.0 s\n"
        "  rank 2: pid 102, stopped in forward() for 7.0 s"
    )
    assert caught.value.states == {1: "running", 2: "stopped"}
    assert caught.value.seconds == {1: 2.04, 2: 7.0}
    assert (caught.value.answered, caught.value.missing) == ((0,), (1, 2))


def test_a_deadline_is_told_with_what_was_found_out_when_it_passed(engine):
    expired = Expired((1,))
    stack = 'Stack (most recent call first):\n  File "/a/shard.py", line 88 in all_reduce\n'
    expired.reports = {
        1: RankReport(
            1, 4127, "running", process="S", running=9, seconds=29.84, method="load",
            cpu=0.031, stack=stack, last_line="compiling kernels",
        ),
    }  # fmt: skip
    call = Call("load", b"", (0, 1), timeout=30.0)
    call.id = 9
    call.answers = dict([ok(0, 1)])
    call.error = expired
    with pytest.raises(CallTimeout) as caught:
        take(call, engine)
    error = caught.value
    assert str(error) == (
        "load() has 1 of 2 answers after 30.0 s; waiting for rank 1 of gpt\n"
        "  rank 1: pid 4127, running load() for 29.8 s, in shard.py:88 all_reduce; "
        'last line: "compiling kernels"; asleep, 3% CPU'
    )
    assert (error.answered, error.missing) == ((0,), (1,))
    assert (error.states, error.seconds) == ({1: "running"}, {1: 29.84})
    assert (error.cpu, error.stacks) == ({1: 0.031}, {1: stack})
    assert (error.last_lines, error.reasons) == ({1: "compiling kernels"}, {})


def test_a_slow_call_is_told_like_a_late_one(engine):
    reports = {2: RankReport(2, 102, "running", running=9, seconds=61.0, method="load")}
    assert slow_text(make_call(ok(0, 1), ok(1, 1)), engine, 60.0, reports) == (
        "forward() takes longer than 60.0 s: it has 2 of 3 answers; waiting for rank 2 of gpt\n"
        "  rank 2: pid 102, running forward() for 61.0 s"
    )


def test_many_missing_ranks_are_not_all_listed_in_the_first_line():
    engine = make_engine("big", 20)
    call = Call("load", b"", tuple(range(20)))
    call.id = 9
    error = timeout_error(call, engine, "why")
    first = str(error).splitlines()[0]
    assert first == (
        "load() has 0 of 20 answers: why; waiting for ranks "
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ... of big"
    )
    assert error.missing == tuple(range(20))


def test_a_closed_group(engine):
    refused = explain(Closed(), None, engine)
    assert type(refused) is GroupClosed
    assert str(refused) == "gpt is closed and takes no more calls: make a new group"
    error = explain(Closed(), make_call(), engine)
    assert type(error) is GroupClosed
    assert str(error) == "forward() of gpt was not answered: the group was closed"
    refused = explain(Closed(exiting=True), None, engine)
    assert str(refused) == "gpt takes no more calls: the interpreter is exiting"


def test_a_cancelled_call(engine):
    error = explain(Cancelled(), make_call(), engine)
    assert type(error) is GroupClosed
    assert str(error) == "forward() of gpt was not sent: the group was shut down"


def exited(**fields):
    given = {
        "rank": 1,
        "pid": 101,
        "exitcode": -9,
        "peak_rss": 3 << 30,
        "oom_killed": True,
        "log_tail": "loading\ncompiling kernels\n\n",
        "stack": None,
    }
    return Exited(**{**given, **fields})


def test_a_death_under_an_open_call(engine):
    error = explain(Lost(1, exited(), "forward", 9), make_call(), engine)
    assert type(error) is WorkerDied
    assert str(error) == (
        "gpt: rank 1 (pid 101) was killed by SIGKILL by the kernel, which ran out of memory "
        "(it had 3.0 GiB resident) in forward() (call 9); its last line: 'compiling kernels'"
    )
    assert (error.rank, error.pid, error.exitcode, error.signal) == (1, 101, -9, 9)
    assert (error.method, error.call_id, error.oom_killed) == ("forward", 9, True)
    assert error.log_tail == "loading\ncompiling kernels\n\n"
    assert error.peak_rss == 3 << 30


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (exited(exitcode=3, oom_killed=None, log_tail=""),
         "gpt: rank 1 (pid 101) exited with status 3 while idle"),
        (exited(exitcode=-11, oom_killed=False, log_tail=" \n"),
         "gpt: rank 1 (pid 101) was killed by SIGSEGV while idle"),
        (exited(exitcode=-7, oom_killed=False, log_tail=""),
         ("gpt: rank 1 (pid 101) was killed by SIGBUS while idle; SIGBUS often means that "
         "/dev/shm or another mapped file is full")),
        (None, "gpt: rank 1 (pid 101) ended (its exit status is not known) while idle"),
    ],
)  # fmt: skip
def test_a_death_while_idle(engine, report, text):
    error = broken(Lost(1, report, None, None), engine)
    assert type(error) is GroupBroken
    assert str(error) == f"{text}. gpt is broken and takes no more calls: make a new group"
    assert type(error.first) is WorkerDied
    assert str(error.first) == text
    assert error.__cause__ is error.first


def test_a_long_last_line_is_cut(engine):
    error = broken(Lost(1, exited(log_tail="x" * 5000), None, None), engine)
    assert f"its last line: '{'x' * 200}'" in str(error)
    assert "x" * 201 not in str(error)


def test_a_call_that_another_ranks_death_ended(engine):
    error = explain(Broken(Lost(1, exited(), "load", 4)), make_call(), engine)
    assert type(error) is GroupBroken
    assert type(error.first) is WorkerDied


def test_each_time_it_is_a_new_object(engine):
    cause = Lost(1, exited(), "load", 4)
    assert broken(cause, engine) is not broken(cause, engine)


def test_a_rank_that_did_not_leave_a_failed_call(engine):
    call = make_call(bad(0, ValueError("no"), 1.0), grace=2.5)
    error = broken(Stuck(call, 0, call.answers[0][1], (1, 2)), engine)
    assert str(error) == (
        "gpt: rank 0 (pid 100) failed in forward() (ValueError: no), and ranks 1, 2 had not "
        "returned from it 2.5 s later (option grace). gpt is broken and takes no more calls: make "
        "a new group"
    )
    assert type(error.first) is ValueError
    assert error.first.args == ("no",)
    assert error.__cause__ is error.first
    assert error.stacks == {}


def test_where_the_ranks_are_that_did_not_leave_it(engine):
    call = make_call(bad(0, ValueError("no"), 1.0), grace=2.5)
    stuck = Stuck(call, 0, call.answers[0][1], (1, 2))
    stuck.reports = look(engine, (1, 2))
    stuck.reports[1].hear(Told(1, 1, STACK, None, "reducing"))
    stuck.reports[2].hear(Told(1, 2, None, "it is stopped", ""))
    error = broken(stuck, engine)
    assert str(error) == (
        "gpt: rank 0 (pid 100) failed in forward() (ValueError: no), and ranks 1, 2 had not "
        "returned from it 2.5 s later (option grace)\n"
        "  rank 1: pid 101, running forward() for 2.0 s, in shard.py:88 all_reduce; "
        'last line: "reducing"\n'
        "  rank 2: pid 102, running forward() for 2.0 s, no stack (it is stopped)\n"
        "gpt is broken and takes no more calls: make a new group"
    )
    assert error.stacks == {1: STACK, 2: None}


def test_a_rank_that_talks_nonsense(engine):
    error = broken(Garbled(2, "frame 7 came where 5 was due"), engine)
    assert str(error).startswith("gpt: rank 2 (pid 102): frame 7 came where 5 was due. gpt is brok")
    assert type(error.first) is WorkerGroupError


def test_a_launcher_that_is_gone(engine):
    error = broken(Garbled(-1, "process 5 was killed by SIGKILL"), engine)
    assert str(error).startswith("gpt: process 5 was killed by SIGKILL. gpt is br")
