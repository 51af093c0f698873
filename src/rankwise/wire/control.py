"""Messages on the socket between the driver and the launcher.

    send(message) > queue > flush() ==8 bytes of length, a pickle==> receive() > list of messages

Both ends are non-blocking and each is used by one thread. Nobody ever waits here: what the socket
does not take stays queued, and whoever owns the channel polls for POLLOUT while `backlog` is not 0.

An urgent message (a death) overtakes everything that is queued (16 MB of log lines, say), but not
the rest of a frame of which the socket already has the beginning.
"""

from __future__ import annotations

from _pickle import dumps, loads  # `pickle` itself takes 5 ms, which every group would wait for
from _socket import MSG_NOSIGNAL
from collections import deque
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Final

LENGTH: Final = Struct("<Q")
# Longer than any message can be: a length above this is a frame that lost its beginning.
LONGEST: Final = 1 << 30
_ONE_READ: Final = 1 << 18
# Bytes that one receive() takes at most, so that a fast sender cannot keep it busy for ever.
_ONE_RECEIVE: Final = 1 << 22
_MESSAGES: Final = "rankwise._messages"


def frame(message: object) -> bytes:
    """`message` as it is sent."""
    body = dumps(message, 5)
    return LENGTH.pack(len(body)) + body


class ControlChannel:
    """One end of the channel. It owns the socket that it is given."""

    def __init__(self, sock: socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._urgent: deque[bytes] = deque()
        self._queued: deque[bytes] = deque()
        self._current = memoryview(b"")  # what is left of the frame that is being sent
        self._received = bytearray()
        self._end: Exception | None = None  # raised by receive() when all before it is delivered
        self.backlog = 0  # bytes queued and not yet taken by the socket
        self.broken = False  # the other end is gone: what is sent is thrown away

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: object, urgent: bool = False) -> None:
        """Queue a message; it leaves with the next flush(). Never blocks, never raises EPIPE."""
        if self.broken:
            return
        data = frame(message)
        (self._urgent if urgent else self._queued).append(data)
        self.backlog += len(data)

    def flush(self) -> bool:
        """Send what the socket takes now; True if nothing is left to be sent."""
        while self.backlog:
            if not self._current:
                self._current = memoryview((self._urgent or self._queued).popleft())
            try:
                sent = self._sock.send(self._current, MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError:
                # Remembered, not raised: the reading side finds the end of file, after whatever
                # the other end had still said.
                self.broken = True
                self._urgent.clear()
                self._queued.clear()
                self._current = memoryview(b"")
                self.backlog = 0
                return True
            self._current = self._current[sent:]
            self.backlog -= sent
        return True

    def receive(self) -> list[object]:
        """The messages that have arrived; [] if none is complete.

        Raises EOFError when the other end has closed and ValueError at a bad frame, each once all
        messages before it have been delivered, and from then on always.
        """
        self._read()
        messages = [] if isinstance(self._end, ValueError) else self._decode()
        if not messages and self._end is not None:
            raise self._end
        return messages

    def unheard(self) -> bytes:
        """What has been read and belongs to no complete message yet."""
        return bytes(self._received)

    def unread(self, data: bytes) -> None:
        """Deliver `data` before what is still to come."""
        self._received[:0] = data

    def close(self) -> None:
        self._sock.close()

    def _read(self) -> None:
        budget = _ONE_RECEIVE
        while budget > 0 and self._end is None:
            try:
                data = self._sock.recv(_ONE_READ)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""  # it closed with messages of ours unread; its own were delivered first
            if not data:
                self._end = EOFError("the other end of the control channel has closed")
            self._received += data
            budget -= len(data)

    def _decode(self) -> list[object]:
        messages: list[object] = []
        start = 0
        with memoryview(self._received) as received:
            while len(received) - start >= LENGTH.size:
                (length,) = LENGTH.unpack_from(received, start)
                body = start + LENGTH.size
                if length <= len(received) - body:
                    with received[body : body + length] as data:
                        message = self._message(data)
                else:
                    message = None
                    if length > LONGEST:
                        self._end = ValueError(f"bad frame on the control channel: length {length}")
                if message is None:
                    break
                messages.append(message)
                start = body + length
        del self._received[:start]
        return messages

    def _message(self, data: memoryview) -> object:
        """The message in a frame; None, with the reason in `_end`, where there is none."""
        try:
            message = loads(data)
            if type(message).__module__ == _MESSAGES:
                return message
            reason = f"it holds a {type(message).__name__}"
        except Exception as error:  # a pickle that is not one may raise anything
            reason = f"{type(error).__name__}: {error}"
        size = len(data)
        self._end = ValueError(f"bad frame on the control channel: {size} bytes: {reason}")
        return None
