"""Several channels by one C call: a call to all its ranks, and what several of them have answered.

    send    > a frame a channel > sent.extend(map(send, ...)) > settle: each notes what has left
    receive > came.extend(zip(channels, map(recv, ...)))      > what is plain is fed from there
                                                              > deal: each channel takes its rest

A rank costs half of what it costs by its channel's own methods. The rule is theirs (`channel.py`):
bytes leave and enter by one C call that also counts or stores them. Who is struck after that leaves
`going` or `came` behind; whoever holds the lock, or leads, next settles or deals first of all.
"""

from __future__ import annotations

from _socket import MSG_NOSIGNAL
from _socket import socket as _socket
from itertools import repeat
from operator import attrgetter, itemgetter

from rankwise._messages import MAGIC, WANT_VALUE
from rankwise._status import BELL
from rankwise.wire.frames import RECEIVE_SIZE, SEQUENCE_MASK, pack_header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from rankwise._calls import Call
    from rankwise.wire.channel import DriverChannel

SEND: Final = _socket.send
RECEIVE: Final = _socket.recv
NO_SIGNAL: Final = repeat(MSG_NOSIGNAL)
SIZES: Final = repeat(RECEIVE_SIZE)
BYTES: Final = itemgetter(1)
SOCK: Final = attrgetter("sock")
LAST: Final = (-1,)


class Joint:
    """What all channels of a group do at once. Sending belongs to who holds the group's lock,
    receiving to the leader.

    came: what was received and is not dealt with yet, with its channel; None where it was fed.
    """

    __slots__ = ("came", "going")

    def __init__(self) -> None:
        self.came: list[tuple[DriverChannel, bytes] | None] = []
        self.going: tuple[Call, list[DriverChannel], list[bytes], list[int]] | None = None

    # -- sending ------------------------------------------------------------------------------

    def send(self, call: Call, channels: list[DriverChannel], body: bytes) -> bool:
        """Send `call` over `channels`, all of it at once; nothing else is on its way there. False:
        some have not sent it, or not all of it, and their `send_call` is to go on.
        """
        kind, number, size, wanted = call.kind, call.id, len(body), call.reply_from
        frames = []
        frame = b""
        before = -1
        for channel in channels:
            sequence = channel.send_sequence
            flags = WANT_VALUE if wanted is None or wanted == channel.rank else 0
            if sequence << 8 | flags != before:
                before = sequence << 8 | flags
                head = pack_header(MAGIC, kind, flags, sequence & SEQUENCE_MASK, number, size)
                frame = head + body
            frames.append(frame)
        sent: list[int] = []
        self.going = (call, channels, frames, sent)
        try:
            sent.extend(map(SEND, map(SOCK, channels), frames, NO_SIGNAL))
        except (BlockingIOError, ConnectionError):
            pass  # it is not among `sent`
        return self.settle()

    def settle(self) -> bool:
        """Have each channel note what has left of the call that was sent. Whether that is all."""
        going = self.going
        if going is None:
            return True
        call, channels, frames, sent = going
        number = call.id
        size = len(frames[0])  # of each of them
        whole = sent.count(size) == len(channels)
        left = channels
        if not whole:
            left = []
            for channel, frame, count in zip(channels, frames, sent, strict=False):
                if count == size:
                    left.append(channel)
                else:
                    channel.begun(call, frame, count)
        for channel in left:
            if channel.last_sent < number:  # else noted already, by one who was struck
                channel.words[BELL] = channel.send_sequence = channel.send_sequence + 1
                channel.last_sent = number
        self.going = None
        return whole

    # -- receiving ----------------------------------------------------------------------------

    def receive(self, channels: list[DriverChannel]) -> list[DriverChannel]:
        """Take what each of `channels` has, once, into `came`, which is empty. Returns those that
        nothing was taken from: the first that has nothing, or is gone, and all behind it.
        """
        came = self.came
        try:
            # SIZES never end, and so are as many as there are channels.
            came.extend(zip(channels, map(RECEIVE, map(SOCK, channels), SIZES)))  # noqa: B905
        except (BlockingIOError, ConnectionError):
            return channels[len(came) :]
        return []

    def deal(self) -> list[DriverChannel]:
        """Give each channel what came for it and was not fed. Returns those that got something."""
        came = self.came
        dealt = []
        while came:
            try:
                last = came[-1]
                if last is None:
                    came.pop()
                    continue
                channel, data = last
                dealt.append(channel)
                if data:
                    channel.hold(map(BYTES, map(came.pop, LAST)))  # type: ignore[arg-type]
                else:
                    channel.eof = True
                    came.pop()
            except IndexError:
                break  # a handler's own call has dealt all
        return dealt
