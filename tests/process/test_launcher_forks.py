"""The real launcher process, driven by a harness: ranks that are forked from what it imported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launcher_harness import FAMILY, SECONDS, Start, ends

from rankwise._messages import Finish, Gone, Spawned

CLEAN = """
import os, random, signal
pid = os.getpid()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.set_wakeup_fd(-1)
os.environ["SET_BY_IMPORT"] = "1"
os.environ["COMMON"] = "2"
print("imported")
"""
THREAD = """
import os, threading
os.environ["SET_BY_IMPORT"] = "1"
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


@pytest.fixture
def module(root: Path) -> Iterator[Callable[[str], str]]:
    made: list[Path] = []

    def module(code: str) -> str:
        name = f"preloaded_{time.monotonic_ns()}"
        made.append(root / f"{name}.py")
        made[-1].write_text(code)
        return name

    yield module
    for path in made:
        path.unlink()


def test_forked_ranks_share_what_was_imported_once(
    start: Start, module: Callable[[str], str]
) -> None:
    name = module(CLEAN)
    group = start(3, start_method="forkserver", preload=(name,), environment={"OWN": "1"})
    assert group.preloaded().refused is None
    asked = f"""
import random
result = [sys.modules[{name!r}].pid, os.environ["COMMON"], os.environ["OWN"],
          os.environ["SET_BY_IMPORT"], os.environ.get("OMP_NUM_THREADS"),
          os.popen("echo $RANK").read(), open("/proc/self/comm").read(), random.random()]
"""
    seen = [group.ask(asked, rank) for rank in range(3)]
    for rank, answer in enumerate(seen):
        assert answer[:-1] == [  # type: ignore[index]
            group.process.pid, "2", "1", "1", os.environ.get("OMP_NUM_THREADS"),
            f"{rank}\n", f"g:{rank}\n",
        ]  # fmt: skip
    assert len({answer[-1] for answer in seen}) == 3  # type: ignore[index]
    for sock in group.calls:
        sock.shutdown(1)
    assert [group.exited(rank).exitcode for rank in range(3)] == [0, 0, 0]
    assert group.finish() == []
    assert group.shown[1] == b""  # what the launcher had buffered is not printed by each rank


def test_forked_ranks_have_random_numbers_of_their_own(
    start: Start, module: Callable[[str], str]
) -> None:
    pytest.importorskip("numpy")
    name = module("import random, numpy; random.seed(1); numpy.random.seed(1)")
    group = start(3, start_method="forkserver", preload=(name,))
    assert group.preloaded().refused is None
    code = "import random, numpy; result = [random.random(), numpy.random.random()]"
    seen = [group.ask(code, rank) for rank in range(3)]
    assert len({number for pair in seen for number in pair}) == 6  # type: ignore[attr-defined]
    assert group.finish() == []


def test_the_end_of_a_forked_rank_is_an_ordinary_end_of_an_interpreter(
    start: Start, module: Callable[[str], str]
) -> None:
    name = module("import atexit, os\natexit.register(lambda: os.write(1, b'bye\\n'))\n")
    group = start(2, start_method="forkserver", preload=(name,))
    group.ask("sys.stdout.write('buffered\\n')", 0)
    group.calls[0].shutdown(1)
    assert group.exited(0).exitcode == 0
    assert sorted(group.exited(0).log_tail.split()) == ["buffered", "bye"]
    assert group.finish() == []
    assert b"rank=1" not in group.shown[1]  # nor by the launcher itself, which ends with os._exit


def test_a_launcher_that_is_not_clean_spawns_and_says_why(
    start: Start, module: Callable[[str], str]
) -> None:
    name = module(THREAD)
    group = start(2, start_method="forkserver", preload=(name,))
    assert "thread runs" in (group.preloaded().refused or "")
    for rank in range(2):
        asked = f"result = [{name!r} in sys.modules, os.environ.get('SET_BY_IMPORT')]"
        assert group.ask(asked, rank) == [False, None]
    assert os.listdir(f"/proc/{group.process.pid}/task") == [str(group.process.pid)]
    family = group.ask(FAMILY)
    with ends(*family):  # type: ignore[misc]
        assert group.finish() == []


@pytest.mark.parametrize("code", ["import no_such_module", "raise SystemExit(3)", "1/0"])
def test_a_preload_that_fails_fails_every_rank_with_its_traceback(
    start: Start, module: Callable[[str], str], code: str
) -> None:
    name = module(code)
    group = start(2, start_method="forkserver", preload=(name,), wait=False)
    for failed in group.failures():
        assert failed.reason.startswith(f"preload: importing {name!r} failed\n")
        assert f"{name}.py" in failed.reason
        assert code in failed.reason
    assert group.all_of(Spawned) == []
    assert [sock.recv(1) for sock in group.calls] == [b"", b""]
    assert group.finish() == []


@pytest.mark.parametrize("word", ["finish", "close"])
@pytest.mark.parametrize("sleep", ["time.sleep", "ctypes.PyDLL(None).sleep"])
def test_a_preload_that_never_returns_ends_when_the_driver_says_so(
    start: Start, module: Callable[[str], str], word: str, sleep: str, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    name = module(
        "import ctypes, os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        f"with open({str(fifo)!r}, 'w') as fifo: print(child.pid, file=fifo)\n"
        f"{sleep}(1000)"
    )
    group = start(2, start_method="forkserver", preload=(name,), wait=False)
    child = int(fifo.read_text())
    with ends(group.process.pid, child):
        if word == "finish":
            group.send(Finish())
        else:
            group.control.close()
        group.process.wait(SECONDS)
    assert group.all_of(Gone) == []


def test_nothing_is_imported_where_the_finish_came_with_the_launch(
    start: Start, module: Callable[[str], str], tmp_path: Path
) -> None:
    """An import may take minutes, and the sentry would wait for what is off the socket already."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    later = ["/bin/sh", "-c", 'read go < "$0" && exec "$@"', str(fifo)]
    group = start(2, start_method="forkserver", preload=(module(CLEAN),), wrapper=later, wait=False)
    group.send(Finish())
    fifo.write_text("go\n")
    group.until(lambda: group.all_of(Gone))
    assert group.process.wait(SECONDS) == 0
    assert [type(message) for message in group.heard] == [Gone]
