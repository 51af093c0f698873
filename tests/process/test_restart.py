"""A broken group starts again as a whole: its processes, its launcher, its end in the middle."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from typing import Any

import pytest
from drivers import SECONDS, Script, Watch, in_thread, readable, until
from kernel import no_descriptors
from restart_ranks import FailsTheSecondTime, Meets, SlowTheSecondTime, TakesAnything, Worker

from rankwise import GroupBroken, GroupClosed, Restart, StartupError, WorkerDied, WorkerGroup
from rankwise.backends.launching import Held

STARTS = ["spawn", "forkserver"]


def open_descriptors(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("start_method", STARTS)
def test_a_death_fails_the_open_calls_and_the_group_starts_again(start_method: str) -> None:
    with WorkerGroup(Worker, 2, start_method=start_method, restart=Restart(1, 0.0)) as group:
        before = group.pids
        assert group.call(Worker.count) == [1, 1]
        stuck = group[0].submit(Worker.stay)
        queued = [group.submit(Worker.count) for _ in range(3)]
        with pytest.raises(WorkerDied, match=r"rank 1 .* SIGKILL in die"):
            group[1].call(Worker.die)
        for future in (stuck, *queued):
            assert isinstance(future.exception(SECONDS), GroupBroken)
        group.wait_ready(SECONDS)
        # None of what was open has run in the new ranks, and nothing runs twice.
        assert group.call(Worker.count) == [1, 1]
        assert not set(group.pids) & set(before)


def test_a_forked_group_keeps_what_its_launcher_has_imported() -> None:
    """The same process forks the new ranks, and importing is not done again."""
    with WorkerGroup(Worker, 2, start_method="forkserver", preload=["fractions"]) as group:
        launcher = group[0].call(Worker.pids)[1]
        for _ in range(3):
            group.restart()
            assert {parent for _, parent in group.call(Worker.pids)} == {launcher}
            assert all(group.call(lambda worker: "fractions" in sys.modules))


def test_a_launcher_with_a_thread_spawns_after_a_restart_too(tmp_path: Any) -> None:
    (tmp_path / "threaded_module.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with WorkerGroup(
            Worker, 1, start_method="forkserver", preload=["threaded_module"]
        ) as group:
            group.restart()
            assert group.call(Worker.count) == [1]
    finally:
        sys.path.remove(str(tmp_path))


def test_who_calls_a_group_that_is_being_closed_is_not_told_of_a_restart() -> None:
    with WorkerGroup(Worker, 1, start_method="forkserver", restart=Restart(1, 0.0)) as group:
        group.submit(Worker.stay)
        group.shutdown(wait=False)
        with pytest.raises(GroupClosed, match="workers is closed and takes no more calls"):
            group.call(Worker.count)
        group.kill()


@pytest.mark.parametrize("start_method", STARTS)
def test_the_new_ranks_inherit_what_the_old_ones_did(
    start_method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("OF_THE_DRIVER", "before")

    def inherited(worker: Worker) -> tuple[Any, ...]:
        return os.environ["OF_THE_DRIVER"], os.getcwd(), sys.path, sys.argv, hash("text")

    with WorkerGroup(Worker, 2, start_method=start_method) as group:
        before = group.call(inherited)
        monkeypatch.setenv("OF_THE_DRIVER", "after")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        group.restart()
        assert group.call(inherited) == before


@pytest.mark.parametrize("start_method", STARTS)
def test_twenty_restarts_leave_nothing(start_method: str) -> None:
    with WorkerGroup(Worker, 2, start_method=start_method) as group:
        group.restart()
        launcher = group[0].call(Worker.pids)[1]
        descriptors, threads = open_descriptors(), threading.active_count()
        of_launcher = open_descriptors(launcher)
        processes: list[int] = []
        for _ in range(20):
            processes += group.pids
            group.restart()
            assert group.call(Worker.count) == [1, 1]
        with Watch(processes) as old:
            assert not old.left(0.0)
        assert open_descriptors() == descriptors
        assert threading.active_count() == threads
        launcher = group[0].call(Worker.pids)[1]
        until(lambda: open_descriptors(launcher) <= of_launcher)  # it may be about to close some


@pytest.mark.parametrize("start_method", STARTS)
def test_a_group_whose_launcher_was_killed_starts_again(start_method: str) -> None:
    with WorkerGroup(Worker, 2, start_method=start_method, restart=Restart(1, 0.0)) as group:
        launcher = group[0].call(Worker.pids)[1]
        future = group.submit(Worker.stay)
        os.kill(launcher, signal.SIGKILL)
        assert isinstance(future.exception(SECONDS), GroupBroken)
        group.wait_ready(SECONDS)
        assert group.call(Worker.count) == [1, 1]
        assert group[0].call(Worker.pids)[1] != launcher


def test_restarts_used_up_are_a_failure_that_is_told_once() -> None:
    told: list[GroupBroken] = []
    with WorkerGroup(Worker, 2, restart=Restart(1, 0.0), on_failure=told.append) as group:
        for _ in range(2):
            with pytest.raises(WorkerDied):
                group[0].call(Worker.die)
            if not told:
                until(lambda: told or group.healthy)
        with pytest.raises(GroupBroken, match="1 restart used up"):
            group.wait_ready(SECONDS)
        until(lambda: told)
        assert len(told) == 1 and isinstance(told[0].first, WorkerDied)
        with pytest.raises(GroupBroken, match="1 restart used up"):
            group.call(Worker.count)
        assert isinstance(group.failure, GroupBroken)


def test_starts_that_fail_count_and_their_reason_is_told(tmp_path: Any) -> None:
    told: list[GroupBroken] = []
    path = tmp_path / "starts"
    with WorkerGroup(
        FailsTheSecondTime, 1, args=(str(path),), restart=Restart(2, 0.0), on_failure=told.append
    ) as group:
        with pytest.raises(WorkerDied):
            group[0].call(FailsTheSecondTime.die)
        with pytest.raises(GroupBroken, match="2 restarts used up"):
            group.wait_ready(SECONDS)
        until(lambda: told)
        assert isinstance(told[0].first, WorkerDied)
    assert path.read_text() == "xxx"


def test_an_engine_that_breaks_as_it_is_seated_is_restarted_again() -> None:
    """Its death may come before, while or after the restart's thread is done with it."""
    for _ in range(5):
        with WorkerGroup(
            Worker, 1, restart=Restart(3, 0.0, lambda ranks: ranks[0].submit(Worker.die))
        ) as group:
            with pytest.raises(WorkerDied):
                group[0].call(Worker.die)
            until(lambda group=group: "used up" in str(group.failure))
            with pytest.raises(GroupBroken, match="3 restarts used up"):
                group.wait_ready(SECONDS)


