"""options(): timeout, reply_from, return_exceptions, on_error, grace, alone and together."""

from __future__ import annotations

import concurrent.futures
import re

import pytest
from contract_worker import Worker
from untold import explained

from rankwise import CallTimeout, GroupBroken


def test_options_make_a_view_and_leave_the_group_alone(group):
    view = group.options(return_exceptions=True)
    assert view is not group
    assert len(view) == 3
    values = view.call(Worker.fail, ValueError, ranks=[0])
    assert isinstance(values[0], ValueError)
    with pytest.raises(ValueError):
        group.call(Worker.fail, ValueError, ranks=[0])


def test_options_add_up(group):
    view = group.options(return_exceptions=True).options(reply_from=1).options(timeout=50)
    value = view.call(Worker.fail, KeyError, "k", ranks=[1])
    assert type(value) is KeyError
    described = view.call(Worker.described)
    assert 0 < described[2] <= 50


def test_options_go_with_a_part_of_the_view(group):
    view = group.options(timeout=50)[1:]
    assert [0 < left <= 50 for _, _, left, _, _ in view.call(Worker.described)] == [True, True]
    assert 0 < group.options(timeout=50)[2].call(Worker.described)[2] <= 50


def test_options_of_one_rank_keep_the_bare_value(group):
    assert group[1].options(timeout=20).call(Worker.get_rank) == 1
    assert group[1].options(reply_from=1).call(Worker.get_rank) == 1
    assert group[1].options(return_exceptions=True).call(Worker.get_rank) == 1


# -- reply_from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_reply_from_gives_the_bare_value_of_that_rank_and_all_run(group, rank):
    group.call(Worker.take_seen)
    view = group.options(reply_from=rank)
    assert view.call(Worker.get_rank) == rank
    assert view.submit(Worker.get_rank).result() == rank
    assert view.submit(Worker.get_rank).rank == rank
    view.call(Worker.note, "x")
    assert group.call(Worker.take_seen) == [["x"]] * 3
    assert view.scatter(Worker.add, [0, 10, 20], 0) == 11 * rank


def test_reply_from_in_a_world_of_one_gives_the_bare_value(make):
    group = make(Worker, 1)
    assert group.options(reply_from=0).call(Worker.get_rank) == 0
    assert group.options(reply_from=0).submit(Worker.get_rank).result() == 0


def test_reply_from_in_a_list_view_of_one_gives_the_bare_value(group):
    assert group[[1]].options(reply_from=1).call(Worker.get_rank) == 1
    assert group[2:].options(reply_from=2).call(Worker.get_rank) == 2


def test_reply_from_settles_at_that_ranks_answer(group, gate):
    future = group.options(reply_from=1).submit(Worker.pass_gate, gate.path)
    gate.entered(0, 1, 2)
    gate.open(1)
    assert future.result() == 1
    gate.open(0, 2)
    group.flush()


def test_reply_from_settles_at_the_first_failure_before_it(group, gate):
    future = group.options(reply_from=1).submit(Worker.fail_or_wait, [2], gate.path)
    with pytest.raises(ValueError) as caught:
        future.result(timeout=20)
    assert caught.value.args == ("no", 2)
    gate.open(0, 1)
    group.flush()
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_a_failure_after_the_reply_is_logged(group, gate, caplog):
    def fail_later(worker, path):
        if worker.rank == 0:
            return "answer"
        worker.pass_gate(path)
        if worker.rank == 2:
            raise ValueError("after the fact")

    view = group.options(reply_from=0)
    assert view.call(fail_later, gate.path) == "answer"
    gate.open(1, 2)
    group.flush()
    group.call(Worker.get_rank)

    def logged():
        return [r.getMessage() for r in caplog.records if "after the fact" in r.getMessage()]

    # Where no caller waits, a thread of the group writes the line: it has done so once it has run
    # a callback that was asked for later, or at the next look.
    import time

    limit = time.monotonic() + 10
    while not logged() and time.monotonic() < limit:
        group.call(Worker.get_rank)
    assert len(logged()) == 1
    assert "fail_later() on rank 2: ValueError: after the fact" in logged()[0]


def test_a_failure_after_the_reply_does_not_change_the_outcome(group, gate):
    def fail_later(worker, path):
        if worker.rank == 0:
            return "answer"
        worker.pass_gate(path)
        raise ValueError("after the fact")

    future = group.options(reply_from=0).submit(fail_later, gate.path)
    concurrent.futures.wait([future], timeout=20)
    assert future.done()
    gate.open(1, 2)
    group.flush()
    assert future.result() == "answer"


