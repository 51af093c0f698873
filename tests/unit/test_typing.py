"""Calls are typed: both type checkers report what is wrong in `tests/typing`, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankwise

SOURCE = Path(next(iter(rankwise.__path__))).parent
CALLS = Path(__file__).parents[1] / "typing" / "calls.py"
LIMIT = 120  # seconds: a checker that is run for the first time reads the whole standard library

pytestmark = pytest.mark.limit(3 * LIMIT)


def run(*command: str) -> str:
    """What a checker says; its exit status is 1 where it reports anything."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "MYPYPATH": str(SOURCE)},
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(folder: Path) -> dict[int, str]:
    """The lines that mypy reports, and what it says of each."""
    cache = f"--cache-dir={folder / 'cache'}"
    said = run("mypy", "--strict", "--config-file=", cache, "--no-error-summary", str(CALLS))
    found = re.findall(r"^(.*?):(\d+): error: (.*)$", said, re.MULTILINE)
    assert all(Path(file).name == CALLS.name for file, _, _ in found), said
    return {int(line): text for _, line, text in found}


def basedpyright(folder: Path) -> dict[int, str]:
    """The lines that pyright reports, and what it says of each."""
    config = folder / "pyrightconfig.json"
    config.write_text(
        json.dumps(
            {
                "include": [str(CALLS)],
                "extraPaths": [str(SOURCE)],
                "pythonVersion": f"{sys.version_info.major}.{sys.version_info.minor}",
                "typeCheckingMode": "strict",
                "reportUnusedCallResult": False,
                "reportUnusedExpression": False,
            }
        )
    )
    said = run("basedpyright", "-p", str(config), "--level", "error", "--outputjson")
    return {
        item["range"]["start"]["line"] + 1: item["message"]
        for item in json.loads(said)["generalDiagnostics"]
        if item["severity"] == "error"
    }


@pytest.mark.parametrize("checker", [mypy, basedpyright], ids=["mypy", "basedpyright"])
def test_wrong_calls_are_reported_and_right_ones_are_not(checker, tmp_path):
    if importlib.util.find_spec(checker.__name__) is None:
        pytest.skip(f"{checker.__name__} is not installed")
    lines = CALLS.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    assert len(wrong) > 20
    reported = checker(tmp_path)
    complaints = {lines[line - 1].strip(): reported[line] for line in sorted(set(reported) - wrong)}
    assert complaints == {}
    assert [lines[line - 1].strip() for line in sorted(wrong - set(reported))] == []


def test_the_package_says_that_it_is_typed():
    assert (SOURCE / "rankwise" / "py.typed").is_file()
