"""Guarantee 6: after close() nothing remains, however and whenever the group ends."""

from __future__ import annotations

import _thread
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import warnings

import pytest
from drivers import Script, Watch, in_thread, until
from g06_nothing_remains_ranks import Worker, fails
from kernel import children
from striking import Striker

from rankwise import GroupBroken, GroupClosed, StartupError, WorkerDied, WorkerGroup, _seat
from rankwise._background import Background
from rankwise._shielded import Shielded
from rankwise.backends import ending, link


def descriptors():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return found


class State:
    """What this process has of what a group could leave behind."""

    def __init__(self):
        gc.collect()
        self.descriptors = descriptors()
        self.threads = set(threading.enumerate())
        self.children = children(os.getpid())
        self.shared = set(os.listdir("/dev/shm"))
        self.maps = mappings()

    def assert_same(self):
        now = State()
        new = {fd: to for fd, to in now.descriptors.items() if fd not in self.descriptors}
        assert not new
        assert now.threads - self.threads == set()
        assert now.children - self.children == set()
        assert now.shared - self.shared == set()
        assert now.maps <= self.maps


def mappings():
    with open("/proc/self/maps") as file:
        return sum("memfd" in line for line in file)


@pytest.fixture
def state():
    with WorkerGroup(Worker, 1) as group:  # what is imported or opened once is there from now on
        group.call("echo", 1)
    made = State()
    yield made
    made.assert_same()


def all_pids(group):
    return sorted({pid for pair in group.call("pids") for pid in pair})


ENDS = {
    "with": lambda group: group.__exit__(None, None, None),
    "close": lambda group: group.close(),
    "close_none": lambda group: group.close(None),
    "close_0": lambda group: group.close(0),
    "kill": lambda group: group.kill(),
    "shutdown": lambda group: group.shutdown(),
    "shutdown_cancel": lambda group: group.shutdown(cancel_futures=True),
    "error": lambda group: group.__exit__(ValueError, ValueError("x"), None),
}


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_remains_after_an_end(state, end, start_method):
    group = WorkerGroup(Worker, 2, start_method=start_method)
    daemon = group[1].call("leave_a_daemon")
    with Watch([*all_pids(group), daemon]) as watch:
        began = time.monotonic()
        ENDS[end](group)
        assert time.monotonic() - began < 8
        assert watch.left(0) == []
    state.assert_same()
    with pytest.raises(GroupClosed):
        group.call("echo", 1)
    with pytest.raises(GroupClosed):
        group.submit("echo", 1)
    ENDS[end](group)  # again it does nothing


def test_shutdown_without_waiting_ends_all_the_same(state):
    group = WorkerGroup(Worker, 2)
    future = group.submit("echo", 4)
    with Watch(all_pids(group)) as watch:
        group.shutdown(wait=False)
        assert future.result(5) == [4, 4]
        assert watch.left(5) == []
    until(lambda: threading.active_count() <= len(state.threads), 5)


@pytest.mark.parametrize("death", ["killed", "failed_start", "launcher_killed", "stopped"])
def test_nothing_remains_after_a_failure(state, death):
    if death == "failed_start":
        with pytest.raises(StartupError):
            WorkerGroup(fails, 2, args=(1,), logs="off")
        return
    group = WorkerGroup(Worker, 2, logs="off")
    pids = all_pids(group)
    with Watch(pids) as watch:
        if death == "killed":
            os.kill(group.pids[0], signal.SIGKILL)
            until(lambda: not group.healthy, 5)
        elif death == "launcher_killed":
            os.kill(next(pid for pid in pids if pid not in group.pids), signal.SIGKILL)
            until(lambda: not group.healthy, 5)
        else:
            os.kill(group.pids[0], signal.SIGSTOP)
        began = time.monotonic()
        group.close(0.5)
        assert time.monotonic() - began < 4
        assert watch.left(0) == []
    group.close()


