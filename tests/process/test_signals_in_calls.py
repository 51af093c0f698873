"""An exception out of a signal handler may strike a call anywhere: nothing is lost by it."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from drivers import Script, in_thread

from rankwise import WorkerGroup, _sockets
from rankwise.wire.channel import DriverChannel
from rankwise.wire.joint import Joint

# The handler raises only while `armed` is set, and takes it away: the loop of the test itself is
# never struck outside the call, and no call is struck twice.
STRIKES = """
class Worker:
    def __init__(self): self.seen = []
    def echo(self, number):
        self.seen.append(number)
        return number
    def log(self):
        seen, self.seen = self.seen, []
        return seen

class Strike({base}): pass
armed = [False]
hits = [0]
def handler(number, frame):
    if armed[0]:
        armed[0] = False
        hits[0] += 1
        raise Strike
signal.signal(signal.SIGALRM, handler)
sys.unraisablehook = lambda args: None  # one that strikes a destructor is printed and goes

def exception_then_result(future):
    future.exception()
    return future.result()

ranks, calls, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
verbs = dict(
    call=lambda number: group.call("echo", number),
    result=lambda number: group.submit("echo", number).result(),
    exception=lambda number: exception_then_result(group.submit("echo", number)),
    timed=lambda number: group.options(timeout=60).call("echo", number),
)
verb = verbs[how]
group = WorkerGroup(Worker, ranks, logs="inherit")
answered = set()
wrong = []
struck = 0
signal.setitimer(signal.ITIMER_REAL, 3e-4, 3e-4)
for number in range(calls):
    try:
        try:
            armed[0] = True
            value = verb(number)
            armed[0] = False
        finally:
            armed[0] = False
    except Strike:
        struck += 1
        continue
    except BaseException as error:
        wrong.append([number, repr(error)])
        break
    answered.add(number)
    if value != [number] * ranks:
        wrong.append([number, repr(value)])
