"""What a rank that owes an answer is doing, in one line."""

from __future__ import annotations

import pytest

from rankwise._calls import Call
from rankwise._messages import Told
from rankwise._report import RankReport
from rankwise.logs.lines import Tail, last_line


def make_call():
    call = Call("load", b"", (0, 1))
    call.id = 9
    return call


@pytest.mark.parametrize(
    ("state", "fields", "words", "seen"),
    [
        ("running", {"running": 9, "seconds": 2.04}, "running load() for 2.0 s", "running"),
        (
            "running",
            {"running": 8, "seconds": 29.84, "method": "step"},
            "queued behind step(), running for 29.8 s",
            "queued",
        ),
        ("running", {"running": 8, "seconds": 29.84}, "queued", "queued"),
        ("idle", {"method": "step"}, "queued behind step()", "queued"),
        ("idle", {"method": "load"}, "queued", "queued"),
        ("stopped", {"running": 9, "seconds": 7.0}, "stopped in load() for 7.0 s", "stopped"),
        (
            "stopped",
            {"running": 8, "seconds": 7.0, "method": "step"},
            "stopped in step() for 7.0 s",
            "stopped",
        ),
        ("stopped", {}, "stopped", "stopped"),
        ("starting", {"phase": "import"}, "import", "starting"),
        ("closing", {"phase": "exit"}, "closing", "closing"),
        ("dead", {}, "dead", "dead"),
    ],
)
def test_what_a_rank_does_as_a_call_sees_it(state, fields, words, seen):
    report = RankReport(1, 101, state, **fields)
    call = make_call()
    assert report.line(call) == f"rank 1: pid 101, {words}"
    assert report.state_in(call) == seen
    assert report.seconds_in(call) == (fields["seconds"] if fields.get("running") == 9 else 0.0)


def test_why_there_is_no_stack_and_what_the_kernel_says():
    report = RankReport(1, 101, "running", running=9, seconds=1.0, process="D", cpu=0.0)
    report.hear(Told(1, 1, None, "it is in the kernel", "reading"))
    assert report.line(make_call()) == (
        "rank 1: pid 101, running load() for 1.0 s, no stack (it is in the kernel); "
        'last line: "reading"; asleep in the kernel (D), 0% CPU'
    )


def test_a_last_line_that_the_launcher_does_not_know_is_that_of_the_exit_report():
    report = RankReport(1, 101, "dead", last_line="killed")
    report.hear(Told(1, 1, None, "it has no process", ""))
    assert report.line(make_call()) == 'rank 1: pid 101, dead; last line: "killed"'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("\n \n", ""),
        ("one\ntwo\n\n", "two"),
        ("one\n10%\r50%", "50%"),
        ("x" * 500, "x" * 200),
    ],
)
def test_the_last_line(text, line):
    assert last_line(text) == line
    tail = Tail()
    tail.feed(text.encode())
    assert tail.last_line() == line


def test_the_last_line_behind_much_else_and_a_broken_character():
    tail = Tail()
    tail.feed(b"a\n" * 100_000 + "é last\n".encode()[1:])
    assert tail.last_line() == "\ufffd last"
