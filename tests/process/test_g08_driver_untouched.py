"""Guarantee 8: signals, environment and forks of the driver are its own."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from drivers import PRELUDE, SECONDS, Script, Watch, readable

WORKER = """
class Worker:
    def __init__(self, slow=False):
        if slow:
            print("construct", flush=True)
            time.sleep(600)
    def echo(self, value): return value
    def pids(self): return [os.getpid(), os.getppid()]
    def work(self):
        print("working", flush=True)
        while not current_call().cancelled():
            time.sleep(0.01)
    def work_on(self):
        print("working", flush=True)
        time.sleep(600)
    def hold(self, path):
        with open(path, "rb") as file: return file.read().decode()
    def finish(self, path):
        with open(path, "a") as file: file.write("x")
    def __enter__(self): return self
    def __exit__(self, *error):
        if self.__dict__.get("slow_exit"):
            print("leaving", flush=True)
            time.sleep(600)
    def be_slow(self): self.slow_exit = True
"""


# -- handlers and environment -------------------------------------------------------------------


STATE = """
def state():
    umask = os.umask(0)
    os.umask(umask)
    handlers = {int(n): repr(signal.getsignal(n)) for n in signal.valid_signals()}
    mask = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    # Not 32 and 33, which are the C library's own and change with its first thread or child.
    ours = sum(1 << n - 1 for n in signal.valid_signals())
    with open("/proc/self/status") as file:
        pairs = [line.split() for line in file if line.startswith(("SigBlk", "SigIgn"))]
    masks = [f"{name} {int(value, 16) & ours:x}" for name, value in pairs]
    return json.loads(json.dumps(dict(
        handlers=handlers, mask=mask, masks=masks, environ=dict(os.environ), cwd=os.getcwd(),
        path=list(sys.path), argv=sys.argv, hook=repr(sys.excepthook),
        wakeup=signal.set_wakeup_fd(-1), umask=umask,
    )))
"""


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_signal_handlers_mask_and_environment_are_unchanged(start_method):
    code = f"""{WORKER}{STATE}
before = state()
with WorkerGroup(Worker, 2, env={{"ONLY_THERE": "1"}}, threads=1,
                 start_method={start_method!r}) as group:
    group.call("echo", 1)
    try: group[0].call(lambda worker: 1 / 0)
    except ZeroDivisionError: pass
    inside = state()
after = state()
say(before=before, inside=inside, after=after)
"""
    with Script(code) as script:
        said = script.line()
        assert said["inside"] == said["before"]
        assert said["after"] == said["before"]
        assert script.end() == 0


def test_a_group_works_off_the_main_thread_and_with_sigchld_ignored():
    code = f"""{WORKER}
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def work():
    with WorkerGroup(Worker, 2) as group:
        say(value=group.call("echo", 5))
thread = threading.Thread(target=work)
thread.start()
thread.join()
try: os.wait()
except ChildProcessError: say(children="none")
"""
    with Script(code) as script:
        assert script.line()["value"] == [5, 5]
        assert script.line()["children"] == "none"
        assert script.end() == 0
        assert script.errors() == ""


def test_a_driver_that_waits_for_any_child_takes_nothing_from_the_group():
    """os.wait() in the user's own code may reap the launcher: the end is known all the same."""
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2)
pids = group.call("pids")
def reap():
    try:
        while True: os.wait()
    except ChildProcessError: pass
