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
from struct import Struct

from rankwise._interrupts import is_interrupt
from rankwise._messages import ACK, MAGIC, OK, WANT_VALUE
from rankwise._status import BELL
from rankwise.wire.frames import (
    HEADER_SIZE,
    RECEIVE_SIZE,
    SEQUENCE_MASK,
    pack_header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from rankwise._calls import Call
    from rankwise.wire.channel import DriverChannel

SEND: Final = _socket.send
RECEIVE: Final = _socket.recv
EACH_NO_SIGNAL: Final = repeat(MSG_NOSIGNAL)
EACH_SIZE: Final = repeat(RECEIVE_SIZE)
BYTES: Final = itemgetter(1)
SOCK: Final = attrgetter("sock")
SEQUENCE: Final = attrgetter("send_sequence")
DUE: Final = attrgetter("receive_sequence")
CHUNKS: Final = attrgetter("chunks")
CHANNEL: Final = itemgetter(0)
# The parts of a frame (`HEADER`): what it is and for which call, its sequence, length and body.
HEAD: Final = itemgetter(slice(4), slice(8, 16))
sequence_of = Struct("<4xI").unpack_from
LENGTH: Final = itemgetter(slice(16, HEADER_SIZE))
BODY: Final = itemgetter(slice(HEADER_SIZE, None))
pack_length = Struct("<Q").pack
# Answers that say all by themselves, by the first bytes of their frames.
ALIKE: Final = {Struct("<HBB").pack(MAGIC, kind, 0): kind for kind in (OK, ACK)}
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
        sequences = list(map(SEQUENCE, channels))
        if call.reply_from is None and sequences.count(sequences[0]) == len(sequences):
            frames = [_frame(call, WANT_VALUE, sequences[0], body)] * len(sequences)
        else:
            frames = _frames(call, channels, body)
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

    def alike(self) -> tuple[int, int, list[DriverChannel], list[bytes]] | None:
        """(kind, call id, channels, bodies) of all that came, where each of it is the whole next
        frame of its channel, and all are of one kind that needs no look and for one call. None: it
        is not so.

        With the group's lock held: no handler's own wait is in the middle of `came` then.
        """
        came: list[Any] = self.came
        if None in came:
            return None
        frames = list(map(BYTES, came))
        heads = set(map(HEAD, frames))
        what, call_id = heads.pop()
        if heads or len(call_id) < 8:
            return None
        channels = list(map(CHANNEL, came))
        due = map(SEQUENCE_MASK.__and__, map(DUE, channels))
        bodies = list(map(BODY, frames))
        if (
            what not in ALIKE
            or list(map(sequence_of, frames)) != list(zip(due))
            or list(map(LENGTH, frames)) != list(map(pack_length, map(len, bodies)))
            or any(map(CHUNKS, channels))
        ):
            return None
        return ALIKE[what], int.from_bytes(call_id, "little"), channels, bodies

    def fed(self, channels: list[DriverChannel]) -> None:
        """What came, a frame for each of `channels`, was dealt with."""
        came = self.came
        for place, channel in enumerate(channels):
            channel.receive_sequence += 1
            came[place] = None  # in one piece with the line above
        came.clear()

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


def _frame(call: Call, flags: int, sequence: int, body: bytes) -> bytes:
    head = pack_header(MAGIC, call.kind, flags, sequence & SEQUENCE_MASK, call.id, len(body))
    return head + body


def _frames(call: Call, channels: list[DriverChannel], body: bytes) -> list[bytes]:
    """One for each of `channels`; many of them are the same."""
    wanted = call.reply_from
    known: dict[tuple[int, int], bytes] = {}
    frames = []
    for channel in channels:
        flags = WANT_VALUE if wanted is None or wanted == channel.rank else 0
        key = flags, channel.send_sequence
        if key not in known:
            known[key] = _frame(call, *key, body)
        frames.append(known[key])
    return frames
