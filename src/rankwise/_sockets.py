"""The reply sockets of a group: frames out of the ledger's queues, and into the ledger.

    Ledger.begin        > send      > Joint         ==frame==> workers       nearly every call
    Ledger.next_to_send > flush     > DriverChannel ==frame==> worker        all others
    Ledger.reply        < pull      < Joint         <==frame== workers       one whole, short answer
                        < _pull_odd < DriverChannel <==frame== worker        all else

`send` and `flush` need the group's lock, `pull` and `bury` the lead (see `_lead.py`); all may be
cut short by an exception out of a signal handler and are then done again by whoever comes next.
"""

from __future__ import annotations

import contextlib
import select
from fcntl import ioctl
from sys import byteorder
from termios import FIONREAD, TIOCOUTQ

from rankwise._calls import Garbled
from rankwise._deadline import clock
from rankwise._interrupts import is_interrupt
from rankwise._messages import (
    ACK,
    ANSWERS,
    DEADLINE,
    FAILED,
    FAILED_LENT,
    HAS_DEADLINE,
    MAGIC,
    OK,
    OK_LENT,
    WANT_VALUE,
)
from rankwise._status import News
from rankwise.wire.channel import DriverChannel
from rankwise.wire.frames import HEADER_SIZE, SEQUENCE_MASK, BadFrame, unpack_header
from rankwise.wire.joint import Joint
from rankwise.wire.lending import Lent

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from socket import socket

    from rankwise._calls import Call
    from rankwise._ledger import Ledger
    from rankwise._messages import Exited
    from rankwise._status import StatusPage
    from rankwise.wire.arena import Arena

IN, OUT = select.EPOLLIN, select.EPOLLOUT
PLAIN = frozenset((OK, ACK))  # answers that say all by themselves
_LENT = {OK_LENT: OK, FAILED_LENT: FAILED}