def test_a_stopped_launcher_does_not_hold_up_the_end(state):
    group = WorkerGroup(Worker, 2, logs="off")
    pids = all_pids(group)
    with Watch(pids) as watch:
        os.kill(next(pid for pid in pids if pid not in group.pids), signal.SIGSTOP)
        began = time.monotonic()
        group.close(0.5)
        assert time.monotonic() - began < 6
        assert watch.left(5) == []


def test_close_without_a_limit_does_not_wait_for_the_exit_of_a_stopped_rank(state):
    group = WorkerGroup(Worker, 2, logs="off")
    with Watch(group.pids) as watch:
        os.kill(group.pids[1], signal.SIGSTOP)
        began = time.monotonic()
        group.close(None)
        assert time.monotonic() - began < 6
        assert watch.left(0) == []


def test_close_without_a_limit_does_not_wait_for_a_stopped_launcher(state):
    group = WorkerGroup(Worker, 2, logs="off")
    pids = all_pids(group)
    with Watch(pids) as watch:
        os.kill(next(pid for pid in pids if pid not in group.pids), signal.SIGSTOP)
        began = time.monotonic()
        group.close(None)
        assert time.monotonic() - began < 8
        assert watch.left(5) == []


def test_a_worker_that_ignores_sigterm_is_gone_at_the_limit(state):
    group = WorkerGroup(Worker, 2, logs="off")
    group.call(lambda worker: signal.signal(signal.SIGTERM, signal.SIG_IGN) and None)
    future = group.submit(lambda worker: time.sleep(600))
    with Watch(group.pids) as watch:
        began = time.monotonic()
        group.close(0.3)
        assert time.monotonic() - began < 6
        assert watch.left(0) == []
    assert isinstance(future.exception(0), GroupClosed)


def test_a_worker_that_holds_the_gil_is_gone_at_the_limit(state):
    group = WorkerGroup(Worker, 1, logs="off")
    group.submit(lambda worker: __import__("ctypes").PyDLL(None).sleep(600))
    began = time.monotonic()
    group.close(0.5)
    assert time.monotonic() - began < 3


