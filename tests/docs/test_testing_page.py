"""What docs/testing.md shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from rankwise import testing

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_the_example_is_green_as_it_stands(tmp_path) -> None:
    """By a plain pytest that has rankwise's plugin, as it has where rankwise is installed."""
    for block in BLOCKS[:2]:
        name = re.match(r"# (\w+\.py)\n", block)
        assert name is not None
        (tmp_path / name[1]).write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--disable-plugin-autoload", "-p", "rankwise.testing.plugin", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=50, check=False
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_the_fixtures_that_it_names_are_those_of_the_plugin(tmp_path) -> None:
    (tmp_path / "test_nothing.py").write_text("")
    command = [sys.executable, "-m", "pytest", "--fixtures", "-p", "no:cacheprovider"]
    command += ["--disable-plugin-autoload", "-p", "rankwise.testing.plugin", str(tmp_path)]
    shown = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=50, check=False
    ).stdout
    section = shown.partition("fixtures defined from rankwise.testing.plugin")[2]
    defined = re.findall(r"^(\w+)(?: \[.*\])? --", section, re.MULTILINE)
    named = re.findall(r"^\| `(\w+)` \| ", TEXT.partition("## An example")[0], re.MULTILINE)
    assert sorted(defined) == sorted(named)


def test_the_faults_and_stages_that_it_names_are_those_there_are() -> None:
    text = TEXT.partition("## Faults")[2]
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == ["delay", "drop", "hold_gil", "kill", "refuse"]
    assert all(name in testing.__all__ for name, _ in rows)
    assert tuple(re.findall(r'^\| `"(\w+)"` \|', text, re.MULTILINE)) == testing.STAGES


def test_the_block_about_faults_runs() -> None:
    code = BLOCKS[2].replace("7", "2")
    done = subprocess.run(
        [sys.executable, "-"],
        input=f"""
class Shard:
    def forward(self): return 1
{code}
from rankwise import WorkerDied
assert group.call("forward") == [1] * 4
try:
    group.call("forward")
except WorkerDied as error:
    assert error.rank == 1
else:
    raise AssertionError("it lives")
group.close()
""",
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
