"""stacks(): where every rank is, whatever it is doing."""

from __future__ import annotations

import re
import time

from contract_worker import Worker
from untold import whole

from rankwise import RankStack, Stacks


def stacks_at_gate(group, *ranks):
    """The stacks, once `ranks`, which have opened the gate, have got as far as to read from it."""
    until = time.monotonic() + 10
    while True:
        stacks = whole(group)
        places = {stacks[rank].place for rank in ranks}
        if (len(places) == 1 and places != {""}) or time.monotonic() > until:
            return stacks


def test_the_stacks_of_ranks_in_a_call(group, gate):
    future = group[0:2].submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1)
    stacks = stacks_at_gate(group, 0, 1)
    assert type(stacks) is Stacks
    assert [type(each) for each in stacks] == [RankStack] * 3
    assert [each.rank for each in stacks] == [0, 1, 2]
    assert [each.pid for each in stacks] == group.pids
    assert [each.state for each in stacks] == ["running", "running", "idle"]
    assert [each.method for each in stacks] == ["pass_gate", "pass_gate", None]
    assert all(0 < each.seconds < 60 for each in stacks[:2])
    assert all("in pass_gate" in each.stack for each in stacks[:2])
    assert [each.reason for each in stacks] == [None] * 3
    where = re.match(
        r"ranks 0, 1 at contract_worker\.py:(\d+) pass_gate; rank 2 idle\n\n"
        r'ranks 0, 1:\n  File "[^"]*contract_worker\.py", line (\d+) in pass_gate\n\nrank 2:\n',
        str(stacks),
    )
    assert where and where[1] == where[2]
    assert stacks[0].place == f"contract_worker.py:{where[1]} pass_gate"
    gate.open(0, 1)
    assert future.result() == [0, 1], "whoever was asked goes on"


def test_ranks_in_different_places_are_told_apart(group, gate):
    one = group[0].submit(Worker.pass_gate, gate.path)
    other = group[2].submit(Worker.cancelled_at_gate, gate.path)
    gate.entered(0, 2)
    assert re.fullmatch(
        r"rank 0 at contract_worker\.py:\d+ pass_gate; rank 1 idle; "
        r"rank 2 at contract_worker\.py:\d+ pass_gate, by way of "
        r"contract_worker\.py:\d+ cancelled_at_gate",
        stacks_at_gate(group, 0, 2).difference(),
    )
    gate.open(0, 2)
    assert (one.result(), other.result()) == (0, False)


def test_the_stacks_of_an_idle_group(group):
    group.flush()
    stacks = whole(group)
    assert stacks.difference() == "ranks 0, 1, 2 idle"
    assert [each.place for each in stacks] == [""] * 3
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_a_closed_group_has_no_stacks_and_says_so(make):
    group = make()
    group.close()
    stacks = group.stacks()
    assert [(each.state, each.stack) for each in stacks] == [("dead", None)] * 2
    assert all(each.reason for each in stacks)
