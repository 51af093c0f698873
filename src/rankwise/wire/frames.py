"""Frames: what lies on a call channel, for both of its ends.

frame = header (24 bytes: magic, kind, flags, sequence, call, length) + body
"""

from __future__ import annotations

from rankwise._messages import HEADER, MAGIC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

HEADER_SIZE: Final = HEADER.size
# Well below the 128 KB from which malloc maps and unmaps each buffer: that would cost 12 us.
RECEIVE_SIZE: Final = 64 << 10
# Below this a header and its body are joined: one copy is cheaper than a second system call.
JOIN_SIZE: Final = 64 << 10
SEQUENCE_MASK: Final = 0xFFFFFFFF
# No frame is this long: a length above it is a broken frame, not a reason to reserve memory.
MAX_BODY: Final = 1 << 46

unpack_header = HEADER.unpack_from
pack_header = HEADER.pack


class BadFrame(Exception):
    """What came is no frame, or not the next one. The channel cannot be used any further.

    before: the whole frames that came before it, as `DriverChannel.frames` gives them.
    """

    before: tuple[list[tuple[int, int, bytes, int]], bytes, int] = ([], b"", 0)


def check_header(data: bytes | bytearray, at: int) -> tuple[int, int, int, int, int]:
    """(kind, flags, sequence, call id, body length) of the header at `at`. Raises BadFrame."""
    magic, kind, flags, sequence, call_id, length = unpack_header(data, at)
    if magic != MAGIC or length > MAX_BODY:
        raise BadFrame(f"a header that is none of ours ({bytes(data[at : at + HEADER_SIZE])!r})")
    return kind, flags, sequence, call_id, length
