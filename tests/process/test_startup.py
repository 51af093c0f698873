"""Starts: what a rank gets, and what is said when one fails."""

from __future__ import annotations

import importlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from drivers import Script, Watch, in_thread, until
from startup_ranks import Runner

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
    assert told - float(mark.read_text()) < 5
    assert dict(os.environ) == before


@pytest.mark.parametrize("kind", ["-callbacks", "-io", "-logs"])
def test_a_start_without_a_thread_for_it_leaves_no_other_behind(kind, monkeypatch):
    def start_some(thread):
        if thread.name.endswith(kind):
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start_some)
    with pytest.raises(RuntimeError, match="thread"):
        WorkerGroup(Runner, 1, name="threadless", on_failure=print)
    assert not [one.name for one in threading.enumerate() if "threadless" in one.name]


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
            said = script.line(30)
            assert time.monotonic() - pressed < 15  # and not the 600 s of the construction
            assert said["interrupted"] is True
            assert said["threads"] == ["MainThread"]
            assert said["children"] == []
            assert watch.left(2) == []
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
        WorkerGroup(Slow, 2, args=(path,), start_timeout=3.0, logs="off")
    assert 2.9 < time.monotonic() - began < 10
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


@pytest.mark.parametrize("seed", [1, 200])
def test_a_start_that_is_struck_between_any_two_steps_leaves_nothing(seed):
    """No child (not even a zombie), no thread and no descriptor."""
    with Script(STRUCK, str(seed)) as script:
        said = script.line(60)
        assert said["after"] == said["before"]


# -- what a rank inherits -----------------------------------------------------------------------

INHERITS = """
class Worker:
    def inherited(self):
        flags = {{name: getattr(sys.flags, name) for name in
                 ("optimize", "dont_write_bytecode", "utf8_mode", "no_user_site", "isolated")}}
        stdin = os.read(0, 1).decode(), os.readlink("/proc/self/fd/0")
        return dict(path=sys.path, argv=sys.argv, cwd=os.getcwd(), flags=flags, stdin=stdin,
                    warnings=sys.warnoptions, variable=os.environ.get("OF_THE_DRIVER"),
                    outer=os.environ.get("TORCHELASTIC_RUN_ID"), rank=os.environ["RANK"])

os.environ.update(OF_THE_DRIVER="set late", RANK="7", TORCHELASTIC_RUN_ID="outer")
os.mkdir("elsewhere")
os.chdir("elsewhere")
# As in a script that lies somewhere else: what is in the working directory is not to be imported.
sys.path.remove("")
for name in ("socket", "select", "typing", "numbers", "_launcher", "rankwise", "random"):
    with open(name + ".py", "w") as file:
        file.write("raise ImportError('this is in the working directory')")
sys.path.append("/no/such/path")
sys.argv[1:] = ["the driver's", "--own=arguments"]
with WorkerGroup(Worker, 2, start_method={start_method!r}) as group:
    sys.argv.append("too late")
    say(seen=group.call("inherited"), path=sys.path, cwd=os.getcwd())
"""

FLAGS = {
    "-O": {"optimize": 1},
    "-B": {"dont_write_bytecode": 1},
    "-Xutf8": {"utf8_mode": 1},
    "-s": {"no_user_site": 1},
}


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_rank_has_the_drivers_directory_path_arguments_flags_and_environment(
    start_method, tmp_path
):
    flags = (*FLAGS, "-Wignore::BytesWarning")
    code = INHERITS.format(start_method=start_method)
    with Script(code, "from the command line", flags=flags, cwd=tmp_path) as script:
        said = script.line()
        assert script.end() == 0
    assert said["cwd"] == str(tmp_path / "elsewhere")
    for rank, seen in enumerate(said["seen"]):
        assert seen["path"] == said["path"]
        assert seen["argv"] == ["-c", "the driver's", "--own=arguments"]
        assert seen["cwd"] == said["cwd"]
        assert seen["stdin"] == ["", "/dev/null"]
        assert "ignore::BytesWarning" in seen["warnings"]
        assert (seen["variable"], seen["outer"]) == ("set late", None)
        assert seen["rank"] == str(rank)
        for wanted in FLAGS.values():
            assert wanted.items() <= seen["flags"].items()


HASHES = """
class Worker:
    def hashes(self):
        words = {f"parameter.{number}" for number in range(50)}
        return hash("a word"), list(words), os.environ["PYTHONHASHSEED"]

def hashes():
    with WorkerGroup(Worker, 3, preload=PRELOAD, start_method=METHOD) as group:
        return group.call("hashes")
say(first=hashes(), again=hashes())
"""