def test_on_failure_may_restart_the_group() -> None:
    """The natural thing to do there; it runs on the callback thread of the engine that ends."""
    done = threading.Event()

    def again(failure: GroupBroken) -> None:
        group.restart()
        done.set()

    with WorkerGroup(Worker, 1, on_failure=again) as group:
        with pytest.raises(WorkerDied):
            group[0].call(Worker.die)
        assert done.wait(SECONDS)
        assert group.call(Worker.count) == [1]


def test_an_on_failure_that_raises_does_not_keep_the_failed_restart_alive(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What it raises is logged; who waits for the restart goes on, and another may be tried."""

    def leave(failure: GroupBroken) -> None:
        sys.exit("no ranks, no service")

    path = tmp_path / "starts"
    options = {"args": (str(path),), "restart": Restart(1, 0.0), "on_failure": leave}
    with WorkerGroup(FailsTheSecondTime, 1, **options) as group:
        with pytest.raises(WorkerDied):
            group[0].call(FailsTheSecondTime.die)
        with pytest.raises(GroupBroken, match="1 restart used up"):
            group.wait_ready(SECONDS)
        path.unlink()
        group.restart()
        assert group.healthy
    assert "on_failure of workers failed" in caplog.text


def test_on_failure_may_restart_a_group_whose_restarts_have_failed(tmp_path: Any) -> None:
    """It runs on the failed restart's own thread then."""
    path = tmp_path / "starts"
    done = threading.Event()

    def again(failure: GroupBroken) -> None:
        path.unlink()
        group.restart()
        done.set()

    options = {"args": (str(path),), "restart": Restart(1, 0.0), "on_failure": again}
    with WorkerGroup(FailsTheSecondTime, 1, **options) as group:
        with pytest.raises(WorkerDied):
            group[0].call(FailsTheSecondTime.die)
        assert done.wait(SECONDS)
        assert group.healthy


def test_close_waits_for_the_on_failure_of_a_failed_restart(tmp_path: Any) -> None:
    """No thread is left after it, as where the callback thread runs it."""
    told, done = threading.Event(), threading.Event()

    def slow(failure: GroupBroken) -> None:
        told.set()
        until(lambda: group._seat._closing)
        threading.Event().wait(0.1)  # a close that does not wait for this has returned long ago
        done.set()

    path = tmp_path / "starts"
    options = {"args": (str(path),), "restart": Restart(1, 0.0), "on_failure": slow}
    with WorkerGroup(FailsTheSecondTime, 1, **options) as group:
        with pytest.raises(WorkerDied):
            group[0].call(FailsTheSecondTime.die)
        assert told.wait(SECONDS)
        group.close()
        assert done.is_set()


def test_close_during_the_back_off_ends_it_at_once() -> None:
    group = WorkerGroup(Worker, 1, start_method="forkserver", restart=Restart(1, 3600.0))
    with pytest.raises(WorkerDied):
        group[0].call(Worker.die)
    with pytest.raises(GroupBroken, match="restarted"):
        group.call(Worker.count)
    group.close()
    with pytest.raises(GroupBroken, match="make a new group"):
        group.call(Worker.count)
    with pytest.raises(GroupClosed):
        group.restart()


@pytest.mark.parametrize("launcher", ["lives", "killed"])
@pytest.mark.parametrize("start_method", STARTS)
def test_a_driver_without_descriptors_can_end_its_group(start_method: str, launcher: str) -> None:
    """Its launcher, told to stay for a restart, is killed then; so may it be by others."""
    group = WorkerGroup(
        Worker, 2, start_method=start_method, restart=Restart(1, 3600.0), logs="off"
    )
    pid = group[0].call(Worker.pids)[1]
    with Watch([pid, *group.pids]) as family:
        with no_descriptors():
            if launcher == "killed":
                os.kill(pid, signal.SIGKILL)
                until(lambda: not group.healthy)
            in_thread(group.close).value(SECONDS)
        assert not family.left(SECONDS)


def test_a_collected_group_does_not_start_again() -> None:
    group = WorkerGroup(Worker, 1, start_method="forkserver", restart=Restart(1, 3600.0))
    with pytest.raises(WorkerDied):
        group[0].call(Worker.die)
    until(lambda: any("restart" in thread.name for thread in threading.enumerate()))
    with pytest.warns(ResourceWarning, match="collected"):
        del group
        gc.collect()  # the exception above has frames that hold it
        until(lambda: not any("restart" in thread.name for thread in threading.enumerate()))


@pytest.mark.parametrize("way", ["exits", "killed"])
def test_a_driver_that_ends_during_the_back_off_leaves_nothing(way: str) -> None:
    code = """
    class Worker:
        def pids(self): return os.getpid(), os.getppid()
        def die(self): os.kill(os.getpid(), 9)

    group = WorkerGroup(Worker, 1, start_method="forkserver", restart=Restart(1, 3600.0))
    pids = group[0].call(Worker.pids)
    try:
        group[0].call(Worker.die)
    except WorkerDied:
        pass
    while not any("restart" in thread.name for thread in threading.enumerate()):
        time.sleep(0.001)
    say(pids=pids)
    hear()
    """
    with Script(code) as script, Watch(script.line()["pids"]) as family:
        if way == "killed":
            script.kill()
        else:
            script.tell()
        status = script.end()
        assert status == (-signal.SIGKILL if way == "killed" else 0), script.errors()
        assert not family.left(SECONDS)


def test_interrupting_a_restart_ends_the_group() -> None:
    code = """
    import signal
    class Slow:
        def __init__(self, path):
            if os.path.exists(path): time.sleep(3600)
            open(path, "w").close()
        def pids(self): return os.getpid(), os.getppid()

    import tempfile
    path = tempfile.mkdtemp() + "/made"
    group = WorkerGroup(Slow, 1, args=(path,))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        group.restart()
    except KeyboardInterrupt:
        say(interrupted=True, threads=[t.name for t in threading.enumerate()])
    try:
        group.call(Slow.pids)
    except GroupClosed as error:
        say(closed=str(error))
    """
    with Script(code) as script:
        assert script.line() == {"interrupted": True, "threads": ["MainThread"]}
        assert "closed" in script.line()["closed"]
        assert script.end() == 0


def test_a_forked_child_cannot_restart_the_group() -> None:
    code = """
    class Worker:
        def echo(self, value): return value

    with WorkerGroup(Worker, 1, restart=Restart(1)) as group:
        if os.fork() == 0:
            for act in (group.restart, group.wait_ready):
                try:
                    act()
                except RuntimeError as error:
                    say(child=str(error))
            os._exit(0)
        os.wait()
        say(parent=group.call(Worker.echo, 1))
    """
    with Script(code) as script:
        assert "forked child" in script.line()["child"]
        assert "forked child" in script.line()["child"]
        assert script.line() == {"parent": [1]}
        assert script.end() == 0


@pytest.mark.parametrize("start_method", STARTS)
def test_torch_meets_again_after_a_restart(start_method: str) -> None:
    pytest.importorskip("torch")
    preload = ["torch"] if start_method == "forkserver" else []
    with WorkerGroup(Meets, 2, start_method=start_method, preload=preload) as group:
        assert group.call(Meets.total) == [3, 3]
        group.restart()
        assert group.call(Meets.total) == [3, 3]


def test_several_threads_see_one_restart() -> None:
    with WorkerGroup(Worker, 2) as group:
        before = group.pids
        both = [in_thread(group.restart) for _ in range(4)]
        for each in both:
            each.value()
        assert not set(before) & set(group.pids)
        assert group.call(Worker.count) == [1, 1]


@pytest.mark.parametrize("start_method", STARTS)
def test_a_start_that_cannot_be_made_says_why(start_method: str) -> None:
    made_of: list[Any] = []
    with WorkerGroup(TakesAnything, 1, args=(made_of,), start_method=start_method) as group:
        made_of.append(threading.Lock())
        with pytest.raises(TypeError, match="lock"):
            group.restart()
        made_of.clear()
        group.restart()
        assert group.healthy


@pytest.mark.parametrize("start_method", STARTS)
def test_start_timeout_holds_for_a_restart(start_method: str, tmp_path: Any) -> None:
    path = tmp_path / "made"
    with WorkerGroup(
        SlowTheSecondTime, 1, args=(str(path),), start_method=start_method, start_timeout=2.0
    ) as group:
        with pytest.raises(StartupError, match="not ready after 2 s"):
            group.restart()
        assert not group.healthy
        path.unlink()
        # By now others may have the numbers of the descriptors that led to the first launcher.
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(40)]
        group.restart()
        assert group.healthy
        for fd in others:
            os.close(fd)


