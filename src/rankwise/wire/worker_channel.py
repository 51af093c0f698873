"""The worker's end of a call channel.

    receive < header, body < bytes < the bell, polled for a while < the kernel, slept in
    reply   > header, body > bytes > the driver, however long it does not read > the news

It belongs to one thread that nothing interrupts, and may block. The bell and the news are words of
shared memory (`_status.py`): while the bell has not been rung for another frame, the socket is not
looked at.
"""

from __future__ import annotations

import select
from os import sched_yield

from rankwise._deadline import clock
from rankwise._messages import MAGIC
from rankwise._status import BELL, POLLS
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
    import _socket
    from typing import Final

    from rankwise._spin import Spin
    from rankwise.wire.arena import Arena


LOOKS: Final = 64  # looks at the bell before one at the socket itself


class TooLarge(MemoryError):
    """There is no room here for the body of call `call_id`; the channel stays usable."""

    def __init__(self, call_id: int, length: int) -> None:
        super().__init__(f"no room for {length} bytes of arguments")
        self.call_id = call_id


class WorkerChannel:
    """One thread receives, runs and answers."""

    __slots__ = (
        "_data", "_poll", "_recv", "_recv_into", "_send", "_sent", "_sequence", "_sock",
        "arena", "news", "place", "spin", "words",
    )  # fmt: skip

    def __init__(self, sock: _socket.socket, spin: Spin) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._recv = sock.recv
        self._recv_into = sock.recv_into
        self._send = sock.send
        self._data = b""
        self._sequence = 0
        self._sent = 0
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self.spin = spin
        self.arena: Arena | None = None  # tended while there is nothing to do
        self.words: memoryview | list[int] = [0] * (BELL + 1)  # the rank's status page
        self.news: memoryview | list[int] = [0]  # where each rank says how often it has answered
        self.place = 0  # the word of this one

    def receive(self) -> tuple[int, int, int, bytes | bytearray | memoryview] | None:
        """(kind, flags, call id, body) of the next frame; None at end of file.

        Polls for a while (see `Spin`), then sleeps in the kernel. Raises BadFrame, and TooLarge for
        a body that there is no room for (which was skipped).
        """
        data = self._data
        while len(data) < HEADER_SIZE:
            try:
                if self.words[BELL] <= self._sequence:  # it may be late
                    more = self._wait(RECEIVE_SIZE)
                else:
                    more = self._recv(RECEIVE_SIZE)
            except BlockingIOError:
                more = self._wait(RECEIVE_SIZE)
            except OSError:
                return None
            if not more:
                return None
            data = data + more if data else more
        magic, kind, flags, sequence, call_id, length = unpack_header(data)
        if magic != MAGIC or length > MAX_BODY:
            check_header(data, 0)  # says what is wrong
        if sequence != self._sequence & SEQUENCE_MASK:
            raise BadFrame(f"frame {sequence} came where {self._sequence} was due")
        self._sequence += 1
        end = HEADER_SIZE + length
        if len(data) == end:
            self._data = b""
            return kind, flags, call_id, data[HEADER_SIZE:]
        if len(data) > end:
            self._data = data[end:]
            return kind, flags, call_id, data[HEADER_SIZE:end]
        body = self._receive_body(call_id, data[HEADER_SIZE:], length)
        self._data = b""
        return None if body is None else (kind, flags, call_id, body)

    def _receive_body(self, call_id: int, first: bytes, length: int) -> bytearray | None:
        try:
            body = bytearray(length)
        except MemoryError:
            self._data = b""
            skipped = len(first)
            while skipped < length:
                more = self._wait(min(RECEIVE_SIZE, length - skipped))
                if not more:
                    return None
                skipped += len(more)
            raise TooLarge(call_id, length) from None
        body[: len(first)] = first
        at = len(first)
        with memoryview(body) as view:
            while at < length:
                try:
                    count = self._recv_into(view[at:])
                except BlockingIOError:
                    self._sleep(None)
                    continue
                except OSError:
                    count = 0
                if not count:
                    return None
                at += count
        return body

    def _wait(self, size: int) -> bytes:
        """What the socket has next, when it has nothing now; nothing at its end."""
        words = self.words
        had = self._sequence
        spin = self.spin
        began = now = clock()
        until = began + spin.budget
        looks = 0
        while True:
            if now < until:
                sched_yield()
                looks += 1
                if words[BELL] <= had and looks % LOOKS:
                    now = clock()
                    continue
            else:
                again = None if self.arena is None else self.arena.tend(now)
                self._sleep(None if again is None else max(0.0, again - clock()) * 1000)
            try:
                data = self._recv(size)
            except BlockingIOError:
                now = clock()
                continue
            except OSError:
                return b""
            if not spin.steady or now - began > spin.most:
                spin.waited(clock() - began)
            return data

    def _sleep(self, milliseconds: float | None) -> None:
        """Sleep until bytes come, and say so on the status page.

        The number is odd from before this look at the socket until after it: who finds the same one
        twice, and nothing unread between, knows that the rank has nothing in hand. A page that said
        only what the rank runs could not tell that: whoever has taken a call off the socket waits
        for the interpreter's lock next, as long as another thread of the user's keeps it.
        """
        words = self.words
        number = words[POLLS] + 1 | 1
        words[POLLS] = number
        try:
            self._poll.poll(milliseconds)
        finally:
            words[POLLS] = number + 1

    def reply(self, kind: int, call_id: int, body: bytes) -> None:
        """Answer; waits for as long as the driver does not read. Silent where it is gone."""
        size = len(body)
        frame = pack_header(MAGIC, kind, 0, self._sent & SEQUENCE_MASK, call_id, size)
        self._sent += 1
        if size < JOIN_SIZE:
            frame += body
            body = b""
        try:
            done = self._send(frame)
        except BlockingIOError:
            done = 0
        except OSError:
            return
        if body or done < len(frame):
            self._send_rest(frame, done)
            self._send_rest(body, 0)
        self.news[self.place] = self._sent

    def hang_up(self) -> None:
        """Answer no more: the driver takes the end of file for a rank that it must not wait for."""
        try:
            self._sock.shutdown(2)  # SHUT_RDWR
        except OSError:
            pass  # it has gone already

    def _send_rest(self, part: bytes, done: int) -> None:
        send = self._send
        room = select.poll()
        room.register(self._sock.fileno(), select.POLLOUT)
        with memoryview(part) as view:
            while done < len(part):
                try:
                    done += send(view[done:])
                except BlockingIOError:
                    room.poll()
                except OSError:
                    return
