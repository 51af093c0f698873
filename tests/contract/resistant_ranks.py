"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """It refuses to be given a cause or a note, as anybody would write it."""

    code: int


class Text(str):
    """As an enum's member, or a template library's safe text."""


class Tells(Exception):
    def __str__(self):
        return Text("told")


class FailsToLoad:
    def __reduce__(self):
        return _fail, ()


def _fail():
    raise Frozen(7)


class Worker:
    def fails(self, kind, *args):
        raise kind(*args)

    def takes(self, value):
        return value

    def makes(self):
        return FailsToLoad()
