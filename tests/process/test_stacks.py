"""stacks() of processes: also while they hold the GIL in C code, block signals, stop or die."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import statistics
import subprocess
import time

import pytest
from drivers import alive, in_thread, open_fifo, until
from stacks_ranks import Worker
from untold import untold, whole

from rankwise import WorkerDied, WorkerGroup, _pyspy
from rankwise._messages import STACK_SIGNAL, STACKS_SIGNAL
from rankwise._stacks import main_frames, parse

# So many steps that nobody waits for them: a test that is done kills the group.
ENDLESS = 10**11


@pytest.fixture
def gate(tmp_path):
    """Where two ranks wait in `Worker.deep` until `open_gates`."""
    path = str(tmp_path / "gate")
    for rank in (0, 1):
        os.mkfifo(f"{path}.{rank}")
    return path


def open_gates(path):
    for rank in (0, 1):
        os.close(open_fifo(f"{path}.{rank}"))


def in_call(group, rank, function):
    """Wait until `rank` is in the Python function `function`, by its own word."""
    until(lambda: f" {function}" in group.stacks()[rank].place, what=f"rank {rank} in {function}")


def crash_memfd(pid):
    """(path in /proc, position) of what a rank writes its stacks to."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        if "rankwise-crash" in os.readlink(path):
            with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                return path, int(re.search(r"pos:\s*(\d+)", info.read())[1])
    raise AssertionError("it has none")


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_rank_that_holds_the_gil_in_c_code_tells_its_stack_within_100_ms(start_method):
    with WorkerGroup(Worker, 2, start_method=start_method, logs="off") as group:
        future = group[1].submit(Worker.count_in_c, ENDLESS)
        until(lambda: group.health()[1].method == "count_in_c", what="it counts")
        whole(group)
        times = []
        while len(times) < 9:
            began = time.monotonic()
            stacks = group.stacks()
            times.append(time.monotonic() - began)
            if not any(untold(each.reason) for each in stacks):
                assert re.fullmatch(
                    r"rank 0 idle; rank 1 at stacks_ranks\.py:\d+ count_in_c", stacks.difference()
                )
        assert not future.done(), "it was in C code all the while"
        assert statistics.median(times) < 0.1
        assert "count_in_c" in whole(group).difference()
        group.kill()


@pytest.mark.skipif(_pyspy.find() is None, reason="py-spy is not installed")
def test_c_frames_are_told_on_request_where_py_spy_is_installed():
    with WorkerGroup(Worker, 2, logs="off") as group:
        future = group[1].submit(Worker.count_in_c, ENDLESS)
        until(lambda: group.health()[1].method == "count_in_c", what="it counts")
        assert [each.native for each in whole(group)] == [None, None]
        stacks = whole(group, native=True)
        assert not future.done(), "it was in C code all the while"
        # py-spy itself says why where the kernel does not let it look.
        assert "count_in_c" in stacks[1].native or stacks[1].native.startswith("Error")
        assert "in count_in_c" in stacks[1].stack
        assert f"py-spy says:\n    {stacks[1].native.splitlines()[0]}" in str(stacks)
        group.kill()


def test_a_stopped_rank_is_left_as_it_is_and_says_so():
    with WorkerGroup(Worker, 2, logs="off") as group:
        pid = group.pids[1]
        os.kill(pid, signal.SIGSTOP)
        until(lambda: group.health()[1].state == "stopped", what="it is stopped")
        began = time.monotonic()
        group.stacks()
        assert time.monotonic() - began < 5
        stacks = whole(group)
        assert stacks[0].stack is not None
        assert (stacks[1].state, stacks[1].stack) == ("stopped", None)
        assert (stacks[1].reason, stacks[1].native) == ("it is stopped", None)
        with open(f"/proc/{pid}/status") as status:
            pending = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", status.read(), re.M)[1]
        assert not int(pending, 16) >> (STACKS_SIGNAL - 1), "nothing waits for it to go on"
        os.kill(pid, signal.SIGCONT)
        assert group.call(Worker.pid) == group.pids
        assert whole(group).difference() == "ranks 0, 1 idle"


@pytest.mark.parametrize("installed", [True, False])
def test_a_rank_that_blocks_the_signal_gives_the_reason_after_100_ms(
    installed, monkeypatch, tmp_path
):
    if not installed:
        monkeypatch.setattr(_pyspy, "find", lambda: None)
    elif _pyspy.find() is None:
        pytest.skip("py-spy is not installed")
    with WorkerGroup(Worker, 2, logs="off") as group:
        let_go = tmp_path / "let go"
        future = group[0].submit(Worker.block, str(let_go))
        until(lambda: _blocks(group.pids[0]), what="it blocks all signals")
        for _ in range(10):
            began = time.monotonic()
            stacks = group.stacks()
            took = time.monotonic() - began
            if stacks[1].stack and untold(stacks[0].reason) and "launcher" not in stacks[0].reason:
                break
        assert not future.done()
        assert stacks[0].stack is None
        assert re.match(r"it blocked signals 61 and 62 for 100 ms(, asleep in \w+)?$",
                        stacks[0].reason)  # fmt: skip
        assert (stacks[0].state, stacks[0].method) == ("running", "block")
        assert stacks[1].stack is not None
        if installed:
            assert "usleep" in stacks[0].native and "block" in stacks[0].native
            assert "py-spy says:" in str(stacks)
        else:
            assert stacks[0].native is None
            assert 0.1 <= took < 5
        again = group.stacks()  # no second signal is queued behind the first
        assert again[0].stack is None
        let_go.touch()
        assert future.result() == "done"
        # What was pending has come by now, and is told from what is asked for.
        for _ in range(3):
            stacks = whole(group)
            assert stacks.difference() == "ranks 0, 1 idle"
            assert [each.main for each in parse(stacks[0].stack)] == [True]


