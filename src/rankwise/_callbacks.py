"""The callback thread of a group: runs the user's callbacks, and nothing else does."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue

from rankwise._background import Background
from rankwise._deadline import deadline
from rankwise._interrupts import is_interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._calls import Call

logger = logging.getLogger("rankwise")

USERS_PATIENCE = 5.0  # seconds that an end waits for a callback of the user's


class Callbacks:
    """One daemon thread, started with the first job. A job put is run once, in order."""

    def __init__(self, name: str) -> None:
        self._name = f"rankwise-{name}-callbacks"
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may close the group in the midst of it
        self._thread: Background | None = None
        self._closed = False

    def ensure(self) -> None:
        """Have the thread running: called when somebody asks for a callback, never at the end.

        Raises RuntimeError or MemoryError where no thread can be made; the next one tries again.
        """
        with self._lock:
            self._have_thread()

    def _have_thread(self) -> None:
        if self._closed or self._thread is not None:
            return
        self._thread = made = Background(self._run, self._name)
        try:
            made.start()
        except BaseException:
            if not made.started:
                self._thread = None
            raise

    def is_current(self) -> bool:
        """Whether this very thread is the callback thread."""
        return self._thread is not None and self._thread.is_current()

    def put(self, job: Callable[[], object]) -> None:
        self._jobs.put(job)

    def announce(self, call: Call) -> None:
        """`call` is done: its future tells whoever does not wait, and is kept no longer."""
        future = call.future
        if future is not None and call.watched:
            self.put(future.announce)  # type: ignore[attr-defined]
        call.future = None

    def defer(self, job: Callable[[], object]) -> None:
        """As `put`, with the thread running; where none can be made, once the next `ensure` has.

        No thread but the main one waits for the lock: who has it starts the thread, and if that is
        the main thread, a handler may have interrupted it that waits for the keeper, which defers.
        """
        self._jobs.put(job)
        try:
            if threading.current_thread() is threading.main_thread():
                self.ensure()
            elif self._lock.acquire(blocking=False):
                try:
                    self._have_thread()
                finally:
                    self._lock.release()
        except (RuntimeError, MemoryError) as error:
            if is_interrupt(error):
                raise

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except BaseException:
                self._log_failure()
            job = None  # the thread, while it waits, keeps no future alive

    def _log_failure(self) -> None:
        try:
            logger.exception("a callback of %s failed", self._name)
        except BaseException as error:
            # A log handler of the user's: it must not end the callbacks of all others.
            with suppress(BaseException):
                sys.excepthook(type(error), error, error.__traceback__)

    def close(self, timeout: float) -> None:
        """Run what was put, and end the thread; `timeout` bounds the wait for a user's callback."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._jobs.put(None)
        if thread is not None and thread.started:
            thread.join(deadline(timeout))
