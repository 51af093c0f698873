"""Python stacks as faulthandler writes them: read, compared, and put into words."""

from __future__ import annotations

import faulthandler
import pickle
import tempfile
import threading

import pytest

import rankwise._outcome
import rankwise._serve
from rankwise import RankStack, Stacks
from rankwise._stacks import main_frames, parse, place, ranks_text, shown, user_frames

# What stands below a user's method in a rank: ours, and the `python -c` that has called us.
BELOW = (
    (rankwise._outcome.__file__, 49, "capture"),
    (rankwise._serve.__file__, 91, "serve"),
    ("<string>", 1, "<module>"),
)
ALL_REDUCE = ("/u/shard.py", 88, "all_reduce")
FORWARD = ("/u/shard.py", 60, "forward")
BACKWARD = ("/u/shard.py", 70, "backward")
LOAD = ("/u/shard.py", 41, "load")
TORCH = ("/v/lib/python3.11/site-packages/torch/distributed/c10d.py", 2501, "all_reduce")


def thread(*frames, head="Thread 0x00007f0e6a835b80"):
    lines = [f'  File "{file}", line {line} in {name}\n' for file, line, name in frames]
    return f"{head} (most recent call first):\n{''.join(lines)}"


def stack(*frames):
    return thread(*frames, *BELOW, head="Current thread 0x00007f0e6a835b80")


def rank_stack(rank, text, state="running", reason=None):
    return RankStack(rank, state, 100 + rank, "forward", 1.0, text, reason)


def stacks(*texts):
    return Stacks(rank_stack(rank, text) for rank, text in enumerate(texts))


# -- reading ----------------------------------------------------------------------------------


def test_what_faulthandler_writes_is_read():
    ready, go_on = threading.Event(), threading.Event()

    def wait_here():
        ready.set()
        go_on.wait()

    other = threading.Thread(target=wait_here)
    other.start()
    ready.wait()
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read().decode()
    finally:
        go_on.set()
        other.join()
    threads = parse(text)
    assert len(threads) >= 2
    assert any(frame.function == "wait_here" for frame in threads[0].frames), "the newest first"
    assert [each.main for each in threads] == [False] * (len(threads) - 1) + [True]
    here = main_frames(text)[0]
    assert here.file == __file__
    assert here.function == "test_what_faulthandler_writes_is_read"
    assert here.line > 0


def test_the_main_thread_is_the_one_that_has_written():
    text = thread(LOAD, head="Thread 0x1 [loader]") + "\n" + stack(ALL_REDUCE)
    assert [(each.name, each.main) for each in parse(text)] == [("loader", False), (None, True)]
    assert place(text) == "shard.py:88 all_reduce"
    assert place(thread(ALL_REDUCE, head="Stack")) == "shard.py:88 all_reduce", "in C code"


def test_a_main_thread_behind_a_hundred_others_is_asked_by_itself():
    """faulthandler stops there, and the main thread would be the last."""
    others = "\n".join([*[thread(LOAD)] * 100, "...\n"])
    assert place(others) == ""
    text = others + thread(ALL_REDUCE, *BELOW, head="Stack")
    assert place(text) == "shard.py:88 all_reduce"
    assert shown(text).startswith(
        '  File "/u/shard.py", line 88 in all_reduce\n  another thread:\n'
    )


@pytest.mark.parametrize(
    "line", ["  <no Python frame>", "  ...", "  Garbage-collecting", "  <tstate is freed>"]
)
def test_what_is_no_frame_is_shown_and_not_counted(line):
    text = stack(LOAD).split("\n", 2)[0] + "\n" + thread(LOAD).split("\n", 1)[1] + line + "\n"
    assert [str(frame) for frame in main_frames(text)] == ["shard.py:41 load"]
    assert shown(text).splitlines()[-1] == line


def test_a_file_and_a_line_that_are_not_known():
    text = "Stack (most recent call first):\n  File ???, line ??? in <lambda>\n"
    assert str(main_frames(text)[0]) == "???:0 <lambda>"


@pytest.mark.parametrize("text", ["", "\n", "no stack at all\n", "Thread 0xzz"])
def test_garbage_has_no_threads(text):
    assert parse(text) == []
    assert main_frames(text) == ()


# -- what is the user's -----------------------------------------------------------------------


def test_our_own_frames_at_the_bottom_are_not_the_users():
    assert [str(frame) for frame in user_frames(main_frames(stack(ALL_REDUCE, FORWARD)))] == [
        "shard.py:88 all_reduce",
        "shard.py:60 forward",
    ]
    assert user_frames(main_frames(stack())) == (), "an idle rank"


