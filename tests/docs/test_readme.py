"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_example_prints_and_raises_what_the_readme_says() -> None:
    example = blocks("python")[0]
    promised = re.findall(r"print\(.*\)\s+# (\[[\d, ]+\]|\d+)", example)
    assert len(promised) == 3
    done = run(example)
    assert done.stdout.splitlines() == promised
    assert done.returncode == 1
    shown = re.findall(r"^```\n(rankwise\.errors\..*?)^```", README, re.DOTALL | re.MULTILINE)[0]
    told = re.sub(r"pid \d+", "pid N", done.stderr)
    assert told.endswith("\n" + re.sub(r"pid \d+", "pid N", shown))


def test_every_verb_of_the_readme_runs() -> None:
    verbs = blocks("python")[1]
    code = f"""
from rankwise import WorkerGroup, worker_info

class Shard:
    def __init__(self): self.rank = worker_info().rank
    def forward(self, x): return x + self.rank

a, b, c, d = x = 1, 2, 3, 4
x = 10
with WorkerGroup(Shard, 4) as group:
{"".join("    " + line + chr(10) for line in verbs.splitlines())}
    assert future.result() == [10, 11, 12, 13]
    assert some == [12, 13]
    assert head == 10
    assert parts == [1, 3, 5, 7]
    assert [one.result() for one in each] == [10, 11, 12, 13]
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_commands_of_the_readme_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    assert commands[:2] == ["demo", "test"]
    assert set(commands) <= set(targets)


def test_the_files_that_the_readme_names_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