def test_only_the_wanted_value_has_to_be_picklable(group):
    def give(worker):
        import threading

        return worker.rank if worker.rank == 0 else threading.Lock()

    assert group.options(reply_from=0).call(give) == 0


def test_a_view_of_a_reply_from_view(group):
    view = group.options(reply_from=0)
    assert view[1].call(Worker.get_rank) == 1
    assert view[0].call(Worker.get_rank) == 0
    assert view[1:].call(Worker.get_rank) == [1, 2], "the rank is not in it: the option is dropped"
    assert view[0:2].call(Worker.get_rank) in (0, [0, 1]), "never a list with holes"


def test_reply_from_can_be_taken_back(group):
    assert group.options(reply_from=0).options(reply_from=None).call(Worker.get_rank) == [0, 1, 2]


# -- return_exceptions ----------------------------------------------------------------------------


def test_return_exceptions_puts_them_in_place(group):
    values = group.options(return_exceptions=True).call(Worker.fail, ValueError, "x", ranks=[1])
    assert values[0] == 0
    assert type(values[1]) is ValueError
    assert values[1].args == ("x",)
    assert values[1].__notes__[0].startswith(f"rank 1 (pid {group.pids[1]}) in ")
    assert values[2] == 2


def test_return_exceptions_waits_for_every_rank(group, gate):
    future = group.options(return_exceptions=True).submit(Worker.fail_or_wait, [0], gate.path)
    gate.entered(1, 2)
    with pytest.raises(CallTimeout):
        future.result(timeout=0.2)
    gate.open(1, 2)
    values = future.result(timeout=20)
    assert type(values[0]) is ValueError
    assert values[1:] == [1, 2]


def test_return_exceptions_of_one_rank(group):
    view = group[1].options(return_exceptions=True)
    assert type(view.call(Worker.fail, KeyError)) is KeyError
    futures = group.options(return_exceptions=True).submit_each(Worker.fail, KeyError, ranks=[0])
    assert type(futures[0].result()) is KeyError
    assert futures[0].exception() is None
    assert futures[1].result() == 1


def test_return_exceptions_has_remote_errors_too(group):
    values = group.options(return_exceptions=True).call(Worker.fail, SystemExit, 1)
    assert [value.type_name for value in values] == ["SystemExit"] * 3


def test_return_exceptions_has_results_that_could_not_be_rebuilt(group):
    values = group.options(return_exceptions=True).call(Worker.give, "at home")
    assert ["could not be rebuilt" in str(value) for value in values] == [True] * 3


# -- on_error and grace ---------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["call", "submit", "scatter", "submit-without-result"])
def test_who_does_not_leave_a_failed_call_in_time_breaks_the_group(make, gate, verb):
    failed = []
    groups = []

    def outstay():
        group = make(on_failure=failed.append)
        groups.append(group)
        view = group.options(grace=0.5)  # in which rank 1 must come to its gate
        if verb == "call":
            with pytest.raises(ValueError):
                view.call(Worker.fail_or_wait, [0], gate.path)
        elif verb == "scatter":
            with pytest.raises(ValueError):
                view.scatter(Worker.fail_or_wait, [[0], []], gate.path)
        else:
            future = view.submit(Worker.fail_or_wait, [0], gate.path)
            if verb == "submit":
                with pytest.raises(ValueError):
                    future.result()
        gate.entered(1)
        # A second call that the stuck rank owes: it ends when the group breaks.
        group.submit(Worker.get_rank).result(timeout=20)

    error = explained(outstay, lambda: (gate.open(1), failed.clear()), GroupBroken)
    group = groups[-1]
    assert type(error) is GroupBroken
    assert type(error.first) is ValueError
    assert error.first.args == ("no", 0)
    assert error.__cause__ is error.first
    text = str(error)
    assert ") failed in fail_or_wait() (ValueError: ('no', 0)), and rank 1 had not ret" in text
    line = rf"\n  rank 1: pid {group.pids[1]}, running fail_or_wait\(\) for [0-9.]+ s, in "
    assert re.search(rf"0\.5 s later \(option grace\){line}", text)
    assert list(error.stacks) == [1]
    assert "in fail_or_wait" in error.stacks[1]
    assert text.endswith("workers is broken and takes no more calls: make a new group")
    with pytest.raises(GroupBroken) as again:
        group.call(Worker.get_rank)
    assert again.value is not error
    assert str(again.value) == text
    assert not group.healthy
    assert type(group.failure) is GroupBroken
    assert "broken" in repr(group)
    gate.open(1)
    group.close()
    assert [type(error) for error in failed] == [GroupBroken]