def test_close_waits_for_the_calls_that_were_submitted(state, tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    group = WorkerGroup(Worker, 1)
    held = group.submit("hold", path)
    futures = [group.submit("echo", number) for number in range(200)]
    closing = in_thread(lambda: group.close(None))
    until(lambda: not group.healthy)
    with pytest.raises(GroupClosed):
        group.submit("echo", 1)
    with open(path, "wb") as file:
        file.write(b"held")
    closing.value(5)
    assert held.result(0) == [b"held"]
    assert [future.result(0) for future in futures] == [[number] for number in range(200)]


def test_a_wake_up_that_is_under_way_keeps_its_descriptor_through_the_end(state):
    """Several threads may close: one of them writes while another has closed everything."""
    group = WorkerGroup(Worker, 1)
    kick = group._seat.engine.pump.kick
    group.close()
    assert set(descriptors()) - set(state.descriptors) == {kick.args[0]}
    kick()
    del kick
    state.assert_same()


def test_close_from_several_threads_and_a_second_time(state):
    group = WorkerGroup(Worker, 2)
    closing = [in_thread(group.close) for _ in range(8)]
    for one in closing:
        one.value(5)
    began = time.monotonic()
    group.close()
    group.kill()
    group.shutdown()
    assert time.monotonic() - began < 2


def test_close_by_a_callback(state):
    group = WorkerGroup(Worker, 1)
    closed = threading.Event()

    def close(future):
        group.close()
        closed.set()

    group.submit("echo", 1).add_done_callback(close)
    assert closed.wait(5), "close() inside a callback hangs"


def test_close_by_a_callback_while_another_thread_closes_holds_nobody_up(state, tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    group = WorkerGroup(Worker, 1)
    group.submit("hold", path).add_done_callback(lambda future: group.close())
    closing = in_thread(lambda: group.close(None))
    until(lambda: not group.healthy)
    began = time.monotonic()
    with open(path, "wb") as file:
        file.write(b"held")
    closing.value(10)
    assert time.monotonic() - began < 5


STRUCK = """
class Worker:
    def echo(self): return 1
import random
armed = False
def handler(*args):
    if armed: raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
chance = random.Random(int(sys.argv[1]))
def state():
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    threads = sorted(t.name for t in threading.enumerate() if t.name != "MainThread")
    return [children, threads, len(os.listdir("/proc/self/fd"))]
WorkerGroup(Worker, 1, start_method="forkserver").close()
before = state()
struck = 0
for round in range(25):
    group = WorkerGroup(Worker, 2, start_method="forkserver")
    group.submit("echo").add_done_callback(lambda future: None)
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 1.2e-2), 5e-4)
            group.kill() if round % 3 else group.close()
        finally:
            armed = False  # a store: nothing strikes before it, and nobody after it
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        struck += 1
    group.close()
    del group
    if state() != before: break
say(before=before, after=state(), struck=struck)
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_end_that_is_struck_between_any_two_steps_leaves_nothing(seed):
    """By a handler that raises, every half a millisecond from some moment on."""
    with Script(STRUCK, str(seed)) as script:
        said = script.line(90)
        assert said["after"] == said["before"]
        assert said["struck"] > 3


def test_a_launcher_is_told_to_finish_wherever_that_is_struck(state, monkeypatch):
    """One whose Finish is lost is killed after PATIENCE."""
    monkeypatch.setattr(link, "PATIENCE", 20.0)  # a busy machine's launcher may be late
    for point in range(1, 1000):
        group = WorkerGroup(Worker, 1, start_method="forkserver")
        engine = group._engine
        striker = Striker(point, link, error=KeyboardInterrupt)
        with contextlib.suppress(KeyboardInterrupt):
            striker.run(group.kill)
        group.close()
        assert engine.link.held.exitcode() == 0, f"struck at {point} it was killed"
        if striker.countdown > 0:
            # Python 3.13 leaves out opcodes of functions that it has not traced before.
            assert point > 10 or sys.version_info >= (3, 13), "it was never struck"
            return
    raise AssertionError("the end does not end")


@pytest.fixture
def users_patience(monkeypatch):
    """An end that waits for what cannot come waits for long: the test's own limit is shorter."""
    for module in (_seat, ending):
        monkeypatch.setattr(module, "USERS_PATIENCE", 60.0)


@pytest.mark.parametrize("moment", ["callbacks", "restart"])
def test_a_handler_may_close_the_group_whose_thread_it_has_interrupted_in_a_start(
    state, monkeypatch, users_patience, moment
):
    """As a SIGTERM handler does, wherever it comes. The lock is held, the thread does not run."""
    group = WorkerGroup(Worker, 1)
    group.call("echo", 1)
    start = Background.start
    strikes = [1]

    def struck(thread):
        if strikes:
            strikes.pop()
            group.close()
        start(thread)

    monkeypatch.setattr(Background, "start", struck)
    do = {
        "callbacks": lambda: group.submit("echo", 2).add_done_callback(lambda future: None),
        "restart": group.restart,
    }[moment]
    with contextlib.suppress(GroupClosed):
        in_thread(do).value(10)
    assert strikes == []
    in_thread(group.close).value(10)


@pytest.mark.parametrize("point", ["entry", "made", "waits"])
def test_a_thread_whose_start_was_struck_runs_or_is_made_by_the_next(state, monkeypatch, point):
    group = WorkerGroup(Worker, 1)
    future = group.submit("echo", 1)
    future.result(5)
    strikes = [1]

    def strike_before(owner, name):
        real = getattr(owner, name)

        def struck(*args):
            if strikes and threading.current_thread() is threading.main_thread():
                strikes.pop()
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(owner, name, struck)

    if point == "entry":
        strike_before(Background, "start")
    elif point == "made":
        strike_before(Shielded, "run")
    else:
        done = threading.Thread.start

        def slow(thread):  # the shield is at it while its waiter is struck
            done(thread)
            time.sleep(0.2)

        monkeypatch.setattr(threading.Thread, "start", slow)
        before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        done(timer)
        strikes.clear()
    with pytest.raises(KeyboardInterrupt):
        future.add_done_callback(lambda future: None)
    if point == "waits":
        signal.signal(signal.SIGUSR1, before)
        timer.join()
    assert strikes == []
    called = threading.Event()
    group.submit("echo", 2).add_done_callback(lambda future: called.set())
    assert called.wait(10)
    in_thread(group.close).value(10)


def test_a_handler_that_cannot_wait_for_a_restart_is_told_so(state, tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    group = WorkerGroup(Worker, 1)
    told = []

    def handler(number, frame):
        for wish in (group.restart, lambda: group.restart(timeout=None)):
            with pytest.raises(RuntimeError, match="signal handler") as caught:
                wish()
            told.append(str(caught.value))
        with open(path, "wb") as file:
            file.write(b"held")

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        assert group.call("hold", path) == [b"held"]
    finally:
        signal.signal(signal.SIGUSR1, before)
        timer.join()
    assert len(told) == 2
    group.restart()
    assert group.call("echo", 1) == [1]
    group.close()


def test_a_close_that_is_refused_closes_nothing(state):
    with WorkerGroup(Worker, 1) as group:
        with group._engine.pump.lock, pytest.raises(RuntimeError, match="signal handler"):
            group.close()
        group.restart()
        assert group.call("echo", 1) == [1]


def test_a_handler_may_close_the_group_that_it_has_interrupted_in_closing(state, monkeypatch):
    group = WorkerGroup(Worker, 1)
    group.call("echo", 1)
    wake = group._engine.link.printer._wake
    write = os.eventfd_write
    strikes = [1]

    def struck(fd, number):
        write(fd, number)
        if strikes and fd == wake:  # while the printer's lock is held
            strikes.pop()
            group.close()

    monkeypatch.setattr(os, "eventfd_write", struck)
    in_thread(group.close).value(10)
    assert strikes == []


def test_a_handler_may_wait_for_a_thread_whose_last_step_it_keeps_from_its_lock():
    """`threading` lists its threads under a lock, which a thread takes to leave the list."""
    gate = threading.Event()
    background = Background(gate.wait, "waits")
    background.start()

    def interrupted():
        with threading._active_limbo_lock:
            gate.set()
            background.join()

    in_thread(interrupted).value(10)
    background.join()
    other = Background(int, "starts")
    with threading._active_limbo_lock:
        other.start()  # in this thread: it is the main one that a handler interrupts
    other.join()
    until(lambda: background._thread not in threading.enumerate())


def test_an_end_needs_no_lock_that_a_strike_can_leave_taken(state):
    """Popen.wait's: who is struck between its `acquire(False)` and its `try` leaves it taken."""
    group = WorkerGroup(Worker, 1)
    group._engine.link.held.process._waitpid_lock.acquire()
    in_thread(group.close).value(10)


def test_an_end_that_a_handler_has_overtaken_touches_nobody_elses_descriptors(state, monkeypatch):
    """It closes the group and makes another, whose launcher's pidfd has the old one's number."""
    group = WorkerGroup(Worker, 1)
    group.call("echo", 1)
    held = group._engine.link.held
    others = []

    def overtaken(self, happened, until):
        monkeypatch.undo()
        group.close()
        others.append(WorkerGroup(Worker, 1))
        return wait_for(self, happened, until)

    wait_for = link.LauncherLink.wait_for
    monkeypatch.setattr(link.LauncherLink, "wait_for", overtaken)
    in_thread(group.close).value(10)
    (other,) = others
    held.kill()
    assert other.call("echo", 2) == [2]
    other.close()


def test_a_kill_by_a_handler_ends_a_close_that_waits_for_a_call(state, tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    group = WorkerGroup(Worker, 1)
    future = group.submit("hold", path)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: group.kill())
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        group.close(None)
    finally:
        signal.signal(signal.SIGUSR1, before)
        timer.join()
    assert isinstance(future.exception(0), GroupClosed)


def test_a_child_that_is_forked_in_the_middle_of_an_end_closes_its_copies():
    code = """
    class Worker: pass
    WorkerGroup(Worker, 1).close()
    before = len(os.listdir("/proc/self/fd"))
    group = WorkerGroup(Worker, 1)
    def fork():
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        else:
            say(left=len(os.listdir("/proc/self/fd")) - before)
            os._exit(0)
    group._engine.ending.stack.callback(fork)  # the first of what closes the descriptors
    group.close()
    """
    with Script(code) as script:
        assert script.line()["left"] == 0
        assert script.end() == 0


def test_open_futures_get_group_closed(state, tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    group = WorkerGroup(Worker, 2, logs="off")
    futures = [group.submit("hold", path), *(group.submit("echo", n) for n in range(100))]
    waits = [in_thread(future.result) for future in futures[:5]]
    group.kill()
    for wait in waits:
        with pytest.raises(GroupClosed):
            wait.value(5)
    assert all(isinstance(future.exception(0), GroupClosed) for future in futures)


def test_a_group_that_is_collected_ends_its_workers_and_warns(state):
    group = WorkerGroup(Worker, 2)
    with Watch(all_pids(group)) as watch:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del group
            gc.collect()
            assert watch.left(3) == []
        assert [w.category for w in caught] == [ResourceWarning]
        assert "'workers'" in str(caught[0].message)
    until(lambda: set(threading.enumerate()) <= state.threads, 5)
    until(lambda: set(descriptors()) <= set(state.descriptors), 5)


def test_a_future_or_a_view_keeps_its_group_from_being_collected(state):
    view = WorkerGroup(Worker, 2)[1]
    gc.collect()
    assert view.call("echo", 1) == 1
    future = view.submit("echo", 2)
    group = view._group
    del view
    gc.collect()
    assert future.result(5) == 2
    group.close()


@pytest.mark.limit(240)  # a hundred starts: 20 s alone, a minute where others compute too
def test_nothing_remains_after_a_hundred_rounds(state):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for number in range(100):
        with WorkerGroup(Worker, 1, start_method="forkserver") as group:
            assert group.call("echo", b"x" * 1000) == [b"x" * 1000]
            group.submit("echo", number).add_done_callback(lambda future: None)
        if number % 10 == 9:
            gc.collect()
            sizes.append(resident())
    state.assert_same()
    assert sizes[-1] - sizes[1] < 2 << 20, sizes


# -- interpreters that exit ---------------------------------------------------------------------

WORKER = """
class Worker:
    def echo(self, value): return value
    def pids(self): return [os.getpid(), os.getppid()]
    def hold(self): time.sleep(600)
"""

EXITS = {
    "plain": "",
    "sys_exit": "sys.exit()",
    "open_call": "future = group.submit('hold')",
    "queued": "futures = [group.submit('hold') for _ in range(300)]",
    "callback": "group.submit('hold').add_done_callback(print)",
    "busy_thread": "threading.Thread(target=lambda: group.submit('hold').result()).start()",
    "daemon_thread": "threading.Thread(target=lambda: group.call('hold'), daemon=True).start()",
    "atexit": "import atexit; atexit.register(group.close)",
    "module_global": "import builtins; builtins.group = group",
    "cycle": "group.me = [group]; del group",
    "in_del": "class Keep:\n    def __del__(self): group.close()\nkeep = Keep()",
}


@pytest.mark.parametrize("exit_", EXITS)
def test_an_interpreter_that_exits_without_close_is_silent_and_fast(exit_):
    in_thread = exit_.endswith("_thread")  # whose own traceback of GroupClosed shows
    code = f"{WORKER}\ngroup = WorkerGroup(Worker, 2)\nsay(pids=group.call('pids'))\n{EXITS[exit_]}"
    with Script(code) as script:
        pids = {pid for pair in script.line()["pids"] for pid in pair}
        with Watch(pids) as watch:
            began = time.monotonic()
            assert script.end(20) == 0
            assert time.monotonic() - began < 8
            assert watch.left(5) == []
        if in_thread and script.errors():
            assert "rankwise.errors.GroupClosed" in script.errors()
            assert script.errors().count("Traceback") == 1
        else:
            assert script.errors() == ""


def test_a_call_in_an_exit_handler_is_refused_and_not_waited_for():
    """As with every executor: an interpreter that exits takes no more work."""
    code = f"""{WORKER}
import atexit
group = WorkerGroup(Worker, 2)
group.call("echo", 1)
def late():
    try: say(late=group.call("echo", 1))
    except GroupClosed as error: say(late=str(error))
atexit.register(late)
"""
    with Script(code) as script:
        assert "exit" in script.line()["late"], "it says what closed the group"
        assert script.end(8) == 0
        assert script.errors() == ""


def test_an_uncaught_exception_exits_with_status_1_and_nothing_remains():
    code = f"{WORKER}\ngroup = WorkerGroup(Worker, 2)\nsay(pids=group.call('pids'))\n1 / 0\n"
    with Script(code) as script:
        with Watch({pid for pair in script.line()["pids"] for pid in pair}) as watch:
            assert script.end(8) == 1
            assert watch.left(5) == []
        assert script.errors().count("Traceback") == 1


def test_examples_of_use_are_silent_with_every_warning_an_error():
    code = f"""{WORKER}
with WorkerGroup(Worker, 2) as group:
    group.call("echo", 1)
    group.submit("echo", 1).result()
    import asyncio, logging
    logging.getLogger("asyncio").setLevel("ERROR")  # a slow machine's "took 0.1 seconds" is none
    async def main(): return await group.submit("echo", 2)
    asyncio.run(main())
group = WorkerGroup(Worker, 2, start_method="forkserver")
group.close()
async def start():
    async with WorkerGroup.start(Worker, 2) as group:
        await group.submit("echo", 3)
asyncio.run(start())
"""
    with Script(code, flags=("-W", "error", "-X", "dev")) as script:
        assert script.end() == 0
        assert script.errors() == ""


@pytest.mark.parametrize("ends_by", [WorkerDied, GroupBroken])
def test_on_failure_does_not_keep_the_interpreter(ends_by):
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2, on_failure=lambda error: say(failed=type(error).__name__))
os.kill(group.pids[0], signal.SIGKILL)
hear()
"""
    with Script(code) as script:
        assert script.line()["failed"] == "GroupBroken"
        assert script.end(8) == 0


def test_a_strike_while_the_descriptors_are_closed_and_another_one_at_once(monkeypatch):
    """The end has come when all of them are closed, and not before."""
    settle = Shielded.settle
    strikes = [1]

    def run(shielded):
        shielded._started.extend(map(_thread.start_new_thread, (shielded._run,), ((),)))
        until(lambda: ending.closed)  # it has begun
        raise KeyboardInterrupt

    def struck(shielded):
        if strikes:
            strikes.pop()
            raise KeyboardInterrupt
        settle(shielded)

    before = len(os.listdir("/proc/self/fd"))
    group = WorkerGroup(Worker, 1)
    ending = group._engine.ending
    ending.stack.callback(time.sleep, 0.3)  # before the others
    monkeypatch.setattr(Shielded, "run", run)
    monkeypatch.setattr(Shielded, "settle", struck)
    with pytest.raises(KeyboardInterrupt):
        group.close()
    assert len(os.listdir("/proc/self/fd")) == before