thread = threading.Thread(target=reap, daemon=True)
thread.start()
group.call("echo", 1)
began = time.monotonic()
group.close()
say(seconds=time.monotonic() - began)
"""
    with Script(code) as script:
        assert script.line()["seconds"] < 2
        assert script.end() == 0
        assert script.errors() == ""


# -- ^C on a terminal -----------------------------------------------------------------------------


class Terminal:
    """A session of its own on a pseudo-terminal, as a shell would start it."""

    def __init__(self, code: str) -> None:
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=os.environ | {"PYTHON_COLORS": "0"},  # 3.13 colours its tracebacks
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(inner)
        self.text = ""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS)
        os.close(self.fd)

    def see(self, word: str, count: int = 1) -> None:
        deadline = time.monotonic() + SECONDS
        while self.text.count(word) < count:
            assert readable(self.fd, max(0, deadline - time.monotonic())), self.text
            assert self.read(), f"ended before {word!r}:\n{self.text}"

    def read(self) -> bool:
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def press(self, key: bytes = b"\x03") -> None:
        os.write(self.fd, key)

    def end(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                self.process.send_signal(signal.SIGUSR1)
                while readable(self.fd, 0.2) and self.read():
                    pass
                raise AssertionError(f"it goes on {seconds} s after ^C:\n{self.text}")
            if select.select([self.fd], [], [], min(left, 0.02))[0]:
                self.read()
        while readable(self.fd, 0) and self.read():
            pass
        return self.process.returncode


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_ranks_are_in_the_drivers_session_and_have_no_terminal(start_method):
    code = f"""
    class Worker:
        def session(self): return os.getsid(0), os.getpgrp() == os.getpid()
        def open_terminal(self):
            try: os.close(os.open("/dev/tty", os.O_RDWR))
            except OSError as error: return error.errno
    group = WorkerGroup(Worker, 2, start_method={start_method!r})
    os.close(os.open("/dev/tty", os.O_RDWR))  # the driver has one
    say(session=os.getsid(0), ranks=group.call("session"), tty=group.call("open_terminal"))
    group.close()
    """
    with Terminal(code) as terminal:
        terminal.see("}")
        assert terminal.end(SECONDS) == 0
        said = json.loads(terminal.text[terminal.text.index("{") :].partition("}")[0] + "}")
    assert said["ranks"] == [[said["session"], True]] * 2
    assert said["tty"] == [errno.ENXIO] * 2


def pids_in(text: str) -> list[int]:
    return sorted({int(pid) for pid in re.findall(r"\d+", re.search(r'"pids": (.*)\}', text)[1])})


INTERRUPTED = (-signal.SIGINT, 130)


def assert_one_traceback(text: str) -> None:
    assert text.count("Traceback (most recent call last)") == 1, text
    assert text.rstrip().endswith("KeyboardInterrupt"), text
    assert "\x1b" not in text.rsplit("KeyboardInterrupt", 1)[1], text


@pytest.mark.parametrize("body", ["plain", "with"])
@pytest.mark.parametrize("stage", ["idle", "call", "result", "await"])
def test_control_c_ends_the_driver_alone(stage, body):
    wait = {
        # Not one long sleep: ^C that comes just before its system call is not noticed in it (a bare
        # Python that sleeps after its `print` went on sleeping in 23 of 4,800 runs).
        "idle": "print('now', flush=True)\nwhile True: time.sleep(0.01)",
        "call": "group.call('work')",
        "result": "group.submit('work').result()",
        "await": "__import__('asyncio').run(wait_for(group))",
    }[stage]
    seen = "now" if stage == "idle" else "working"
    inner = f"say(pids=group.call('pids'))\n{wait}"
    if body == "with":
        block = f"with WorkerGroup(Worker, 2) as group:\n{textwrap.indent(inner, '    ')}\n"
    else:
        block = f"group = WorkerGroup(Worker, 2)\n{inner}\n"
    code = f"{WORKER}\nasync def wait_for(group): await group.submit('work')\n{block}"
    with Terminal(code) as terminal:
        terminal.see("pids")
        terminal.see("\n", 1)
        terminal.see(seen, 1 if seen == "now" else 2)
        with Watch(pids_in(terminal.text)) as watch:
            terminal.press()
            assert terminal.end(20) in INTERRUPTED
            assert watch.left(5) == []
    if stage != "await":  # asyncio.run raises its own over the task's CancelledError
        assert_one_traceback(terminal.text)


def test_a_second_control_c_ends_the_wait_for_calls_that_do_not_look():
    code = f"""{WORKER}
def tell():
    while group.healthy: time.sleep(0.001)
    print("on the way out", flush=True)
with WorkerGroup(Worker, 2) as group:
    threading.Thread(target=tell, daemon=True).start()
    say(pids=group.call("pids"))
    group.call("work_on")