class Sockets:
    """The driver's ends of the call channels, and the epoll that a leader polls.

    on_news: called with the lock held when timers may have been set, or the group may have broken.
    status, news: the ranks' pages, and what they say of their answers; None: they say nothing.
    """

    def __init__(
        self,
        sockets: list[socket],
        ledger: Ledger,
        lock: threading.RLock,
        on_news: Callable[[], None],
        status: StatusPage | None = None,
        news: News | None = None,
    ) -> None:
        self.channels = [
            DriverChannel(sock, None if status is None else status.words(rank), rank)
            for rank, sock in enumerate(sockets)
        ]
        self._joint = Joint()
        self._last: tuple[tuple[int, ...], list[DriverChannel]] = ((), [])  # who was sent to
        self._status = status
        self._news = News(len(sockets)) if news is None else news
        self._heard = b""  # the news that there is nothing to be taken for
        self.ready = select.epoll()
        self.by_fd = {channel.fd: channel for channel in self.channels}
        for channel in self.channels:
            self.ready.register(channel.fd, IN)
        self.blocked = 0  # channels that want to send more than their socket takes
        self.deaths: dict[int, Exited | None] = {}  # reported, the channel not yet emptied
        self.arena: Arena | None = None  # where large payloads lie
        self._ledger = ledger
        self._lock = lock
        self._on_news = on_news

    def send(self, call: Call) -> None:
        """Send `call`, which the ledger has begun, to all its ranks. With the lock held."""
        ledger = self._ledger
        ranks = call.ranks
        body = call.body
        if type(body) is Lent:
            body.hold.pending.difference_update(ranks)  # as in `flush`
        last = self._last
        if last[0] is not ranks:
            self._last = last = ranks, [self.channels[rank] for rank in ranks]
        if not self._joint.send(call, last[1], body):
            for rank in ranks:
                if not self.channels[rank].has_sent(call):
                    ledger.queues[rank].append(call)
                    self.flush(rank)
        ledger.all_sent()

    def settle(self) -> None:
        """Finish what a struck thread has begun to send to many. With the lock held."""
        self._joint.settle()

    def flush(self, rank: int) -> None:
        """Send to `rank` what its socket takes. With the lock held."""
        channel = self.channels[rank]
        ledger = self._ledger
        if self._joint.going is not None:
            self._joint.settle()
        blocked = False
        while True:
            call = ledger.next_to_send(rank)
            if call is None:
                break
            if call.id in ledger.cancelled and self._status is not None:
                self._status.cancel(rank, call.id)
            flags = WANT_VALUE if call.reply_from is None or call.reply_from == rank else 0
            head = b""
            if call.deadline is not None:
                flags |= HAS_DEADLINE
                head = DEADLINE.pack(call.deadline)
            body = call.body if call.bodies is None else call.bodies[rank]
            if type(body) is Lent:
                body.hold.pending.discard(rank)  # from here on it is the rank's to let go
            try:
                if not channel.send_call(call, flags, head, body):
                    blocked = True
                    break
            except ConnectionError:
                break  # the other end is gone: end of file and the launcher will tell
            if not ledger.sent(rank, call):
                break
        if blocked is not channel.wants_out and not channel.eof:
            channel.wants_out = None  # not known, where the next line is struck: said again then
            self.ready.modify(channel.fd, IN | OUT if blocked else IN)
            channel.wants_out = blocked
            self.blocked = sum(channel.wants_out is not False for channel in self.channels)

    def flush_all(self) -> None:
        """Finish what a struck thread has begun. With the lock held."""
        self._ledger.mend()
        self._joint.settle()
        for rank, queue in enumerate(self._ledger.queues):
            if queue:
                self.flush(rank)

    def told(self) -> list[DriverChannel]:
        """The channels whose ranks say that they have sent more than was taken. Looks at memory."""
        said = self._news.look()
        if said == self._heard:
            return []
        self._heard = said
        words = self._news.words
        return [
            channel
            for channel in self.channels
            if words[channel.line] > channel.receive_sequence and not channel.eof
        ]

    def pull(self, channels: list[DriverChannel]) -> bool:
        """Feed the ledger with what `channels` have received. False: there is nothing more now.

        All of them first give what they have, and then it is fed, with the lock taken once.
        """
        ledger = self._ledger
        joint = self._joint
        came = joint.came
        odd = joint.deal() if came else []
        odd += joint.receive(channels)
        more = False
        if came:
            plain = True
            with self._lock:
                ledger.mend()
                reply, queues = ledger.reply, ledger.queues
                place = -1
                for entry in came:
                    place += 1
                    if entry is None:
                        continue  # fed by a handler's own wait, which was struck
                    channel, data = entry
                    if len(data) >= HEADER_SIZE and not channel.chunks:
                        magic, kind, _, sequence, call_id, length = unpack_header(data)
                        if (
                            length == len(data) - HEADER_SIZE
                            and sequence == channel.receive_sequence & SEQUENCE_MASK
                            and kind in PLAIN
                            and magic == MAGIC
                        ):
                            rank = channel.rank
                            queue = queues[rank]
                            if queue:
                                self.flush(rank)  # as in `_feed`
                            # The time is for failures: OK and ACK set no timers.
                            if reply(rank, call_id, kind, data[HEADER_SIZE:], 0.0):
                                self._on_news()
                            channel.receive_sequence += 1
                            came[place] = None  # in one piece with the line above
                            more = True
                            if queue:
                                self.flush(rank)
                            continue
                    plain = False
                if plain:
                    came.clear()
            if not plain:
                more = more or any(entry[1] for entry in came if entry is not None)
                odd += joint.deal()
        if odd:
            more = self._pull_odd(odd) or more
        return more

    def _pull_odd(self, odd: list[DriverChannel]) -> bool:
        """Feed the ledger with what lies in the channels `odd`: all that is not one whole answer
        that says all by itself. Whether there was anything."""
        ledger = self._ledger
        came = []
        bad: list[tuple[int, str]] = []
        ended: list[int] = []
        more = False
        for channel in odd:
            rank = channel.rank
            if channel.eof:
                ended.append(rank)  # again, where who has read the end was struck
            elif not channel.chunks:
                self._heard = b""  # the rank's word came before its bytes: look again
            try:
                frames, data, used = channel.frames()
            except BadFrame as error:
                frames, data, used = error.before  # good answers come first
                bad.append((rank, str(error)))
            if frames:
                came.append((rank, channel, frames, data, used))
                more = True
        if came:
            now = clock()
            with self._lock:
                ledger.mend()
                for rank, channel, frames, data, used in came:
                    self._feed(rank, channel, frames, data, used, now)
        for rank, reason in bad:
            self._garbled(rank, reason)
        for rank in ended:
            with self._lock:
                ledger.hangup(rank, clock())
                self._on_news()
                self._forget(self.channels[rank])  # last: who is struck before it is told again
        return more

    def _feed(
        self,
        rank: int,
        channel: DriverChannel,
        frames: list[tuple[int, int, bytes, int]],
        data: bytes,
        used: int,
        now: float,
    ) -> None:
        """Feed the ledger with `frames`, which are the first `used` bytes of `data`."""
        ledger = self._ledger
        queue = ledger.queues[rank]
        if queue:
            # Struck after a call's last byte, before that was noted: note it before the
            # answer is taken, or the call would be put under way a second time.
            self.flush(rank)
        lent = False
        failed = False
        for kind, call_id, body, sequence in frames:
            if sequence != channel.receive_sequence & SEQUENCE_MASK:
                ahead = (sequence - channel.receive_sequence) & SEQUENCE_MASK
                if ahead < SEQUENCE_MASK >> 1 or not channel.seen_before(frames, data):
                    self._garbled(rank, channel.out_of_turn(kind, sequence))
                    return
                continue  # fed already, by who was struck, or by a handler's own wait
            if kind in _LENT and self.arena is not None:
                lent = True
                try:
                    kind, body = _LENT[kind], self.arena.receive(body, rank, sequence)
                except Exception as error:
                    if is_interrupt(error):
                        raise
                    what = f"the result of call {call_id} lies nowhere ({error})"
                    self._garbled(rank, f"frame {sequence}: {what}")
                    return
            if kind not in ANSWERS:
                self._garbled(rank, channel.out_of_turn(kind, sequence))
                return
            if ledger.reply(rank, call_id, kind, body, now) or kind == FAILED:
                failed = True  # which sets timers, or breaks the group
            channel.receive_sequence += 1
        channel.consume(data, used)
        if lent and self.arena is not None:
            self.arena.dealt(rank)
        if queue:
            self.flush(rank)
        if failed:
            self._on_news()

    def pull_stranded(self) -> None:
        """Deal with what a struck leader took off the sockets: no poll will tell of it again."""
        self._joint.deal()
        for channel in self.channels:
            if channel.holding:
                self.pull([channel])

    def _garbled(self, rank: int, reason: str) -> None:
        with self._lock:
            self._ledger.break_group(Garbled(rank, reason))
            self._on_news()
            self._forget(self.channels[rank])  # last: who is struck before it finds it again

    def _forget(self, channel: DriverChannel) -> None:
        channel.forget()
        with contextlib.suppress(OSError, ValueError):  # done already
            self.ready.unregister(channel.fd)

    def bury(self) -> None:
        # Empty the channel before believing the death: a worker may answer and exit, and we may
        # be told of the exit first. The other order throws a good answer away.
        for rank, report in list(self.deaths.items()):
            channel = self.channels[rank]
            # Asked of the kernel too: a handler's own wait may have taken what was to be pulled.
            while self.pull([channel]) or (not channel.eof and self.unread_here(rank)):
                pass
            with self._lock:
                self._forget(channel)
                self._ledger.died(rank, report)
                self.deaths.pop(rank, None)
                self._on_news()

    def unread_there(self, rank: int) -> int:
        """How much of what was sent to `rank` it has not read yet; bytes, as the kernel counts."""
        return _count(self.channels[rank].fd, TIOCOUTQ)

    def unread_here(self, rank: int) -> int:
        """How many bytes from `rank` no leader has taken yet."""
        return _count(self.channels[rank].fd, FIONREAD)

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self._news.close()
        self.ready.close()


def _count(fd: int, what: int) -> int:
    return int.from_bytes(ioctl(fd, what, bytes(4)), byteorder)
