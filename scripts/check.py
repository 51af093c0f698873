"""What `make check` runs once all is installed; what is given goes to pytest.

    ruff > the unit tests, and beside them the contract tests, and mypy > basedpyright
         > what those beside have said

Ruff takes a second and tells of most mistakes, so where it finds one that is all. Each of the
others uses a core at most, and the contract tests wait for processes half of their time. `^C`
reaches all of them, for they are in one process group.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BIN = Path(sys.executable).parent
LINT = [[BIN / "ruff", "check", "."], [BIN / "ruff", "format", "--check", "."]]
TYPES = [[BIN / "mypy"], [BIN / "basedpyright", "--pythonpath", sys.executable]]
TESTS = ("tests/unit", "tests/contract")
GOOD = {0, 5} if sys.argv[1:] else {0}  # 5: pytest was told to select, and nothing is left here


def shown(command: list[str | Path]) -> str:
    return " ".join(["$", Path(command[0]).name, *map(str, command[1:])])


def quietly(commands: list[list[str | Path]]) -> list[tuple[bool, str]]:
    """Run them one after another: whether each has succeeded, and what it has said."""
    found = []
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found.append((done.returncode in GOOD, f"{shown(command)}\n{done.stdout}"))
    return found


def main() -> int:
    for command in LINT:
        print(shown(command), flush=True)
        if subprocess.run(command).returncode:
            return 1
    first, *others = [[sys.executable, "-m", "pytest", "-q", path, *sys.argv[1:]] for path in TESTS]
    with ThreadPoolExecutor(2) as beside:
        later = [beside.submit(quietly, others), beside.submit(quietly, TYPES)]
        print(shown(first), flush=True)
        good = subprocess.run(first).returncode in GOOD
        for one in later:
            for right, said in one.result():
                print(said, end="", flush=True)
                good = good and right
    if not good:
        print("check: something is wrong, see above", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
