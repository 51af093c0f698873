"""Starts: what a rank gets, and what is said when one fails."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from drivers import Script, Watch, in_thread

from rankwise import StartupError, StartupTimeout, WorkerGroup

MODULE = """
import os, signal, ctypes
phase, how = os.environ["FAIL"].split(":")
def fail():
    print("last words", flush=True)
    with open(os.environ["MARK"], "w") as file:
        import time
        file.write(repr(time.monotonic()))
    if how == "exit": os._exit(3)
    elif how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    elif how == "abort": os.abort()
    elif how == "segfault": ctypes.string_at(0)
    elif how == "sysexit": raise SystemExit(4)
    else: raise LookupError("a reason")
mine = os.environ["RANK"] == "1"
if phase == "import" and mine: fail()
class Worker:
    def __init__(self):
        if phase == "construct" and mine: fail()
    def __enter__(self):
        if phase == "enter" and mine: fail()
        return self
    def __exit__(self, *error): pass
"""

DIES = {"exit": 3, "kill": -9, "abort": -6, "segfault": -11}


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.parametrize("how", [*DIES, "sysexit", "raise"])
@pytest.mark.parametrize("phase", ["import", "construct", "enter"])
def test_a_failing_start_says_who_where_and_how_at_once(
    phase, how, start_method, tmp_path, monkeypatch
):
    (tmp_path / "failing_start.py").write_text(MODULE)
    mark = tmp_path / "mark"

    def make():
        import sys

        sys.path.insert(0, str(tmp_path))
        import failing_start

        return failing_start.Worker()

    before = dict(os.environ)
    with pytest.raises(StartupError) as caught:
        WorkerGroup(
            make, 2, logs="off", start_method=start_method,
            env={"FAIL": f"{phase}:{how}", "MARK": str(mark)},
        )  # fmt: skip
    told = time.monotonic()
    error = caught.value
    assert error.rank == 1
    assert error.phase in ("import", "construct")
    assert "last words" in error.log_tail
    if how in DIES:
        assert error.exitcode == DIES[how]
    elif how == "raise":
        assert isinstance(error.__cause__, LookupError) and error.__cause__.args == ("a reason",)
    else:
        assert "SystemExit" in str(error.__cause__) or "SystemExit" in str(error)
    assert told - float(mark.read_text()) < 0.5
    assert dict(os.environ) == before


INTERRUPTED = """
class Worker:
    def __init__(self):
        time.sleep({construct})
    def pids(self): return [os.getpid(), os.getppid()]
signal.signal(signal.SIGINT, signal.default_int_handler)
os.write(1, b"{{}}\\n")
try:
    group = WorkerGroup(Worker, 2, start_method={start_method!r})
except KeyboardInterrupt:
    say(interrupted=True, threads=[t.name for t in threading.enumerate()],
        fds=len(os.listdir("/proc/self/fd")),
        children=open(f"/proc/self/task/{{os.getpid()}}/children").read().split())
else:
    say(interrupted=False)
    hear()
"""


def descendants(pid):
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *descendants(child)]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("moment", range(20))
def test_control_c_at_any_moment_of_a_start_is_clean(moment):
    delay = random.Random(moment).uniform(0, 0.35)
    method = ("spawn", "forkserver")[moment % 2]
    with Script(INTERRUPTED.format(construct=600, start_method=method)) as script:
        assert script.line() == {}
        threading.Event().wait(delay)  # a moment of the start: there is nothing to wait for
        pids = descendants(script.pid)
        with Watch(pids) as watch:
            script.kill(signal.SIGINT)
            pressed = time.monotonic()
            said = script.line(10)
            assert time.monotonic() - pressed < 2
            assert said["interrupted"] is True
            assert said["threads"] == ["MainThread"]
            assert said["children"] == []
            assert watch.left(0.2) == []
        assert script.end() == 0
        assert script.errors().count("Traceback") == 0, script.errors()


def test_a_start_that_takes_too_long_says_who_is_not_ready(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)

    class Slow:
        def __init__(self, path):
            if os.environ["RANK"] == "1":
                open(path, "rb")  # noqa: SIM115  # never opened for writing

    began = time.monotonic()
    with pytest.raises(StartupTimeout) as caught:
        WorkerGroup(Slow, 2, args=(path,), start_timeout=1.0, logs="off")
    assert 0.9 < time.monotonic() - began < 3
    assert isinstance(caught.value, TimeoutError)
    assert "rank 1" in str(caught.value) and "construct" in str(caught.value)


def test_eight_groups_from_four_threads_each_see_their_own_environment():
    class Env:
        def __init__(self):
            self.seen = os.environ["MARK"], os.environ["RANK"], os.environ["OWN"]

        def get(self):
            return self.seen

    def two(number):
        answers = []
        for step in (0, 1):
            env = [{"MARK": f"{number}.{step}", "OWN": str(rank)} for rank in range(2)]
            with WorkerGroup(Env, 2, env=env) as group:
                answers.append(group.call("get"))
        return answers

    threads = [in_thread(lambda n=n: two(n)) for n in range(4)]
    for number, thread in enumerate(threads):
        assert thread.value(30) == [
            [(f"{number}.{step}", str(rank), str(rank)) for rank in range(2)] for step in (0, 1)
        ]


STRUCK = """
class Worker:
    def echo(self): return 1
