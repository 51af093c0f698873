"""Several channels by one C call: a call to all its ranks, and what several of them have answered.

    send    > a frame a channel > sent.extend(map(send, ...)) > settle: each notes what has left
    receive > came.extend(zip(channels, map(recv, ...)))      > what is plain is fed from there
                                                              > deal: each channel takes its rest

A rank costs half of what it costs by its channel's own methods. The rule is theirs (`channel.py`):
bytes leave and enter by one C call that also counts or stores them. Who is struck after that leaves
`going` or `came` behind: whoever sends next settles first, and whoever leads next deals first.
"""

from __future__ import annotations

from _socket import MSG_NOSIGNAL
from _socket import socket as _socket
from itertools import repeat
from operator import attrgetter, itemgetter

from rankwise._interrupts import is_interrupt
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
EACH_NO_SIGNAL: Final = repeat(MSG_NOSIGNAL)
EACH_SIZE: Final = repeat(RECEIVE_SIZE)
BYTES: Final = itemgetter(1)
SOCK: Final = attrgetter("sock")
FIRST: Final = (0,)


class Joint:
    """What all channels of a group do at once. Sending belongs to who holds the group's lock,
    receiving to the leader.

    came: what was received and is not dealt with yet, with its channel, oldest first; None where it
        was fed. Nearly always empty when a leader begins to receive: else one has been struck.
    going: a call that is being sent: its channels, a frame for each, and how much of each frame has
        left, as far as it was tried. None where every channel has noted that.
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
        if self.going is not None:
            self.settle()
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
            sent.extend(map(SEND, map(SOCK, channels), frames, EACH_NO_SIGNAL))
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
        """Take what each of `channels` has, once, into `came`. Returns those that have nothing, or
        are gone (then `eof`)."""
        came = self.came
        odd: list[DriverChannel] = []
        while channels:
            todo = iter(channels)
            try:
                # The sizes never end, and so are as many as there are channels.
                came.extend(zip(todo, map(RECEIVE, map(SOCK, channels), EACH_SIZE)))  # noqa: B905
                break
            except (BlockingIOError, ConnectionError) as error:
                if is_interrupt(error):
                    raise  # a handler's own, before the C call or after it
                left = list(todo)
                failed = channels[-1 - len(left)]
                if isinstance(error, ConnectionError):
                    failed.receive()
                odd.append(failed)
                channels = left
        return odd

    def deal(self) -> list[DriverChannel]:
        """Give each channel what came for it and was not fed. Returns those that got something.

        A handler's own wait may deal in the middle of this, at any call and at the loop's jump. So
        what is first is looked at again in straight code before each C call that takes it.
        """
        came = self.came
        dealt: list[DriverChannel] = []
        while True:
            if not came:
                return dealt
            first = came[0]
            if first is None:
                del came[0]
                continue
            channel, data = first
            dealt.append(channel)
            channel.expect()
            taking = map(BYTES, map(came.pop, FIRST))  # type: ignore[arg-type]
            if came and came[0] is first:
                if data:
                    channel.chunks.extend(taking)
                else:
                    channel.eof = True
                    del came[0]