def test_a_users_own_string_is_his():
    """`python -c`, or a class of such a script: its file has the name that ours has below us."""
    assert place(stack(("<string>", 7, "forward"))) == "<string>:7 forward"


def test_a_thread_of_the_driver_has_the_same_place_as_a_process():
    starts = [
        (threading.__file__, n, name) for n, name in enumerate(("run", "_boot", "_bootstrap"))
    ]
    text = thread(LOAD, *BELOW[:2], *starts, head="Stack")
    assert [str(frame) for frame in user_frames(main_frames(text))] == ["shard.py:41 load"]


def test_in_a_library_the_users_own_frame_is_named_too():
    assert place(stack(TORCH, FORWARD)) == "c10d.py:2501 all_reduce, from shard.py:60 forward"
    assert place(stack(TORCH)) == "c10d.py:2501 all_reduce"
    lock = (threading.__file__, 320, "wait")
    assert place(stack(lock, FORWARD)) == "threading.py:320 wait, from shard.py:60 forward"


# -- comparing --------------------------------------------------------------------------------


def test_it_says_where_the_ranks_differ():
    here, there = stack(ALL_REDUCE, FORWARD), stack(LOAD)
    assert str(stacks(here, there, here, here)).splitlines()[0] == (
        "ranks 0, 2, 3 at shard.py:88 all_reduce; rank 1 at shard.py:41 load"
    )


def test_equal_stacks_are_shown_once_and_without_their_numbers():
    one = stack(ALL_REDUCE)
    other = one.replace("7f0e6a835b80", "7f1111111110")
    text = str(stacks(one, other, stack(LOAD)))
    assert text == (
        "ranks 0, 1 at shard.py:88 all_reduce; rank 2 at shard.py:41 load\n"
        "\n"
        "ranks 0, 1:\n"
        '  File "/u/shard.py", line 88 in all_reduce\n'
        "\n"
        "rank 2:\n"
        '  File "/u/shard.py", line 41 in load'
    )


def test_one_place_reached_by_two_ways_is_two():
    told = stacks(
        stack(ALL_REDUCE, FORWARD), stack(ALL_REDUCE, BACKWARD), stack(ALL_REDUCE, FORWARD)
    )
    assert told.difference() == (
        "ranks 0, 2 at shard.py:88 all_reduce, by way of shard.py:60 forward; "
        "rank 1 at shard.py:88 all_reduce, by way of shard.py:70 backward"
    )
    told = stacks(stack(ALL_REDUCE, FORWARD), stack(ALL_REDUCE))
    assert told.difference() == (
        "rank 0 at shard.py:88 all_reduce, by way of shard.py:60 forward; "
        "rank 1 at shard.py:88 all_reduce"
    )


def test_ranks_without_a_place_are_told_by_what_they_do():
    told = Stacks(
        (
            rank_stack(0, stack(), "idle"),
            rank_stack(1, None, "stopped", "it is stopped"),
            rank_stack(2, stack(), "starting"),
            rank_stack(3, stack(LOAD)),
        )
    )
    assert told.difference() == (
        "rank 0 idle; rank 1 without a stack (it is stopped); rank 2 starting; "
        "rank 3 at shard.py:41 load"
    )
    assert "\nrank 1:\n  no stack: it is stopped\n" in str(told)


def test_other_threads_are_shown_after_the_main_one():
    text = thread(LOAD, head="Thread 0x1 [loader]") + "\n" + stack(ALL_REDUCE)
    assert shown(text) == (
        '  File "/u/shard.py", line 88 in all_reduce\n'
        "  another thread (loader):\n"
        '  File "/u/shard.py", line 41 in load'
    )


def test_what_py_spy_says_is_shown_where_there_is_no_stack():
    blocked = rank_stack(0, None, reason="it blocked signal 62 for 100 ms")._replace(
        native="Thread 7 (idle)\n    usleep (libc.so.6)"
    )
    assert str(Stacks((blocked,))) == (
        "rank 0 without a stack (it blocked signal 62 for 100 ms)\n"
        "\n"
        "rank 0:\n"
        "  no stack: it blocked signal 62 for 100 ms\n"
        "  py-spy says:\n"
        "    Thread 7 (idle)\n"
        "        usleep (libc.so.6)"
    )


def test_the_stacks_of_a_group_survive_pickle():
    told = stacks(stack(LOAD), None)
    again = pickle.loads(pickle.dumps(told))
    assert again == told
    assert type(again) is Stacks
    assert again[0].place == "shard.py:41 load"


def test_many_ranks_are_not_all_listed():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text(range(2)) == "ranks 0, 1"
    assert ranks_text(range(40)).endswith("14, 15, ...")
