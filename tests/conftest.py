"""What holds for every test: it leaves nothing behind (rankwise.testing), and it ends
(outer_limit.py)."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from outer_limit import DEFAULT, OuterLimit

from rankwise.testing import _leaks as leaks

OUTER = pytest.StashKey[OuterLimit]()
# What tests marked `leaks_allowed` have left. Ended when all tests are done.
ALLOWED = pytest.StashKey[set[leaks.Process]]()


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores ^C, and so would every process that a test starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        stderr = os.dup(2)
    else:
        with capture.global_and_fixture_disabled():
            stderr = os.dup(2)
    config.stash[OUTER] = OuterLimit(stderr)
    config.pluginmanager.register(config.stash[OUTER])
    config.stash[ALLOWED] = set()
    leaks.mark(os.environ)


VLLM = Path(__file__).parent / "vllm"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """vLLM's tests have an environment of their own, and take long: only where they are named."""
    if collection_path == VLLM:
        return None if any("vllm" in arg for arg in config.args) else True
    return None


def pytest_sessionstart() -> None:
    """What a library takes once and keeps is nobody's leak: libuv's pipe for signals, here."""
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.new_event_loop().close()


def pytest_unconfigure(config: pytest.Config) -> None:
    outer = config.stash.get(OUTER, None)
    if outer is not None:
        outer.close()


# --- it ends --------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The limit covers a test's fixtures too, coming and going."""
    outer = item.config.stash[OUTER]
    outer.start(item.nodeid, _limit(item))
    try:
        return (yield)
    finally:
        outer.stop()


def pytest_enter_pdb(config: pytest.Config) -> None:
    config.stash[OUTER].stop()  # a person is slow


def _limit(item: pytest.Item) -> float:
    marker = item.get_closest_marker("limit")
    return DEFAULT if marker is None else _seconds(*marker.args, **marker.kwargs)


def _seconds(seconds: float) -> float:
    return float(seconds)


# --- it leaves nothing behind ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Generator[None]:
    """Torn down last, after every fixture of the test: what they release is not left."""
    marker = request.node.get_closest_marker("leaks_allowed")
    before = leaks.take(request.config.stash[OUTER].family, surroundings=True)
    yield
    if marker is not None:
        _reason(*marker.args, **marker.kwargs)
        request.config.stash[ALLOWED].update(leaks.compare(before).processes)
        return
    left = leaks.left_since(before)
    if left:
        leaks.restore(before, left)
        pytest.fail(
            f"the test has left behind (and processes are killed now):\n{left}", pytrace=False
        )


def _reason(reason: str) -> None:
    assert reason, "leaks_allowed wants a reason"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nor does the whole run: what a wider fixture has left is found here."""
    left = session.config.stash[OUTER].family.members()
    unasked = [str(one) for one in left if one not in session.config.stash[ALLOWED]]
    leaks.end(left)
    if unasked:
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(
                "the tests have left behind (killed now):\n" + "\n".join(unasked), red=True
            )
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
