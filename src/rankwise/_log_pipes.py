"""The launcher's ends of what the ranks write to their descriptors 1 and 2.

    pipe > read, 1 MB at most > Tail
                              > Splitter > Relay > Output ==> driver

Nobody makes a rank wait: the pipes are read whether or not the driver takes what is sent.
"""

from __future__ import annotations

import os
import select

from rankwise.logs.lines import Relay, prefix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from rankwise._messages import Launch
    from rankwise._spawn import Child

_ONE_READ: Final = 1 << 20


class LogPipes:
    """All pipes of a group, in an epoll of their own: they are looked at when nothing else is due.

    send: called with a stream (1 or 2) and bytes to show on it.
    """

    def __init__(self, send: Callable[[int, bytes], None]) -> None:
        self._send = send
        self._mode = "off"
        self._color = False
        self._relay = Relay("")
        self._epoll = select.epoll()
        self._children: dict[int, Child] = {}  # by read end

    def begin(self, launch: Launch) -> None:
        """What is shown, and how."""
        self._mode = launch.mode
        self._color = launch.color
        self._relay = Relay(launch.name)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def add(self, child: Child) -> None:
        for fd in child.pipes:
            self._epoll.register(fd, select.EPOLLIN)
            self._children[fd] = child

    def ready(self) -> list[int]:
        return [fd for fd, _ in self._epoll.poll(0, max(1, len(self._children)))]

    def read(self, fd: int) -> int:
        """Read once; returns how much there was, 0 if there is nothing now or ever again."""
        child = self._children.get(fd)
        if child is None:
            return 0  # it was read to its end since `ready` named it
        try:
            data = os.read(fd, _ONE_READ)
        except BlockingIOError:
            return 0
        stream = child.pipes[fd]
        if not data:
            self._offer(child, stream, child.splitters[stream].end())
            del self._children[fd], child.pipes[fd]
            os.close(fd)
            return 0
        child.tail.feed(data)
        if self._mode != "off":
            self._offer(child, stream, child.splitters[stream].feed(data))
        return len(data)

    def drain(self, child: Child) -> None:
        """Read what a rank that has ended has left in its pipes, its last partial line included.

        Not until end of file: a descendant may hold the pipe. Nor for ever: it may be writing, but
        what the rank wrote is within the first pipeful.
        """
        for fd, stream in list(child.pipes.items()):
            left = _ONE_READ
            while left > 0 and (got := self.read(fd)):
                left -= got
            self._offer(child, stream, child.splitters[stream].end())

    def acknowledged(self, nbytes: int) -> None:
        self._tell(self._relay.acknowledged(nbytes))

    def finish(self) -> None:
        """Every writer has ended: read what is left, and say what was dropped."""
        for child in set(self._children.values()):
            self.drain(child)
        self._tell(self._relay.notice())

    def close(self) -> None:
        """In a forked child. By close alone: the epoll is shared with the launcher, and whatever
        were unregistered here would be so there. The pipes are closed by their Child."""
        self._epoll.close()

    def _offer(self, child: Child, stream: int, lines: bytes) -> None:
        if lines:
            before = b""
            if self._mode == "prefix":
                before = prefix(child.name, child.rank, child.pid, self._color)
            for piece in self._relay.offer(lines, before):
                self._send(stream, piece)

    def _tell(self, line: bytes) -> None:
        if line:
            self._send(2, line)
