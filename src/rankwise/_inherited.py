"""What the ranks of a group inherit from the driver, as it was when the group was made.

A restart gives the new ranks the same: the driver may have changed its own since.
"""

from __future__ import annotations

import os
import sys


class Inherited:
    """The driver at one moment."""

    __slots__ = ("argv", "directory", "environ", "hash_seed", "sys_path")

    def __init__(self) -> None:
        self.environ = dict(os.environ)
        self.sys_path = list(sys.path)
        self.argv = list(sys.argv)
        # One PYTHONHASHSEED for all ranks. Not from `secrets`, which takes 4 ms to import.
        self.hash_seed = int.from_bytes(os.urandom(4), "little")
        self.directory = _directory()

    def directory_to_enter(self) -> str | None:
        """Where a child of the driver has to go; None where it begins there anyway."""
        return None if self.directory == _directory() else self.directory


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None  # it was removed