def _blocks(pid):
    with open(f"/proc/{pid}/status") as status:
        blocked = re.search(r"^SigBlk:\s*([0-9a-f]+)$", status.read(), re.M)[1]
    return bool(int(blocked, 16) >> (STACK_SIGNAL - 1) & 1)


BOTH = f"import signal\nfor n in ({STACKS_SIGNAL}, {STACK_SIGNAL}): signal.signal(n"
OWN = {
    "ignores both": f"{BOTH}, signal.SIG_IGN)",
    "resets both": f"{BOTH}, signal.SIG_DFL)",
    "has its own handlers": f"{BOTH}, lambda *a: None)",
}
# What leaves ours as it is.
HARMLESS = {
    "unregisters ours": f"import faulthandler; faulthandler.unregister({STACK_SIGNAL})",
    "has a handler of its own for one": (
        f"import signal; signal.signal({STACKS_SIGNAL}, lambda *a: None)"
    ),
    "registers its own file": (
        "import faulthandler, tempfile; worker.file = tempfile.TemporaryFile();"
        f"faulthandler.register({STACK_SIGNAL}, worker.file)"
    ),
    "enables to a file of its own": (
        "import faulthandler, tempfile; worker.file = tempfile.TemporaryFile();"
        "faulthandler.enable(worker.file)"
    ),
    "disables": "import faulthandler; faulthandler.disable()",
    "registers another signal": "import faulthandler; faulthandler.register(10)",
    "dumps later": "import faulthandler; faulthandler.dump_traceback_later(600)",
}


@pytest.mark.parametrize("what", [*OWN, *HARMLESS])
def test_a_worker_that_uses_faulthandler_itself_breaks_nothing(what):
    with WorkerGroup(Worker, 2, logs="off") as group:
        group[1].call(Worker.run, {**OWN, **HARMLESS}[what])
        for _ in range(2):
            stacks = whole(group)
            assert stacks[0].stack is not None
            assert (stacks[1].stack is None) == (what in OWN)
            assert (stacks[1].reason is None) == (what in HARMLESS)
        assert group.call(Worker.pid) == group.pids
        assert group.healthy


def test_a_rank_that_closes_our_descriptor_gets_no_stack_into_its_own_file(tmp_path):
    path = str(tmp_path / "data")
    code = (
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    try: name = os.readlink(f'/proc/self/fd/{fd}')\n"
        "    except OSError: continue\n"
        "    if 'rankwise-crash' in name:\n"
        f"        os.dup2(os.open({path!r}, os.O_CREAT | os.O_RDWR), int(fd))"
    )
    with WorkerGroup(Worker, 1, logs="off") as group:
        group[0].call(Worker.run, code)
        (stack,) = whole(group)
        assert (stack.stack, stack.reason) == (
            None,
            "the descriptor that its stacks go to was closed",
        )
    assert os.path.getsize(path) == 0


def test_a_rank_that_is_still_starting_is_not_killed_by_the_question():
    """Until its handler is in place the signal would be the end of it."""

    class Slow:
        def __init__(self):
            time.sleep(0.3)

    before, after = False, False
    for _ in range(8):  # it is asked soon enough, and often enough, sooner or later
        group = WorkerGroup.start(Slow, 2, logs="off")
        engine = group._engine
        found = []
        until(lambda engine=engine: len(engine.ranks.pids) == 2, what="both are spawned")
        while not group._boot.done:
            found += engine.inquire((0, 1), 1.0).values()
        assert engine.refusal() is None
        assert {report.state for report in found} <= {"starting", "idle"}
        before |= any("does not listen" in (report.reason or "") for report in found)
        after |= any("in __init__" in (report.stack or "") for report in found)
        engine.close(10.0)
        if before and after:
            break
    assert (before, after) == (True, True)


def test_a_dump_is_complete_however_long_the_stack_and_many_the_threads(gate):
    with WorkerGroup(Worker, 2, logs="off") as group:
        futures = [
            view.submit(Worker.deep, depth, gate)
            for view, depth in zip(group, (90, 300), strict=True)
        ]
        in_call(group, 1, "deep")
        in_call(group, 0, "deep")
        for _ in range(5):
            stacks = whole(group)
            frames = main_frames(stacks[0].stack)
            assert [frame.function for frame in frames][-1] == "<module>", "to its end"
            assert [frame.function for frame in frames].count("deep") == 91
            frames = main_frames(stacks[1].stack)
            assert len(frames) == 100, "faulthandler's own limit"
        open_gates(gate)
        for future in futures:
            future.result()