def test_a_start_that_fails_takes_the_launcher_with_it_and_the_next_has_its_own() -> None:
    launchers: list[int] = []

    def reload(ranks: Any) -> None:
        launchers.append(ranks[0].call(Worker.pids)[1])
        if len(launchers) < 3:
            raise ValueError("not yet")

    with WorkerGroup(
        Worker, 2, start_method="forkserver", restart=Restart(3, 0.0, reload)
    ) as group:
        first = group[0].call(Worker.pids)[1]
        with pytest.raises(WorkerDied):
            group[0].call(Worker.die)
        group.wait_ready(SECONDS)
        assert group.call(Worker.count) == [1, 1]
    assert launchers[0] == first
    assert len(set(launchers)) == 3


@pytest.mark.parametrize("held_open", [False, True], ids=["closed", "socket-held-open"])
def test_a_warm_launcher_that_is_killed_costs_no_start(
    held_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant = Held.grant
    killed: list[int] = []

    def kill_first(warm: Held, fds: list[int]) -> None:
        killed.append(warm.process.pid)
        warm.process.kill()
        assert readable(warm.pidfd)
        if not held_open:
            return grant(warm, fds)
        # As where a process that the launcher had forked lives on, and has its end.
        assert warm.grants is not None
        warm.grants.close()
        warm.grants, other = socket.socketpair()
        with other:
            return grant(warm, fds)

    monkeypatch.setattr(Held, "grant", kill_first)
    with WorkerGroup(Worker, 2, start_method="forkserver") as group:
        group.restart()
        assert group.call(Worker.count) == [1, 1]
        assert len(killed) == 1
        assert group[0].call(Worker.pids)[1] not in killed
