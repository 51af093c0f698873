"""What `make check` runs once all is installed; what is given goes to pytest.

    ruff > pytest, and beside it, in a thread, mypy > basedpyright > what they have said

Ruff takes a second and tells of most mistakes, so where it finds one that is all. The type checkers
use one core, and the tests, which wait for processes half of their time, not quite the other.
`^C` reaches all of them, for they are in one process group.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BIN = Path(sys.executable).parent
LINT = [[BIN / "ruff", "check", "."], [BIN / "ruff", "format", "--check", "."]]
TYPES = [[BIN / "mypy"], [BIN / "basedpyright", "--pythonpath", sys.executable]]
TESTS = [path for path in ("tests/unit", "tests/contract") if Path(path).is_dir()]


def shown(command: list[str | Path]) -> str:
    return " ".join(["$", Path(command[0]).name, *map(str, command[1:])])


def quietly(command: list[str | Path]) -> tuple[bool, str]:
    """Whether it has succeeded, and what it has said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode == 0, f"{shown(command)}\n{done.stdout}"


def main() -> int:
    for command in LINT:
        print(shown(command), flush=True)
        if subprocess.run(command).returncode:
            return 1
    with ThreadPoolExecutor(1) as beside:
        checkers = [beside.submit(quietly, command) for command in TYPES]
        tests = [sys.executable, "-m", "pytest", "-q", *TESTS, *sys.argv[1:]]
        good = subprocess.run(tests).returncode == 0
        for checker in checkers:
            right, said = checker.result()
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