signal.setitimer(signal.ITIMER_REAL, 0)
say(wrong=wrong[:5], struck=struck, answered=len(answered))
group.flush(10)
logs = group.options(timeout=10).call("log")
say(
    ordered=all(log == sorted(set(log)) for log in logs),
    alike=all(log == logs[0] for log in logs),
    none_lost=answered <= set(logs[0]),
    never_sent=calls - len(logs[0]),
)
began = time.monotonic()
say(after=[group.options(timeout=5).call("echo", n) == [n] * ranks for n in range(100)].count(True))
group.close()
say(closed=time.monotonic() - began, threads=threading.active_count())
"""


@pytest.mark.parametrize("how", ["call", "result", "exception", "timed"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_alarm_that_raises_every_third_of_a_millisecond_loses_nothing(ranks, how):
    calls = {"call": 100_000, "result": 20_000}.get(how, 4_000) // ranks
    code = STRIKES.format(base="Exception")
    with Script(code, str(ranks), str(calls), how) as script:
        said = script.line(90)
        assert said["wrong"] == []
        struck = said["struck"]
        assert struck > 100
        said = script.line()
        never_sent = said.pop("never_sent")
        assert said == {"ordered": True, "alike": True, "none_lost": True}
        assert never_sent <= struck
        assert script.line()["after"] == 100
        said = script.line()
        assert said["threads"] == 1
        assert said["closed"] < 10
        assert script.end() == 0


@pytest.mark.parametrize("base", ["TimeoutError", "BlockingIOError", "OSError", "RuntimeError"])
def test_what_a_handler_raises_is_never_taken_for_the_librarys_own(base):
    """A handler may raise what the socket calls themselves raise."""
    with Script(STRIKES.format(base=base), "2", "3000", "call") as script:
        said = script.line(90)
        assert said["wrong"] == []
        assert said["struck"] > 100
        said = script.line()
        assert (said["ordered"], said["alike"], said["none_lost"]) == (True, True, True)
        assert script.line()["after"] == 100


class Worker:
    def echo(self, value):
        return value

    def two(self, first, second):
        return first, second


class Strike(Exception):
    pass


def strike_once(owner, name, monkeypatch, after):
    """Have the handler of SIGUSR1 raise at the end (or the start) of one run of a method."""
    real = getattr(owner, name)
    strikes = [1]

    def struck(*args):
        if not after and strikes:
            strikes.pop()
            signal.raise_signal(signal.SIGUSR1)
        value = real(*args)
        if after and strikes:
            strikes.pop()
            signal.raise_signal(signal.SIGUSR1)
        return value

    monkeypatch.setattr(owner, name, struck)


@pytest.fixture
def raising_handler():
    def handler(number, frame):
        raise Strike

    before = signal.signal(signal.SIGUSR1, handler)
    yield
    signal.signal(signal.SIGUSR1, before)


JOINT = ["send", "settle", "receive"]
ODD = ["deal", "expect", "frames", "consume"]  # where an answer is not plain
ALONE = ["receive", "send_call"]  # where a channel is on its own


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("path", "method"),
    [("joint", name) for name in JOINT] + [("odd", name) for name in ODD]
    + [("alone", name) for name in ALONE],
)  # fmt: skip
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_answer_that_was_taken_off_the_socket_when_the_leader_was_struck_arrives(
    raising_handler, monkeypatch, path, method, after, ranks
):
    with WorkerGroup(Worker, ranks) as group:
        if path == "odd":
            monkeypatch.setattr(_sockets, "PLAIN", frozenset())
        if path == "alone":
            monkeypatch.setattr(
                Joint,
                "receive",
                lambda joint, channels: [each.receive() for each in channels] and channels,
            )
            monkeypatch.setattr(Joint, "send", lambda joint, call, channels, body: False)
        future = group.submit("echo", 7)
        owner = Joint if path == "joint" or method == "deal" else DriverChannel
        strike_once(owner, method, monkeypatch, after)
        struck = False
        try:
            if method in ("send", "settle", "send_call"):
                group.call("echo", 8)
            else:
                future.result(5)
        except Strike:
            struck = True
        assert struck
        assert in_thread(lambda: future.result(3)).value(5) == [7] * ranks
        assert in_thread(lambda: group.options(timeout=3).call("echo", 9)).value(5) == [9] * ranks


def test_a_strike_between_the_epoll_and_the_note_of_it_delays_no_callback(monkeypatch):
    monkeypatch.setattr("rankwise._keeper.TICK", 30.0)
    with WorkerGroup(Worker, 2) as group:
        group.call("echo", 0)
        lead = group._engine.pump.lead
        arm = lead._arm_keeper
        strikes = [1]

        def struck(armed):
            arm(armed)
            if strikes and not armed:
                strikes.pop()
                raise Strike  # as on the way out of `epoll.modify`

        called = threading.Event()
        future = group[0].submit(lambda worker: time.sleep(0.1))
        future.add_done_callback(lambda future: called.set())
        lead._arm_keeper = struck
        with pytest.raises(Strike):
            group[1].call("echo", 1)
        assert called.wait(5)  # and not when the keeper next looks around


def test_a_struck_leader_does_not_keep_the_other_waiters(raising_handler, monkeypatch):
    with WorkerGroup(Worker, 2) as group:
        gate = threading.Event()
        future = group.submit("echo", 1)
        strike_once(Joint, "receive", monkeypatch, True)
        with pytest.raises(Strike):
            future.result(5)
        others = [in_thread(lambda n=n: group.call("echo", n)) for n in range(8)]
        gate.set()
        assert [other.value(5) for other in others] == [[n, n] for n in range(8)]
        assert in_thread(lambda: future.result(3)).value(5) == [1, 1]


def test_a_handler_may_make_calls_while_the_main_thread_waits():
    code = """
    class Worker:
        def echo(self, value): return value
        def hold(self, path):
            with open(path, "rb") as file: return file.read().decode()
    group = WorkerGroup(Worker, 2)
    heard = []
    def handler(number, frame):
        try: heard.append(group[1].options(timeout=5).call("echo", "from the handler"))
        except BaseException as error: heard.append(repr(error))
        with open(sys.argv[1], "wb") as file: file.write(b"held")
    signal.signal(signal.SIGUSR1, handler)
    future = group[0].submit("hold", sys.argv[1])
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    say(value=future.result(10), heard=heard)
    group.close()
    """
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "fifo")
        os.mkfifo(path)
        with Script(code, path) as script:
            assert script.line() == {"value": "held", "heard": ["from the handler"]}
            assert script.end() == 0


@pytest.mark.parametrize(("every", "nested"), [(1e-3, False), (5e-3, True)])
def test_a_handler_that_calls_at_any_moment_gets_its_answer_or_is_told_why_not(every, nested):
    """It never hangs: where it struck the group in the middle of a step it hears RuntimeError.

    Nested only where the interval is longer than a handler takes: they would nest without end.
    """
    code = """
    class Worker:
        def __init__(self): self.seen = []
        def echo(self, value):
            self.seen.append(value)
            return value
    group = WorkerGroup(Worker, 2)
    told, answered, wrong, inside = [], [], [], []
    every, nested = float(sys.argv[1]), sys.argv[2] == "True"
    marks = sorted if nested else list  # who nests is answered before who was sent before it
    def handler(number, frame):
        if inside and not nested: return
        inside.append(1)
        try: call()
        finally: inside.pop()
    def call():
        mark = ("handler", len(told) + len(answered))
        try:
            value = group.options(timeout=10).call("echo", mark)
        except RuntimeError as error:
            told.append(str(error))
        else:
            answered.append(mark)
            if value != [mark] * 2: wrong.append(repr(value))
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    for number in range(5000):
        value = group.call("echo", number)
        if value != [number] * 2: wrong.append([number, repr(value)])
    signal.setitimer(signal.ITIMER_REAL, 0)
    seen = group.call(lambda worker: worker.seen)
    numbers = [n for n in seen[0] if isinstance(n, int)]
    say(wrong=wrong[:3], answered=len(answered), told=len(told), why=sorted(set(told))[:3],
        alike=seen[0] == seen[1], all=numbers == list(range(5000)),
        marks=marks(m for m in seen[0] if not isinstance(m, int)) == marks(answered))
    group.close()
    """
    with Script(code, str(every), str(nested)) as script:
        said = script.line(90)
        assert said["wrong"] == []
        assert said["answered"] > 20
        assert all("signal handler" in why for why in said["why"])
        assert (said["alike"], said["all"], said["marks"]) == (True, True, True)
        assert script.end() == 0


def test_an_alarms_timeout_bounds_a_wait_and_the_group_goes_on(tmp_path):
    """The usual `signal.alarm` idiom, whose handler raises TimeoutError."""
    import os

    path = str(tmp_path / "fifo")
    os.mkfifo(path)

    def hold(worker, path):
        with open(path, "rb") as file:
            return file.read()

    def handler(number, frame):
        raise TimeoutError("the user's own")

    with WorkerGroup(Worker, 2) as group:
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="the user's own"):
                group[0].call(hold, path)
            assert time.monotonic() - began < 5
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        with open(path, "wb") as file:
            file.write(b"x")
        assert in_thread(lambda: group.options(timeout=5).call("echo", 3)).value(8) == [3, 3]


def test_a_handler_whose_call_settles_the_waiters_own_does_not_leave_it_asleep():
    """The handler strikes between the waiter's last look and its sleep, sooner or later."""
    code = """
    import rankwise._keeper
    rankwise._keeper.TICK = 30.0  # which would wake one that is asleep: a slow machine is no reason
    class Worker:
        def echo(self, value): return value
    group = WorkerGroup(Worker, 1, spin=0)
    def handler(number, frame):
        try: group.options(timeout=10).call("echo", 2)
        except RuntimeError: pass
    signal.signal(signal.SIGALRM, handler)
    slow = []
    for turn in range(2000):
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + turn % 100 * 1e-6)
        began = time.monotonic()
        group.call("echo", turn)
        slow.append(time.monotonic() - began > 5)
        signal.setitimer(signal.ITIMER_REAL, 0)
    group.close()
    say(slow=sum(slow))
    """
    with Script(code) as script:
        assert script.line(90)["slow"] == 0
        assert script.end() == 0
