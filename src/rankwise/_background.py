"""A daemon thread whose end a main thread may wait for, though signal handlers strike it there."""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Background:
    """Runs `run` in a daemon thread called `name`, from `start` on."""

    def __init__(self, run: Callable[[], object], name: str) -> None:
        self._run_it = run
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.name = name

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self._run_it()
        finally:
            self._ended.set()

    def is_current(self) -> bool:
        """Whether this very thread is it."""
        return threading.get_ident() == self._thread.ident

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; not from the thread itself. False after `timeout` seconds."""
        # Not Thread.join alone: struck in the middle of it, CPython 3.11 and 3.12 hold the thread
        # for ended (bpo-45274), and we would close descriptors that it is using.
        if self.is_current() or not self._ended.wait(timeout):
            return False
        self._thread.join()
        return True
