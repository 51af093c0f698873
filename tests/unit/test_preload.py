"""When a process may be forked, and what a forked rank's environment is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rankwise._preload import own_environment

BEFORE = {"A": "1", "B": "2", "ONE_THREAD": "1"}


@pytest.mark.parametrize(
    ("after", "rank", "expected"),
    [
        (BEFORE, {"A": "1", "RANK": "3"}, {"A": "1", "RANK": "3"}),
        ({**BEFORE, "NEW": "x"}, {"A": "1", "B": "2"}, {"A": "1", "B": "2", "NEW": "x"}),
        ({**BEFORE, "A": "x"}, {"A": "1", "B": "2"}, {"A": "x", "B": "2"}),
        ({**BEFORE, "A": "x"}, {"A": "own", "B": "2"}, {"A": "own", "B": "2"}),
        ({**BEFORE, "NEW": "x"}, {"NEW": "own"}, {"NEW": "own"}),
        ({"B": "2", "ONE_THREAD": "1"}, {"A": "1", "B": "2"}, {"B": "2"}),
        ({**BEFORE, "ONE_THREAD": "x"}, {"ONE_THREAD": "8"}, {"ONE_THREAD": "8"}),
    ],
    ids=["unchanged", "added", "changed", "own-wins", "own-new-wins", "removed", "threads"],
)
def test_a_forked_rank_has_the_environment_that_it_would_have_by_importing_itself(
    after: dict[str, str], rank: dict[str, str], expected: dict[str, str]
) -> None:
    assert own_environment(rank, BEFORE, after) == expected


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", None),
        ("threading.Thread(target=print).start()", None),
        (
            "threading.Thread(target=lock.acquire, daemon=True).start()",
            "1 more thread runs in the launcher",
        ),
        (
            "[threading.Thread(target=lock.acquire, daemon=True).start() for _ in '12']",
            "2 more threads run in the launcher",
        ),
        (
            (
                "torch.cuda = types.SimpleNamespace(is_initialized=lambda: True); "
                "sys.modules['torch'] = torch"
            ),
            "torch has a CUDA context in the launcher",
        ),
        (
            "_preload._procfs.DEVICES = ('/dev/zero',); file = open('/dev/zero')",
            "/dev/zero is open in the launcher",
        ),
    ],
    ids=["clean", "thread-ended", "thread", "threads", "cuda", "device"],
)
def test_a_process_is_forked_only_where_that_is_safe(code: str, reason: str | None) -> None:
    script = (
        f"import sys, threading, types\nsys.path[:0] = {sys.path!r}\n"
        "from rankwise import _preload\n"
        "lock = threading.Lock(); lock.acquire(); torch = types.ModuleType('torch')\n"
        f"{code}\n"
        "sys.stderr.write(repr(_preload.why_not_fork()))\n"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.stderr == repr(reason)