def installed():
    look = [sys.executable, "-I", "-c", "import rankwise"]
    return subprocess.run(look, stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("flags", [(), ("-I",)], ids=["", "isolated"])
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_sets_iterate_alike_on_every_rank(start_method, flags, monkeypatch):
    """All ranks share one hash seed: who walks through a set of names in a collective meets the
    others at the same name."""
    if flags and not installed():
        pytest.skip("an isolated interpreter finds rankwise only where it is installed")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    preload = ("json",) if start_method == "forkserver" else ()
    code = f"METHOD, PRELOAD = {start_method!r}, {preload!r}\n{HASHES}"
    with Script(code, flags=flags) as script:
        said = script.line()
        assert script.end() == 0
    for ranks in said.values():
        assert ranks == [ranks[0]] * 3
    assert said["first"] != said["again"], "chosen anew for each group"


def test_a_hash_seed_of_the_drivers_is_the_ranks(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "11")

    def seed(worker):
        return os.environ["PYTHONHASHSEED"], hash("a word")

    with WorkerGroup(object, 2) as group:
        first, second = group.call(seed)
    assert first == second
    assert first[0] == "11"


# -- forked ranks -------------------------------------------------------------------------------

RANDOM = {
    "random": "import random; result = random.random()",
    "numpy": "import numpy; result = float(numpy.random.random())",
    "torch": "import torch; result = float(torch.rand(1))",
}


@pytest.mark.parametrize("library", RANDOM)
def test_forked_ranks_have_random_numbers_of_their_own(library, tmp_path, monkeypatch):
    """They are copies of one process, which may have drawn numbers, or seeded the generator."""
    pytest.importorskip(library)
    seeds = {"random": "random.seed(1)", "numpy": "numpy.random.seed(1)",
             "torch": "torch.manual_seed(1)"}  # fmt: skip
    name = f"preloaded_{library}"
    (tmp_path / f"{name}.py").write_text(f"import {library}\n{seeds.get(library, '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with WorkerGroup(Runner, 3, start_method="forkserver", preload=(name,)) as group:
        assert group.call("run", f"import sys; result = {name!r} in sys.modules") == [True] * 3
        seen = group.call("run", RANDOM[library])
    assert len(set(seen)) == 3


THREAD = """
import threading
started = threading.Event()
thread = threading.Thread(target=lambda: (started.set(), threading.Event().wait()), daemon=True)
thread.start()
started.wait()
"""


def test_a_preload_that_is_not_clean_is_told_with_its_reason_and_the_ranks_are_spawned(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "not_clean.py").write_text(THREAD)
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.INFO, "rankwise"):
        with WorkerGroup(
            Runner, 2, name="unclean", start_method="forkserver", preload=("not_clean",)
        ) as group:
            asked = "import sys; result = 'not_clean' in sys.modules"
            assert group.call("run", asked) == [False] * 2
    (told,) = [one for one in caplog.records if "spawned, not forked" in one.message]
    assert told.levelno == logging.WARNING
    assert told.message == (
        "unclean: the ranks are spawned, not forked: 1 more thread runs in the launcher"
    )  # fmt: skip
    assert "has preloaded" not in caplog.text


def test_a_clean_preload_is_told_with_the_seconds_that_it_took(tmp_path, monkeypatch, caplog):
    (tmp_path / "clean.py").write_text("import json")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.INFO, "rankwise"):
        with WorkerGroup(Runner, 1, start_method="forkserver", preload=("clean",)) as group:
            assert group[0].call("run", "import sys; result = 'clean' in sys.modules")
    assert re.search(r"workers: the launcher has preloaded in \d\.\d\d s", caplog.text)


# -- phases ---------------------------------------------------------------------------------------

SLOW = """
import os, sys
def wait(name):
    with open(os.path.join(os.path.dirname(__file__), name + os.environ["RANK"]), "rb"): pass
if "RANK" in os.environ: wait("import")
class Slow:
    def __init__(self): wait("construct")
    def pid(self): return os.getpid()
"""


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_each_phase_of_each_rank_is_in_the_log(start_method, tmp_path, monkeypatch, caplog):
    """With the rank, its pid and the time; a rank that is slow holds back no other's line."""
    (tmp_path / "slow_phases.py").write_text(SLOW)
    for phase in ("import", "construct"):
        for rank in range(2):
            os.mkfifo(tmp_path / f"{phase}{rank}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    slow = importlib.import_module("slow_phases").Slow

    def phases(rank):
        pattern = rf"slow: rank {rank} \(pid \d+\): (\w+), after \d+\.\d\d s"
        return re.findall(pattern, caplog.text)

    def let_go(phase, rank):
        with open(tmp_path / f"{phase}{rank}", "wb"):
            pass

    with caplog.at_level(logging.INFO, "rankwise"):
        starting = in_thread(
            lambda: WorkerGroup(slow, 2, name="slow", start_method=start_method, logs="off")
        )
        until(lambda: "import" in phases(0) and "import" in phases(1))
        let_go("import", 1)
        until(lambda: "construct" in phases(1))
        assert "construct" not in phases(0)
        let_go("import", 0)
        until(lambda: "construct" in phases(0))
        let_go("construct", 0)
        until(lambda: "ready" in phases(0), what="rank 0 is ready, while rank 1 is not")
        let_go("construct", 1)
        group = starting.value()
        with group:
            pids = group.call("pid")
            until(lambda: "ready" in phases(1))
    for rank in range(2):
        assert phases(rank) == ["spawn", "import", "construct", "ready"]
        assert f"rank {rank} (pid {pids[rank]}): ready" in caplog.text


def test_a_start_that_is_quick_has_every_phase_in_the_log_too(caplog):
    with caplog.at_level(logging.INFO, "rankwise"):
        with WorkerGroup(Runner, 2, name="quick"):
            pass
    for rank in range(2):
        told = re.findall(rf"quick: rank {rank} \(pid \d+\): (\w+), after", caplog.text)
        assert told == ["spawn", "import", "construct", "ready"]
