"""The launcher harness' fixtures, for the tests that drive a launcher without a WorkerGroup."""

from __future__ import annotations

from launcher_harness import root, start

__all__ = ["root", "start"]
