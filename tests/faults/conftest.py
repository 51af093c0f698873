"""Every row of the fault matrix ends within the seconds that it states."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _within(request: pytest.FixtureRequest) -> Iterator[None]:
    cell = request.node.get_closest_marker("cell")
    began = time.monotonic()
    yield
    if cell is not None:
        assert time.monotonic() - began < cell.kwargs["within"]
