"""The launcher's line to its driver: what is said, in order, and whether anybody is there to hear.

say, output > ControlChannel > flush ==> driver          what does not fit waits for POLLOUT
look, flush_all < the driver's pidfd                     DriverGone: everything is killed
"""

from __future__ import annotations

import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from rankwise.wire.control import ControlChannel

IN: Final = select.POLLIN


class DriverGone(Exception):
    """The driver has ended: nobody is left to serve or to tell."""


class Line:
    """`control` to the driver whose pidfd is `driver`; `poll` is what the launcher sleeps in."""

    def __init__(self, control: ControlChannel, driver: int, poll: select.poll) -> None:
        self.control = control
        self.driver = driver
        self._poll = poll
        # Not select.select: it takes no descriptor above 1023, and the driver that has given us
        # these may have many.
        self._driver_poll = poll_of(driver)
        poll.register(control, IN)
        poll.register(driver, IN)

    def say(self, message: object) -> None:
        # Urgent: ahead of all log lines, and in order among themselves.
        self.control.send(message, urgent=True)

    def flush(self) -> None:
        if self.control.backlog:
            sent = self.control.flush()
            self._poll.modify(self.control.fileno(), IN if sent else IN | select.POLLOUT)

    def flush_all(self) -> None:
        """Send all that is queued, however long the driver takes to read it, unless it ends."""
        poll = poll_of(self.driver)
        poll.register(self.control.fileno(), select.POLLOUT)
        while not self.control.flush():
            if self.driver in dict(poll.poll()):
                raise DriverGone
        # A launcher that stays would be woken for room, which there always is, without a pause.
        self._poll.modify(self.control.fileno(), IN)

    def look(self) -> None:
        """Between two things that take milliseconds: has the driver ended?"""
        if self._driver_poll.poll(0):
            raise DriverGone

    def readable(self, events: dict[int, int]) -> bool:
        """Whether `events`, out of the poll, say that the driver has said something, or ended."""
        return bool(events.get(self.control.fileno(), 0) & ~select.POLLOUT)

    def receive(self) -> list[object]:
        try:
            return self.control.receive()
        except EOFError:
            raise DriverGone from None


def poll_of(*fds: Any) -> select.poll:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, IN)
    return poll
