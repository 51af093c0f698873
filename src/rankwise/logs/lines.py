"""From what a rank wrote to what is shown: whole lines, a prefix, a bound, the last 64 KB.

    pipe > Splitter.feed ---whole lines---> Relay.offer(prefix) > messages of about 64 KB
      `--> Tail.feed                          |  ^ acknowledged: what the driver has shown
                                              `--> dropped and counted, when too much is not shown

Pure: no descriptor, no clock. The bytes of a flood pass through `bytes.replace`, `rfind` and
`count`; there is no loop over lines.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

TAIL: Final = 1 << 16
_LAST_LINE: Final = 1 << 12  # bytes in which the last line is looked for
# A line that has not ended after so many bytes is cut here: memory stays bounded, and with its
# prefix and one more read of 1 MB it still fits below LIMIT.
LONGEST_LINE: Final = 14 << 20
# Bytes handed over and not yet acknowledged; above this, whole lines are dropped.
LIMIT: Final = 16 << 20
# Short enough that an urgent message soon finds a gap between two. What is cut off has yet to get
# its prefixes, a third more for lines of 100 bytes.
_PIECE: Final = 48 << 10

_COLORS: Final = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94, 31, 91)


def prefix(name: str, rank: int, pid: int, color: bool) -> bytes:
    """What stands before each line of a rank: `(NAME rank=R pid=P) `."""
    text = f"({name} rank={rank} pid={pid})"
    if color:
        text = f"\x1b[{_COLORS[rank % len(_COLORS)]}m{text}\x1b[0m"
    return text.encode("utf-8", "replace") + b" "


class Splitter:
    """Cuts one stream into whole lines, each ended by a newline.

    A newline, CR LF and a lone CR end a line. What stands before a lone CR and is empty is no
    line: a progress bar that writes CR before each step would show every second line blank.
    """

    __slots__ = ("_after_cr", "_held")

    def __init__(self) -> None:
        # The line that has not ended. A bytearray grows in place: bytes joined at each piece
        # would copy a line of 10 MB some thousand times.
        self._held = bytearray()
        self._after_cr = False  # the last byte was a CR and has ended a line: an LF is part of it

    def feed(self, data: bytes) -> bytes:
        """The lines that end within `data`, with what was held of the first; b"" if none does."""
        if self._after_cr:
            data = data.lstrip(b"\r")
            if not data:
                return b""
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            data = self._without_cr(data)
        end = data.rfind(b"\n") + 1
        lines = data[:end]
        if end:
            if self._held:
                lines = b"".join((self._held, lines))
                self._held.clear()
            data = data[end:]
        if data:
            self._held += data
            if len(self._held) > LONGEST_LINE:
                return lines + self.end()
        return lines

    def end(self) -> bytes:
        """The held line, given its newline; b"" if none is held. The stream may go on."""
        line = b"".join((self._held, b"\n")) if self._held else b""
        self._held.clear()
        return line

    def _without_cr(self, data: bytes) -> bytes:
        before = data.rstrip(b"\r")
        self._after_cr = len(before) < len(data) and (
            not before.endswith(b"\n") if before else bool(self._held)
        )
        while b"\r\r" in data:
            data = data.replace(b"\r\r", b"\r")
        data = data.replace(b"\r\n", b"\n").replace(b"\n\r", b"\n")
        if data.startswith(b"\r") and not self._held:
            data = data[1:]
        return data.replace(b"\r", b"\n")


class Raw:
    """Passes a stream on byte for byte, by whole lines (mode "inherit").

    An unbuffered Python writes a line's text and its newline apart: what two ranks print at once
    would otherwise end up within one line. A CR ends a line too, so a progress bar moves.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> bytes:
        """The lines that end within `data`, with what was held of the first."""
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        lines = b""
        if end:
            lines = b"".join((self._held, data[:end]))
            self._held.clear()
        self._held += data[end:]
        return lines if len(self._held) <= LONGEST_LINE else lines + self.end()

    def end(self) -> bytes:
        """What is held, as it is: no newline is made up."""
        held = bytes(self._held)
        self._held.clear()
        return held


class Tail:
    """The last 64 KB of what a rank wrote."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data[-TAIL:]
        if len(self._bytes) > 2 * TAIL:  # not at each line: then this is no cost to speak of
            del self._bytes[:-TAIL]

    def text(self) -> str:
        return self._bytes[-TAIL:].decode("utf-8", "replace")

    def last_line(self) -> str:
        """The last line that is not blank, whether or not it has ended; "" if there is none."""
        return last_line(self._bytes[-_LAST_LINE:].decode("utf-8", "replace"))


def last_line(text: str) -> str:
    """The last line of `text` that is not blank, at most 200 characters of it."""
    lines = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if line), "")[:200]


class Relay:
    """What may be handed to the driver: at most `limit` bytes that it has not acknowledged.

    A worker never waits for whoever shows its lines: what does not fit is dropped, by whole lines,
    and counted. Lines are taken again once half of the limit is free, so that a slow reader gets
    one long gap with one notice, not a thousand short ones.
    """

    __slots__ = ("_dropped", "_dropping", "_limit", "_name", "_waiting")

    def __init__(self, name: str, limit: int = LIMIT) -> None:
        self._name = name
        self._limit = limit
        self._waiting = 0
        self._dropped = 0
        self._dropping = False

    def offer(self, lines: bytes, prefix: bytes = b"") -> list[bytes]:
        """`lines` in pieces to hand over, `prefix` before each line."""
        pieces: list[bytes] = []
        start = 0
        while start < len(lines) and not self._dropping:
            end = _cut(lines, start)
            piece = lines[start:end]
            if prefix:
                piece = prefix + piece.replace(b"\n", b"\n" + prefix)
                piece = piece[: -len(prefix)]  # the one that follows the last newline
            if self._waiting + len(piece) > self._limit:
                self._dropping = True
                break
            self._waiting += len(piece)
            pieces.append(piece)
            start = end
        if start < len(lines):
            self._dropped += lines.count(b"\n", start) + (not lines.endswith(b"\n"))
        return pieces

    def acknowledged(self, nbytes: int) -> bytes:
        """The driver has shown so many bytes. Returns what is now to be told, or b""."""
        self._waiting = max(0, self._waiting - nbytes)
        return self.notice() if self._waiting <= self._limit // 2 else b""

    def notice(self) -> bytes:
        """The line that tells how many lines were dropped, b"" if none; lines are taken again."""
        dropped, self._dropped, self._dropping = self._dropped, 0, False
        if not dropped:
            return b""
        lines = "1 line was" if dropped == 1 else f"{dropped} lines were"
        text = f"({self._name}) {lines} dropped: the reader of this output is too slow\n"
        line = text.encode("utf-8", "replace")
        self._waiting += len(line)
        return line


def _cut(lines: bytes, start: int) -> int:
    """Where the piece that begins at `start` ends: behind a newline, or where `lines` does."""
    if len(lines) - start <= _PIECE:
        return len(lines)
    end = lines.rfind(b"\n", start, start + _PIECE) + 1
    if not end:
        end = lines.find(b"\n", start + _PIECE) + 1
    return end or len(lines)
