"""A wake-up: an eventfd that any thread may write to, at any moment of its owner's end."""

from __future__ import annotations

import os
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    Write = partial[None]
else:
    Write = partial


class Wake(Write):
    """`wake()` makes `wake.fd` readable. One C call: no signal handler runs in the middle of it.

    The descriptor is closed with the last reference, and whoever is in the call has one. Closed by
    hand, its number might be somebody else's before the write.
    """

    def __new__(cls) -> Wake:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return super().__new__(cls, os.eventfd_write, fd, 1)

    @property
    def fd(self) -> int:
        return self.args[0]  # type: ignore[no-any-return]

    def __del__(self) -> None:
        os.close(self.fd)


def nothing() -> None:
    """A wake-up that wakes nobody."""