"""
    with Terminal(code) as terminal:
        terminal.see("working", 2)
        with Watch(pids_in(terminal.text)) as watch:
            terminal.press()
            terminal.see("on the way out")
            pressed = time.monotonic()
            terminal.press()
            assert terminal.end(20) in INTERRUPTED
            assert time.monotonic() - pressed < 8
            assert watch.left(5) == []


def test_control_c_in_a_start_leaves_nothing():
    code = f"{WORKER}\nWorkerGroup(Worker, 2, args=(True,))\n"
    with Terminal(code) as terminal:
        terminal.see("construct", 2)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(terminal.process.pid)],
            capture_output=True, text=True, check=False,
        ).stdout.split()  # fmt: skip
        launcher = int(children[0])
        with open(f"/proc/{launcher}/task/{launcher}/children") as file:
            workers = [int(pid) for pid in file.read().split()]
        assert len(workers) == 2
        with Watch([launcher, *workers]) as watch:
            pressed = time.monotonic()
            terminal.press()
            assert terminal.end(20) in INTERRUPTED
            assert time.monotonic() - pressed < 8
            assert watch.left(5) == []
    assert_one_traceback(terminal.text)


@pytest.mark.parametrize("form", ["close", "with"])
def test_control_c_turns_the_wait_of_close_into_a_kill(form):
    tail = "group.call('be_slow')\n"
    if form == "close":
        block = (
            "group = WorkerGroup(Worker, 2)\nsay(pids=group.call('pids'))\n"
            f"{tail}group.close(None)\n"
        )
    else:
        block = (
            f"with WorkerGroup(Worker, 2) as group:\n    say(pids=group.call('pids'))\n    {tail}"
        )
    with Terminal(WORKER + block) as terminal:
        terminal.see("leaving", 2)
        with Watch(pids_in(terminal.text)) as watch:
            pressed = time.monotonic()
            terminal.press()
            assert terminal.end(20) in INTERRUPTED
            assert time.monotonic() - pressed < 8
            assert watch.left(5) == []
    assert_one_traceback(terminal.text)


def test_a_call_goes_on_after_control_c_and_the_group_is_usable(tmp_path):
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2)
let_go = {str(tmp_path / "let go")!r}
def slow(worker, let_go):
    print("working", flush=True)
    worker.finished = 0
    while not os.path.exists(let_go):
        time.sleep(0.01)
    worker.finished = 1
    return "late"
try: group.call(slow, let_go)
except KeyboardInterrupt: print("caught", flush=True)
open(let_go, "x").close()
say(value=group.options(timeout=10).call(lambda worker: worker.finished))
group.close()
"""
    with Terminal(code) as terminal:
        terminal.see("working", 2)
        terminal.press()
        terminal.see("caught")
        terminal.see('"value": [1, 1]')
        assert terminal.end(20) == 0
    assert "Traceback" not in terminal.text


# -- fork --------------------------------------------------------------------------------------


FORK = f"""{WORKER}
group = WorkerGroup(Worker, 2)
view = group[0]
future = group[0].submit("hold", sys.argv[1])
done = group[1].submit("echo", 2)
done.result()
pids = group.pids
read, write = os.pipe()
owner = os.getpid()
child = os.fork()
if child == 0:
    tried = {{}}
    import asyncio
    attempts = dict(
        call=lambda: group.call("echo", 1),
        submit=lambda: group.submit("echo", 1),
        view=lambda: view.call("echo", 1),
        index=lambda: group[1].call("echo", 1),
        scatter=lambda: group.scatter("echo", [1, 2]),
        submit_each=lambda: group.submit_each("echo", 1),
        rpc=lambda: group.collective_rpc("echo", args=(1,)),
        flush=lambda: group.flush(5),
        close=lambda: group.close(),
        kill=lambda: group.kill(),
        shutdown=lambda: group.shutdown(),
        result=lambda: future.result(5),
        aclose=lambda: asyncio.run(group.aclose()),
        health=lambda: group.health(),
        healthy=lambda: group.healthy,
        failure=lambda: group.failure,
        pids=lambda: group.pids,
        shared_array=lambda: group.shared_array(10),
    )
    for name, attempt in attempts.items():
        try:
            attempt()
            tried[name] = "no error"
        except RuntimeError as error:
            tried[name] = str(error)
        except BaseException as error:
            tried[name] = repr(error)
    try:
        with group: tried["with"] = "left"
    except BaseException as error:
        tried["with"] = repr(error)
    os.write(write, json.dumps(tried).encode())
    os.close(write)
    %(leave)s
os.close(write)
data = b""
while more := os.read(read, 65536): data += more
_, status = os.waitpid(child, 0)
with open(sys.argv[1], "wb") as file: file.write(b"held")
say(tried=json.loads(data), owner=owner, status=status, future=future.result(5),
    again=[pid for pid, _ in group.call("pids")] == pids)
began = time.monotonic()
group.close()
say(closed=time.monotonic() - began)
"""


