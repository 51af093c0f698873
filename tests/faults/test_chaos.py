"""A few episodes of `chaos.py`, which `make soak` plays for ten minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parent / "chaos.py"


@pytest.mark.limit(400)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_faults_leave_nobody_waiting_and_nothing_behind(seed: int) -> None:
    # In a process of its own: it looks at all that it has, and its end is part of the proof.
    for seconds in (8, 16, 32):  # a slow machine has few episodes in eight
        done = subprocess.run(
            [sys.executable, str(CHAOS), "--seed", str(seed), "--seconds", str(seconds)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        if "answered" in done.stdout and "WorkerDied" in done.stdout:
            break
    assert "answered" in done.stdout and "WorkerDied" in done.stdout, done.stdout
