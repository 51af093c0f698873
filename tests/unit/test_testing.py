"""`rankwise.testing` itself: its names, arguments and weight, and what its leak check finds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from rankwise import testing
from rankwise.testing import Leaked, delay, drop, faults, hold_gil, kill, leak_check, refuse

ROOT = Path(__file__).parents[2]


# -- names and weight -----------------------------------------------------------------------------


def test_all_is_the_public_namespace():
    assert len(testing.__all__) == len({*testing.__all__})
    assert set(testing.__all__) == set(testing._HOMES)
    assert set(testing.__all__) <= set(dir(testing))
    for name in testing.__all__:
        assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        testing.nothing


def test_the_plugin_is_what_pytest_is_told():
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert entry == {"pytest11": {"rankwise": "rankwise.testing.plugin"}}


def modules_after(code: str) -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_the_plugin_brings_nothing_into_a_pytest_that_does_not_use_it():
    more = modules_after("import pytest, rankwise.testing.plugin") - modules_after("import pytest")
    assert more == {"rankwise", "rankwise.testing", "rankwise.testing.plugin"}


def test_the_package_alone_is_light():
    heavy = {"asyncio", "logging", "pytest", "subprocess", "dataclasses", "numpy", "torch"}
    assert not heavy & modules_after("import rankwise.testing")


def test_what_a_rank_with_a_fault_imports_is_light():
    code = "import rankwise.testing._inject"
    heavy = {"asyncio", "multiprocessing", "pytest", "subprocess", "dataclasses", "ctypes"}
    assert not heavy & modules_after(code)


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: kill(-1), ValueError, "rank"),
        (lambda: kill("1"), TypeError, "rank"),
        (lambda: kill(0, at="start"), ValueError, "at must be 'spawn', 'import'"),
        (lambda: kill(0, at="import", call=1), ValueError, "no call has come yet"),
        (lambda: kill(0, call=0), ValueError, "call"),
        (lambda: kill(0, signal=999), ValueError, "999"),
        (lambda: drop(0, at="run"), ValueError, "at must be 'receive' or 'reply'"),
        (lambda: delay(0, -1), ValueError, "seconds"),
        (lambda: delay(0, "1"), TypeError, "seconds"),
        (lambda: hold_gil(0, float("inf")), ValueError, "seconds"),
        (lambda: refuse(0, error=ValueError), TypeError, "error"),
        (lambda: faults(3), TypeError, "what kill, delay, drop, refuse or hold_gil make"),
    ],
)
def test_a_wrong_argument_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_fault_says_what_it_is():
    assert repr(kill(1, at="run", call=7)) == "<Fault: kill rank 1 at 'run' of call 7>"
    assert repr(delay(None, 2, at="spawn")) == "<Fault: delay all ranks at 'spawn'>"


def test_faults_end_with_their_block():
    from rankwise import _planned

    plan = faults(kill(0))
    with plan, pytest.raises(KeyError), faults(kill(1)):
        raise KeyError
    assert _planned.faults is None
    with plan:
        assert _planned.faults is plan
    assert _planned.faults is None


# -- leaks ----------------------------------------------------------------------------------------


def leaves(code):
    """What `leak_check` says that `code` leaves."""
    with pytest.raises(Leaked) as caught, leak_check(settling=0.05):
        code()
    return str(caught.value)


def test_a_process_that_is_left_is_named():
    children = []
    try:
        text = leaves(lambda: children.append(subprocess.Popen(["sleep", "61"])))
        assert f"process {children[0].pid} " in text and "sleep 61" in text
    finally:
        children[0].kill()
        children[0].wait()


def test_an_orphan_is_found_by_its_mark():
    before = os.environ.get("RANKWISE_TEST_SESSION")
    # When it has closed its output it is past its exec: in the middle of one it has no mark.
    code = "setsid sh -c 'exec >&-; sleep 62; :' &"
    text = leaves(lambda: subprocess.run(["sh", "-c", code], check=True, stdout=subprocess.PIPE))
    assert "sleep 62" in text
    assert os.environ.get("RANKWISE_TEST_SESSION") == before
    os.killpg(int(text.partition("session ")[2].partition(")")[0]), signal.SIGKILL)


def test_a_descriptor_that_is_left_is_named():
    kept = []
    text = leaves(lambda: kept.extend(socket.socketpair()))
    for sock in kept:
        assert f"descriptor {sock.fileno()}: socket" in text
        sock.close()


def test_a_thread_of_rankwise_is_named_and_another_is_not():
    gate = threading.Event()
    threads = [threading.Thread(target=gate.wait, name=name) for name in ("rankwise-x-io", "mine")]
    try:
        text = leaves(lambda: [thread.start() for thread in threads])
        assert "rankwise-x-io" in text and "mine" not in text
    finally:
        gate.set()
        for thread in threads:
            thread.join()


def test_an_entry_of_dev_shm_is_named(tmp_path):
    path = Path(f"/dev/shm/rankwise-test-{os.getpid()}")
    try:
        assert str(path) in leaves(path.touch)
    finally:
        path.unlink()


def test_what_was_there_before_does_not_count():
    with socket.socket(), leak_check():
        pass


def test_an_exception_of_the_block_comes_first():
    kept = []
    with pytest.raises(KeyError), leak_check(settling=0.0):
        kept.append(socket.socket())
        raise KeyError
    kept[0].close()


def test_pytest_finds_the_fixtures_where_rankwise_is_installed(tmp_path):
    """Installed is what has a dist-info with its entry points on the path."""
    info = tmp_path / "rankwise-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rankwise\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[pytest11]\nrankwise = rankwise.testing.plugin\n")
    (tmp_path / "test_it.py").write_text(
        "class Worker:\n"
        "    def echo(self, value): return value\n"
        "def test_it(inline_group, leak_check):\n"
        "    assert inline_group(Worker, 2).call('echo', 3) == [3, 3]\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT / "src")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, timeout=50, check=False,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_leak_check_fixture_fails_the_test_and_says_what_is_left(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import socket\nkept = []\ndef test_it(leak_check):\n    kept.extend(socket.socketpair())\n"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--disable-plugin-autoload",
            "-p", "rankwise.testing.plugin", str(tmp_path),
        ],
        capture_output=True, text=True, cwd=tmp_path, timeout=50, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert "1 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "the test has left behind:\n" in done.stdout
    assert "socket:" in done.stdout