def test_a_failure_after_the_deadline_breaks_the_group_with_words(make, gate):
    group = make()
    future = group.options(timeout=0.05, grace=0.2).submit(Worker.fail_behind_gate, gate.path)
    gate.entered(0, 1)
    with pytest.raises(CallTimeout, match=r"0 of 2 answers after 0\.05 s"):
        future.result(timeout=10)
    gate.open(0)
    with pytest.raises(GroupBroken, match=r"\) failed in fail_behind_gate\(\)") as caught:
        group.submit(Worker.get_rank).result(timeout=20)
    assert type(caught.value.first) is ValueError


def test_on_error_continue_leaves_the_others(group, gate):
    view = group.options(on_error="continue", grace=0.01)
    with pytest.raises(ValueError):
        view.call(Worker.fail_or_wait, [0], gate.path)
    with pytest.raises(CallTimeout):
        group.submit(Worker.get_rank).result(timeout=0.2)
    assert group.healthy
    gate.open(1, 2)
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_a_failure_of_submit_each_breaks_nothing(group, gate):
    futures = group.options(grace=0.0).submit_each(Worker.fail_or_wait, [0], gate.path)
    with pytest.raises(ValueError):
        futures[0].result()
    gate.entered(1, 2)
    with pytest.raises(CallTimeout):
        futures[1].result(timeout=0.1)
    assert group.healthy
    gate.open(1, 2)
    assert [future.result() for future in futures[1:]] == [1, 2]


def test_ranks_that_leave_within_the_grace_break_nothing(group, gate):
    with pytest.raises(ValueError):
        group.options(grace=20).call(Worker.fail_or_wait, [0], gate.path)
    gate.open(1, 2)
    group.flush()
    assert group.healthy


def test_return_exceptions_ends_when_the_group_breaks(make, gate):
    group = make()
    view = group.options(return_exceptions=True, grace=0.1)
    values = view.call(Worker.fail_or_wait, [0], gate.path)
    assert type(values[0]) is ValueError
    assert isinstance(values[1], GroupBroken)


# -- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"timeout": "5"}, TypeError, "timeout must be seconds (a number) or None, not '5'"),
        ({"timeout": True}, TypeError, "timeout must be seconds (a number) or None, not True"),
        ({"timeout": float("nan")}, ValueError,
         "timeout must be seconds (a number) or None, not nan"),
        ({"reply_from": 3}, ValueError, "reply_from must be a rank of the view [0, 1, 2], not 3"),
        ({"reply_from": -1}, ValueError, "reply_from must be a rank of the view, not -1"),
        ({"reply_from": "0"}, TypeError, "reply_from must be a rank of the view, not '0'"),
        ({"reply_from": True}, TypeError, "reply_from must be a rank of the view, not True"),
        ({"on_error": "ignore"}, ValueError,
         "on_error must be 'fail' or 'continue', not 'ignore'"),
        ({"on_error": 1}, TypeError, "on_error must be 'fail' or 'continue', not 1"),
    ],
)  # fmt: skip
def test_a_wrong_option_says_what_would_be_right(group, options, kind, message):
    with pytest.raises(kind) as caught:
        group.options(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("grace", "kind"),
    [("1", TypeError), (None, TypeError), (-1, ValueError), (float("inf"), ValueError)],
)
def test_a_wrong_grace_says_what_would_be_right(group, grace, kind):
    with pytest.raises(kind, match=r"^grace must be a .*number of seconds, 0 or more, not "):
        group.options(grace=grace)


@pytest.mark.parametrize("value", ["no", 2, None, []])
def test_return_exceptions_must_be_a_bool(group, value):
    with pytest.raises(TypeError, match="return_exceptions must be"):
        group.options(return_exceptions=value)


def test_numpys_numbers_are_seconds(group):
    np = pytest.importorskip("numpy")
    for number in (np.float64(20), np.float32(20), np.int64(20)):
        assert group.options(timeout=number, grace=number).call(Worker.get_rank) == [0, 1, 2]


def test_an_option_that_does_not_exist_is_a_type_error(group):
    with pytest.raises(TypeError, match="timeuot"):
        group.options(timeuot=3)


def test_a_view_checks_reply_from_against_its_own_ranks(group):
    with pytest.raises(ValueError, match=r"reply_from must be a rank of the view \[1, 2\], not 0"):
        group[1:].options(reply_from=0)
