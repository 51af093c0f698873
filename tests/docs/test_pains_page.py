"""docs/pains.md names tests that there are, and every test that was written for it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pains.md").read_text()


def names(path: Path) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 60
    missing = [each for each in named if each[1] not in names(ROOT / "tests" / each[0])]
    assert missing == []


def test_every_row_has_a_test_or_says_not_yet() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "#" in line]
    assert len(rows) == 26
    for row in rows:
        _, _, here, tests, _ = re.split(r"(?<!\\)\|", row)
        assert "::test_" in tests or here.strip().startswith("not yet"), row


def test_what_was_written_for_the_page_is_on_it() -> None:
    path = ROOT / "tests" / "process" / "test_pains.py"
    assert {name for name in names(path) if f"test_pains.py::{name}`" not in PAGE} == set()