@pytest.mark.parametrize(
    "leave", ["os._exit(0)", "sys.exit(0)", "del group, view, future; sys.exit(0)"]
)
def test_a_forked_childs_copy_is_inert_and_the_parent_goes_on(leave, tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    with Script(FORK % {"leave": leave}, path) as script:
        said = script.line()
        tried = said["tried"]
        assert tried.pop("with") == "left"
        wrong = {name: text for name, text in tried.items() if str(said["owner"]) not in text}
        assert not wrong
        assert said["status"] == 0
        assert said["again"] is True
        assert said["future"] == "held"
        assert script.line()["closed"] < 2
        assert script.end() == 0
        assert script.errors() == ""


def test_a_forked_childs_copy_of_threads_is_inert_too(tmp_path):
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2, backend="inline")
view, open_ = group[0], group[1].submit("hold", sys.argv[1])
read, write = os.pipe()
async def awaits(): return await open_
import asyncio
child = os.fork()
if child == 0:
    tried = {{}}
    attempts = dict(
        call=lambda: group.call("echo", 1), submit=lambda: group.submit("echo", 1),
        view=lambda: view.call("echo", 1), flush=lambda: group.flush(5), pids=lambda: group.pids,
        close=group.close, kill=group.kill, restart=group.restart, health=group.health,
        result=lambda: open_.result(5), callback=lambda: open_.add_done_callback(print),
        awaits=lambda: asyncio.run(asyncio.wait_for(awaits(), 5)),
    )
    for name, attempt in attempts.items():
        try: tried[name] = repr(attempt())
        except Exception as error: tried[name] = type(error).__name__ + str(error)
    os.write(write, json.dumps(tried).encode())
    os._exit(0)
os.waitpid(child, 0)
tried = json.loads(os.read(read, 65536))
told = f"RuntimeErrorworkers belongs to process {{os.getpid()}}; "
with open(sys.argv[1], "wb") as file: file.write(b"held")
say(wrong={{name: text for name, text in tried.items() if not text.startswith(told)}},
    tried=len(tried), held=open_.result(5), again=group.call("echo", 1))
group.close()
"""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    with Script(code, path) as script:
        said = {"wrong": {}, "tried": 12, "held": "held", "again": [1, 1]}
        assert script.line() == said
        assert script.end() == 0
        assert script.errors() == ""


def test_a_child_that_was_forked_inside_with_leaves_the_block_without_touching_the_group():
    code = f"""{WORKER}
with WorkerGroup(Worker, 2) as group:
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        say(status=status, value=group.call("echo", 3))
"""
    with Script(code) as script:
        assert script.line() == {"status": 0, "value": [3, 3]}
        assert script.end() == 0
        assert script.errors() == ""


@pytest.mark.parametrize("spin", ["5.0", "0", "'auto'"])
def test_a_child_that_a_handler_has_forked_during_a_wait_is_told_whose_group_it_is(spin):
    code = f"""{WORKER}
    def nap(self): time.sleep(0.5); return 7
group = WorkerGroup(Worker, 2, spin={spin})
children = []
signal.signal(signal.SIGALRM, lambda number, frame: children.append(os.fork()))
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    value = group.call("nap")
except RuntimeError as error:
    os._exit(0 if str(os.getppid()) in str(error) else 1)
except BaseException:
    os._exit(2)
_, status = os.waitpid(children[0], 0)
say(value=value, status=os.waitstatus_to_exitcode(status), again=group.call("echo", 1))
group.close()
"""
    with Script(code) as script:
        assert script.line() == {"value": [7, 7], "status": 0, "again": [1, 1]}
        assert script.end() == 0
        assert script.errors() == ""


def test_a_forked_child_can_make_a_group_of_its_own():
    code = f"""{WORKER}
group = WorkerGroup(Worker, 1)
child = os.fork()
if child == 0:
    with WorkerGroup(Worker, 1) as own:
        say(value=own.call("echo", "own"))
    sys.exit(0)
_, status = os.waitpid(child, 0)
say(status=status, value=group.call("echo", "mine"))
group.close()
"""
    with Script(code) as script:
        assert script.line()["value"] == ["own"]
        assert script.line() == {"status": 0, "value": ["mine"]}
        assert script.end() == 0
        assert script.errors() == ""


def test_a_child_forked_by_multiprocessing_while_other_threads_call_is_no_deadlock():
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2)
stop = threading.Event()
def churn():
    while not stop.is_set(): group.call("echo", 1)
threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads: thread.start()
statuses = []
for number in range(30):
    child = os.fork()
    if child == 0:
        try: group.call("echo", 1)
        except RuntimeError: os._exit(0)
        os._exit(1)
    statuses.append(os.waitpid(child, 0)[1])
stop.set()
for thread in threads: thread.join()
say(statuses=statuses, value=group.call("echo", 2))
group.close()
"""
    with Script(code, flags=("-W", "ignore::DeprecationWarning")) as script:
        assert script.line() == {"statuses": [0] * 30, "value": [2, 2]}
        assert script.end() == 0


def test_a_group_cannot_be_pickled():
    import copy
    import pickle

    from rankwise import WorkerGroup

    class Worker:
        def echo(self, value):
            return value

    with WorkerGroup(Worker, 1, backend="inline") as group:
        for thing in (group, group[0], group.options(timeout=1)):
            with pytest.raises(TypeError, match="pickle"):
                pickle.dumps(thing)
            with pytest.raises(TypeError):
                copy.copy(thing)