import random
def handler(*args): raise KeyboardInterrupt
WorkerGroup(Worker, 1, start_method="forkserver").close()
signal.signal(signal.SIGALRM, handler)
chance = random.Random(int(sys.argv[1]))
def state():
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    kinds = [open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] for pid in children]
    threads = sorted(t.name for t in threading.enumerate() if t.name != "MainThread")
    return [kinds, threads, len(os.listdir("/proc/self/fd"))]
before = state()
for _ in range(25):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0005, 0.1))
            group = WorkerGroup(Worker, 2, start_method="forkserver")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        group.close()
    except KeyboardInterrupt: pass
    deadline = time.monotonic() + 2
    while state() != before and time.monotonic() < deadline: threading.Event().wait(0.01)
    if state() != before: break
say(before=before, after=state())
"""


@pytest.mark.parametrize("seed", [1, 100, 200, 300])
def test_a_start_that_is_struck_between_any_two_steps_leaves_nothing(seed):
    """No child (not even a zombie), no thread and no descriptor."""
    with Script(STRUCK, str(seed)) as script:
        said = script.line(60)
        assert said["after"] == said["before"]


class Place:
    """What a rank finds when it starts."""

    def find(self):
        return {
            "cwd": os.getcwd(),
            "path": list(sys.path),
            "argv": list(sys.argv),
            "flags": [sys.flags.optimize, sys.flags.utf8_mode],
            "stdin": sys.stdin.read(),
            "here": os.environ.get("ONLY_HERE"),
        }

    def order(self):
        return list({f"word {number}" for number in range(50)})

    def draw(self):
        drawn = [random.random()]
        for name in ("numpy.random", "torch"):
            if name in sys.modules:
                module = sys.modules[name]
                drawn.append(float(module.rand(1)[0]))
        return drawn


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_rank_has_the_drivers_directory_path_arguments_and_variables(
    start_method, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "3"])
    monkeypatch.setenv("ONLY_HERE", "and there")
    with WorkerGroup(Place, 2, start_method=start_method) as group:
        for found in group.call("find"):
            assert found == {
                "cwd": str(tmp_path),
                "path": sys.path,
                "argv": ["train.py", "--steps", "3"],
                "flags": [sys.flags.optimize, sys.flags.utf8_mode],
                "stdin": "",
                "here": "and there",
            }


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_sets_iterate_alike_on_every_rank(start_method):
    with WorkerGroup(Place, 3, start_method=start_method) as group:
        orders = group.call("order")
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("preload", [("random",), ("random", "numpy.random")])
def test_forked_ranks_draw_numbers_of_their_own(preload):
    if "numpy.random" in preload:
        pytest.importorskip("numpy")
    with WorkerGroup(Place, 3, start_method="forkserver", preload=preload) as group:
        drawn = group.call("draw")
    assert len(drawn[0]) == len(preload)
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == 3


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_files_called_like_the_standard_librarys_harm_no_start(start_method, tmp_path):
    """In the directory where the driver runs: its own path does not have it, so no rank's does."""
    for name in ("types", "signal", "select", "struct", "socket", "pickle", "random", "copyreg"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "from rankwise import WorkerGroup\n"
        "class Worker:\n"
        "    def echo(self, value): return value\n"
        f"with WorkerGroup(Worker, 2, start_method={start_method!r}) as group:\n"
        "    print(group.call('echo', 5))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("[5, 5]\n", "", 0)


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_the_phases_of_a_start_are_logged_with_rank_and_time(start_method, caplog):
    class Slow:
        def __init__(self):
            time.sleep(0.1)

    with caplog.at_level("INFO", "rankwise"), WorkerGroup(Slow, 2, start_method=start_method):
        pass
    said = [record.getMessage() for record in caplog.records]
    for rank in range(2):
        mine = [line for line in said if f"rank {rank} (pid " in line]
        assert any(re.search(r": construct, after \d+\.\d\d s$", line) for line in mine), said


def test_a_launcher_that_cannot_fork_spawns_and_says_why(caplog, tmp_path, monkeypatch):
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        caplog.at_level("INFO", "rankwise"),
        WorkerGroup(Place, 2, start_method="forkserver", preload=["starts_a_thread"]) as group,
    ):
        assert len(group.call("draw")) == 2
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("spawned, not forked" in line and "thread" in line for line in said), said
