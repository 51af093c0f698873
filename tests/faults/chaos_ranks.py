"""What the ranks of the chaos run. Imported by them as a module."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rankwise import worker_info


class Refused(Exception):
    """What the worker raises when it is told to."""


class Unpicklable:
    def __reduce__(self) -> Any:
        raise Refused("it does not travel")


class Diarist:
    """Writes down each call that it runs: one line, before it does anything else."""

    def __init__(self, folder: str) -> None:
        path = Path(folder) / f"{worker_info().rank}"
        self._diary = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def _note(self, token: str) -> None:
        os.write(self._diary, f"{token}\n".encode())

    def echo(self, token: str, data: bytes = b"", nap: float = 0.0) -> tuple[str, int, bytes]:
        self._note(token)
        time.sleep(nap)
        return token, worker_info().rank, data

    def refuse(self, token: str, rank: int, nap: float) -> tuple[str, int, bytes]:
        """Rank `rank` raises; the others take `nap` seconds."""
        self._note(token)
        if worker_info().rank == rank:
            raise Refused(token)
        time.sleep(nap)
        return token, worker_info().rank, b""

    def keep_to_itself(self, token: str) -> Unpicklable:
        self._note(token)
        return Unpicklable()
