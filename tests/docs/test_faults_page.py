"""docs/faults.md is what the fault tests are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_of_the_tests() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "faults_page.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (ROOT / "docs" / "faults.md").read_text() == made.stdout, (
        "write it anew: python scripts/faults_page.py > docs/faults.md"
    )
