"""The driver's end of a call channel.

    send_call > frame ==bytes==> worker        receive < chunks <==bytes== worker
                                               frames > dealt with > consume

It never blocks, and may be struck by an exception out of a signal handler between any two bytecodes
while bytes are on their way. So bytes leave the socket by one C call that also stores them
(`chunks.extend(map(recv, (SIZE,)))`) and enter it by one that also counts them
(`sent.extend(map(send, (view,)))`), and everything else is computed again from what was stored: who
was interrupted before a commit leaves nothing half done, and the next leader goes on from there.
The commits are stores in straight code, where CPython runs no handler.
"""

from __future__ import annotations

from _socket import MSG_NOSIGNAL

from rankwise._messages import MAGIC
from rankwise._status import BELL, LINE
from rankwise.wire.frames import (
    HEADER_SIZE,
    JOIN_SIZE,
    MAX_BODY,
    RECEIVE_SIZE,
    SEQUENCE_MASK,
    BadFrame,
    check_header,
    pack_header,
    unpack_header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Final

    from rankwise._calls import Call

NO_SIGNAL: Final = (MSG_NOSIGNAL,)
SIZES: Final = (RECEIVE_SIZE,)


class DriverChannel:
    """Sending belongs to who holds the group's lock, receiving to the leader."""

    __slots__ = (
        "_first", "_going", "_received", "chunks", "eof", "fd", "last_sent", "line", "rank",
        "receive_sequence", "recv", "send", "send_sequence", "sock", "wants_out", "words",
    )  # fmt: skip

    def __init__(
        self, sock: socket.socket, words: memoryview | list[int] | None = None, rank: int = 0
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.rank = rank
        self.line = rank * LINE  # its word of the news
        self.fd = sock.fileno()
        self.recv = sock.recv
        self.send = sock.send
        self.chunks: list[bytes] = []
        self._received = 0
        self.eof = False
        self.receive_sequence = 0
        self._first = 0  # the sequence that is due where the bytes that are held begin
        self.wants_out: bool | None = False  # whether the epoll tells when it takes bytes again
        self.send_sequence = 0
        self.last_sent = -1
        self._going: tuple[Call | None, bytes, bytes, list[int]] | None = None
        self.words = [0] * (BELL + 1) if words is None else words  # the rank's status page

    # -- sending ------------------------------------------------------------------------------

    def send_call(self, call: Call, flags: int, head: bytes, body: bytes) -> bool:
        """Send what can be sent of `call` now; True once its last byte has left.

        Call it again with the same call, once the socket takes bytes, until it says True.
        Raises ConnectionError where the other end is gone.
        """
        if call.id <= self.last_sent:
            return True  # interrupted after the last byte, before the caller could note it
        going = self._going
        if going is None or going[0] is not call:
            frame = pack_header(
                MAGIC, call.kind, flags, self.send_sequence & SEQUENCE_MASK, call.id,
                len(head) + len(body),
            )  # fmt: skip
            if len(body) < JOIN_SIZE:
                frame += head + body if head else body
                body = b""
            else:
                frame += head
            going = (call, frame, body, [])
            self._going = going
        _, frame, body, sent = going
        try:
            if not sent:
                sent.extend(map(self.send, (frame,), NO_SIGNAL))
            self.words[BELL] = self.send_sequence + 1
            if body or sent[0] != len(frame):
                self._send_rest(frame, body, sent)
        except BlockingIOError:
            return False
        if self._going is going:  # else a handler's own call has already finished it
            self._going = None
            self.send_sequence += 1
            self.last_sent = call.id
        return True

    def _send_rest(self, frame: bytes, body: bytes, sent: list[int]) -> None:
        size = len(frame)
        total = size + len(body)
        done = sum(sent)
        while done < total:
            if done < size:
                sent.extend(map(self.send, (frame[done:],), NO_SIGNAL))
            else:
                view = memoryview(body)[done - size :]
                sent.extend(map(self.send, (view,), NO_SIGNAL))
            done = sum(sent)

    def begun(self, call: Call, frame: bytes, count: int) -> None:
        """`count` bytes of `frame`, which is all of `call`, have left. `send_call` goes on."""
        if not self.eof:
            self._going = (call, frame, b"", [count])
            self.words[BELL] = self.send_sequence + 1

    def has_sent(self, call: Call) -> bool:
        """Whether the last byte of `call` has left."""
        return call.id <= self.last_sent

    def send_farewell(self, call: Call) -> None:
        """Send `call`, which has no body, if the socket takes it now and no frame is on its way."""
        if self._going is None:
            try:
                self.send_call(call, 0, b"", b"")
            except ConnectionError:
                pass  # it has gone already

    # -- receiving ----------------------------------------------------------------------------

    def receive(self) -> bool:
        """Take what the socket has, once. False: nothing there, or end of file (then `eof`)."""
        chunks = self.chunks
        try:
            self.expect()
            chunks.extend(map(self.recv, SIZES))
        except BlockingIOError:
            return False
        except ConnectionError:  # not OSError: an alarm's handler may raise TimeoutError
            self.eof = True
            return False
        if chunks and not chunks[-1]:  # a handler's own call may have taken them all
            self.eof = True
            return False
        return True

    def expect(self) -> None:
        """Bytes are about to be put into `chunks`: to be called before."""
        if not self.chunks:
            self._first = self.receive_sequence
        self._received += 1  # whoever joins chunks now must look again

    @property
    def holding(self) -> bool:
        """Whether something was received that is no whole frame yet, or was left by one struck."""
        return bool(self.chunks)

    def frames(self) -> tuple[list[tuple[int, int, bytes, int]], bytes, int]:
        """The whole frames among what was received: [(kind, call id, body, sequence)], data, used.

        Takes nothing: calling it again gives the same frames until `consume(data, used)`.
        """
        chunks = self.chunks
        found: list[tuple[int, int, bytes, int]] = []
        received = self._received
        if len(chunks) > 1:
            first = next((chunk for chunk in chunks if chunk), b"")
            if len(first) >= HEADER_SIZE:
                _, _, sequence, _, length = check_header(first, 0)
                if sum(map(len, chunks)) < HEADER_SIZE + length:
                    self._check_begun(sequence, found)
                    return found, b"", 0  # joining a large frame at each step would be quadratic
            joined = b"".join(chunks)
            if self._received == received:  # else a handler's own call has received meanwhile
                chunks[:] = (joined,)
        data = chunks[0] if chunks else b""
        at = 0
        size = len(data)
        try:
            while size - at >= HEADER_SIZE:
                magic, kind, _, sequence, call_id, length = unpack_header(data, at)
                if magic != MAGIC or length > MAX_BODY:
                    check_header(data, at)  # says what is wrong
                end = at + HEADER_SIZE + length
                if end > size:
                    self._check_begun(sequence, found)
                    break
                found.append((kind, call_id, data[at + HEADER_SIZE : end], sequence))
                at = end
        except BadFrame as error:
            error.before = found, data, at
            raise
        return found, data, at

    def _check_begun(self, sequence: int, found: list[tuple[int, int, bytes, int]]) -> None:
        """A frame of which only the beginning is there: one that is not due need not be awaited."""
        due = found[-1][3] + 1 if found else self.receive_sequence
        if sequence != due & SEQUENCE_MASK:
            raise BadFrame(f"frame {sequence} came where {due} was due")

    def consume(self, data: bytes, used: int) -> None:
        """The first `used` bytes of `data`, both as `frames` gave them, have been dealt with."""
        chunks = self.chunks
        kept = (data[used:],) if used < len(data) else ()
        if chunks and chunks[0] is data:  # else a handler's own call has already taken them
            self._first = self.receive_sequence
            chunks[:1] = kept

    def seen_before(self, found: list[tuple[int, int, bytes, int]], data: bytes) -> bool:
        """Whether a frame among `found` in `data` that is not due any more was dealt with by
        somebody who was struck before `consume`; else the other end has sent it twice."""
        chunks = self.chunks
        if not chunks or chunks[0] is not data:
            return True  # a handler's own call has dealt with them, and taken them
        numbers = [(number - self._first) & SEQUENCE_MASK for _, _, _, number in found]
        return numbers == list(range(len(found)))

    def out_of_turn(self, kind: int, sequence: int) -> str:
        """What is wrong with a frame that is not the next answer."""
        due = self.receive_sequence & SEQUENCE_MASK
        if sequence == due:
            return f"frame {sequence} is of kind {kind}, which is no answer"
        return f"frame {sequence} came where {due} was due"

    def forget(self) -> None:
        """Nothing more is to come or to go: keep no call alive that was half sent, and nothing of
        what cannot be made sense of."""
        self.eof = True
        self._going = None
        self.chunks.clear()

    def close(self) -> None:
        self.words = [0] * (BELL + 1)  # the page is about to be unmapped
        self.sock.close()