@pytest.mark.parametrize("number", [60, 120])
def test_all_threads_are_shown_and_the_main_one_however_many_they_are(number, tmp_path):
    """faulthandler stops at a hundred, and the main one would be the last."""
    with WorkerGroup(Worker, 1, logs="off") as group:
        group[0].call(Worker.start_threads, number)
        let_go = tmp_path / "let go"
        future = group[0].submit(Worker.compute, str(let_go))
        in_call(group, 0, "compute")
        (stack,) = whole(group)
        threads = parse(stack.stack)
        assert len(threads) == min(number, 100) + 1
        assert [each.main for each in threads].index(True) == len(threads) - 1
        assert " compute" in stack.place
        assert "_write_stacks" not in stack.stack
        let_go.touch()
        future.result()


def test_threads_that_come_and_go_while_they_are_shown_do_no_harm(tmp_path):
    """faulthandler's own dump of all threads, from its C handler, kills this rank within fifty."""
    with WorkerGroup(Worker, 2, logs="off") as group:
        let_go = tmp_path / "let go"
        future = group.submit(Worker.churn, str(let_go))
        for _ in range(60):
            assert all(each.stack or each.reason for each in group.stacks())
        assert not future.done()
        let_go.touch()
        assert future.result() == ["fine", "fine"]


def test_many_askers_at_once_all_get_whole_stacks(gate):
    with WorkerGroup(Worker, 2, logs="off") as group:
        future = group.submit(Worker.deep, 30, gate)
        in_call(group, 0, "deep")
        in_call(group, 1, "deep")

        def ask():
            return [group.stacks() for _ in range(40)]

        askers = [in_thread(ask) for _ in range(4)]
        told = [each for asker in askers for stacks in asker.value(60) for each in stacks]
        there = [each for each in told if not untold(each.reason)]
        assert len(there) > len(told) / 2
        for each in there:
            frames = main_frames(each.stack)
            assert [frame.function for frame in frames][-1] == "<module>"
            assert [frame.function for frame in frames].count("deep") == 31
        open_gates(gate)
        future.result()


def test_what_was_told_is_not_kept():
    with WorkerGroup(Worker, 1, logs="off") as group:
        group[0].call(Worker.start_threads, 95)
        for _ in range(60):
            group.stacks()
        path, position = crash_memfd(group.pids[0])
        assert position > 1 << 20, "else this shows nothing"
        assert os.stat(path).st_blocks * 512 < 2 << 20


def test_a_rank_that_dies_meanwhile_is_reported_and_nobody_waits():
    for _ in range(2):
        group = WorkerGroup(Worker, 3, logs="off")
        pids = group.pids
        asker = in_thread(lambda group=group: [group.stacks() for _ in range(30)])
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        answers = asker.value(60)
        assert time.monotonic() - began < 30
        assert all(each.stack or each.reason for stacks in answers for each in stacks)
        last = group.stacks()[1]
        assert (last.state, last.stack) == ("dead", None)
        assert isinstance(group.failure.first, WorkerDied)
        group.close()
        assert not any(map(alive, pids))


def test_a_crash_report_has_nothing_of_the_stacks_that_were_asked_for():
    group = WorkerGroup(Worker, 2, logs="off")
    for _ in range(3):
        group.stacks()
    with pytest.raises(WorkerDied) as caught:
        group[1].call(Worker.crash)
    assert caught.value.stack.startswith("Fatal Python error: Segmentation fault")
    assert caught.value.stack.count("most recent call first") == 1
    group.close()


def test_a_launcher_that_is_stopped_costs_a_second_and_nothing_else():
    with WorkerGroup(Worker, 2, logs="off") as group:
        with open(f"/proc/{group.pids[0]}/stat") as stat:
            launcher = int(stat.read().rpartition(")")[2].split()[1])
        os.kill(launcher, signal.SIGSTOP)
        try:
            began = time.monotonic()
            stacks = group.stacks()
            assert 0.9 < time.monotonic() - began < 8
            assert {each.reason for each in stacks} == {"the launcher does not answer"}
            assert group.call(Worker.pid) == group.pids
        finally:
            os.kill(launcher, signal.SIGCONT)
        assert whole(group).difference() == "ranks 0, 1 idle"


def test_nothing_is_sent_while_nobody_asks():
    with WorkerGroup(Worker, 1, logs="off") as group:
        for _ in range(100):
            group.call(Worker.pid)
        group.health()
        assert crash_memfd(group.pids[0])[1] == 0
        whole(group)
        assert crash_memfd(group.pids[0])[1] > 0


def test_faulthandler_is_as_a_rank_finds_it():
    with WorkerGroup(Worker, 1, logs="off") as group:
        assert group[0].call(lambda worker: faulthandler.is_enabled())
        assert group[0].call(lambda worker: subprocess.run(["true"]).returncode) == 0
