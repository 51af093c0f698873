"""Memory of a file, mapped without a descriptor of its own. Imported with the first large payload.

`mmap.mmap` duplicates the descriptor for each mapping. So an anonymous one is made, and the file is
put in its place: the object still ends the mapping when its last view has gone. Mappings begin and
end with huge pages, and lie in memory as they lie in the file, or a huge page could not be mapped
as one.
"""

from __future__ import annotations

import ctypes
import os
from mmap import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

HUGE: Final = 2 << 20

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value
_PUNCH_HOLE: Final = 0x02 | 0x01  # and keep the file's size
_MADV_COLLAPSE: Final = 25

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Mapping:
    """`size` bytes of the file `fd` from `offset` on, in `view`.

    shared: what is written is written to the file; else it is the writer's own, and the file stays.
    `memory` is what keeps it mapped: every view of `view`, an array's too, holds on to that object.
    """

    __slots__ = ("address", "memory", "view")

    def __init__(self, fd: int, offset: int, size: int, *, shared: bool) -> None:
        first = offset // HUGE * HUGE
        whole = -(-(offset + size) // HUGE) * HUGE - first
        protection = PROT_READ | PROT_WRITE
        memory = mmap(-1, whole + HUGE, MAP_PRIVATE | _MAP_NORESERVE, protection)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        aligned = -(-begin // HUGE) * HUGE
        kind = MAP_SHARED if shared else MAP_PRIVATE | _MAP_NORESERVE
        if _mmap(aligned, whole, protection, kind | _MAP_FIXED, fd, first) == _FAILED:
            _raise("mmap")
        start = aligned - begin + offset - first
        self.memory = memory
        self.view = memoryview(memory)[start : start + size]
        self.address = begin + start  # of the first byte of `view`


def address_of(view: memoryview) -> int | None:
    """Where the first byte of `view` lies; None where it is read-only."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    except TypeError:
        return None


def clear(address: int, size: int) -> None:
    """Fill memory with zeros."""
    ctypes.memset(address, 0, size)


def punch(fd: int, start: int, end: int) -> None:
    """Give the memory of this part of the file back; it reads as zeros, and is shared no more."""
    if _fallocate(fd, _PUNCH_HOLE, start, end - start):
        _raise("fallocate")


def collapse(address: int) -> int:
    """Make one huge page of the memory at `address`, a multiple of its size. 0, or an errno."""
    return ctypes.get_errno() if _madvise(address, HUGE, _MADV_COLLAPSE) else 0


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
