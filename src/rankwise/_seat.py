"""Where the engine of a group sits, and how another comes to sit there: a restart.

    a rank dies  > Engine.report_failure > Policy.failed > back-off --.
    restart()  -------------------------------------------------------+> the restart's own thread:
                  retire the old engine > launch > boot > on_restart > `engine` is the new one
                                            ^ failed: Policy.failed, back-off

Every view of the group finds the engine here, so it finds the new one after a restart. Until that
sits, calls meet the old engine, which refuses them.

At most one thread restarts (`_thread`, set and cleared under `_lock`; seating clears it, too). It
owns the new engine (`_fresh`) until that sits; `_closing` tells it to stop, and whoever sets that
kills `_fresh`. So the new engine is ended by whichever of the two sees the other. A thread whose
restart has failed is `_teller` while it tells the user, who may restart again. The seat does not
hold the group, which may be collected while its ranks start again.

An engine that breaks says so once, to whom it sits here for (`on_break`): by itself, or asked by a
look right after it was seated. Before that nobody is told: a start that fails tells its own error.
Nothing of the user's runs under `_lock`.
"""

from __future__ import annotations

import logging
import os
import threading

from rankwise._answers import broken, explain, nobody_hears
from rankwise._background import Background, Bell
from rankwise._callbacks import USERS_PATIENCE
from rankwise._calls import Closed
from rankwise._deadline import clock, deadline
from rankwise._interrupts import is_interrupt
from rankwise._options import DEFAULTS
from rankwise._restart import Policy
from rankwise._views import ManyView
from rankwise.backends import launch
from rankwise.backends.boot import check_ready
from rankwise.errors import CallTimeout, StartupError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._calls import Error
    from rankwise._engine import Engine
    from rankwise._spec import GroupSpec
    from rankwise.backends.launching import Held

logger = logging.getLogger("rankwise")


class Seat:
    """The seat of one group's engine."""

    def __init__(self, spec: GroupSpec, engine: Engine) -> None:
        self.spec = spec
        self.engine = engine
        self._fresh: Engine | None = None
        self._policy = Policy(spec.restart)
        self._lock = threading.RLock()  # a signal handler may close the group in the midst of it
        self._thread: Background | None = None
        self._teller: Background | None = None  # was `_thread`, and is in `on_failure` now
        self._closing = False
        self._over = spec.restart is None  # the group will not restart by itself any more
        self._error: BaseException | None = None  # of the last restart
        self._news = Bell()
        self._owner = os.getpid()

    def take(self, engine: Engine) -> bool:
        """Seat `engine`, which is ready. False where the group is being closed."""
        restarts = self.spec.restart is not None
        with self._lock:
            if self._closing:
                return False
            self._policy.ready(clock())
            self.engine = engine
            self._thread = None  # now: if this engine breaks at once, that is a restart of its own
            self._over = not restarts
            # Not earlier: what a break begins may not be forgotten here.
            if restarts:
                engine.outlook = "is broken and about to be restarted: wait_ready() waits for that"
                engine.on_break = lambda cause: self._broke(engine, cause)
            else:
                engine.on_break = lambda cause: _tell_broken(engine, cause)
        cause = engine.refusal()
        if cause is not None:
            engine.report_failure(cause)  # when it broke, it may not have known whom to tell
        return True

    # -- restarting ---------------------------------------------------------------------------

    def _broke(self, engine: Engine, cause: Error) -> None:
        """`engine` has broken. In its keeper's thread, or that of whoever closes or seats it."""
        with self._lock:
            if engine is not self.engine or self._thread is not None:
                return  # it breaks while it is retired
            wait = None if self._closing else self._policy.failed(clock())
            if wait is not None:
                engine.defer(lambda: self._log_broken(engine, cause, wait))
                try:
                    self._begin(f"is being restarted ({self._policy.count()})", wait, 0.0)
                    return
                except (RuntimeError, MemoryError) as error:
                    if is_interrupt(error):
                        raise
                    what = f"{engine.name} was not restarted: {error}"
                    engine.defer(lambda: logger.error("%s", what))
        self._give_up(engine)
        _tell_broken(engine, cause)

    def restart(self, timeout: float | None) -> None:
        """See WorkerGroup.restart."""
        self._check_owner()
        self.engine.check_restart()
        try:
            with self._lock:
                if self._closing:
                    raise explain(Closed(), None, self.engine)
                thread = self._thread
                if thread is None:
                    thread = self._begin("is being restarted", 0.0, timeout, by_hand=True)
            if thread.is_current():
                raise RuntimeError(f"{self.spec.name}: on_restart cannot restart the group")
            thread.join()
        except BaseException as error:
            if is_interrupt(error):
                self.end(lambda engine: engine.kill())
            raise
        if self._error is not None:
            raise self._error
        self._check_open()

    def _begin(
        self, outlook: str, wait: float, timeout: float | None, *, by_hand: bool = False
    ) -> Background:
        """Start the thread that restarts. RuntimeError or MemoryError: there is none for it."""
        engine = self.engine
        before, engine.outlook = engine.outlook, f"{outlook}: wait_ready() waits for that"
        self._error = None
        self._thread = thread = Background(
            lambda: self._run(wait, timeout, by_hand), f"rankwise-{self.spec.name}-restart"
        )
        try:
            thread.start()
        except BaseException:
            if not thread.started:
                self._thread = None
                engine.outlook = before
            raise
        return thread

    def _run(self, wait: float, timeout: float | None, by_hand: bool) -> None:
        """The restart's thread."""
        error: BaseException | None
        try:
            error = self._try(wait, timeout, by_hand)
        except BaseException as reason:
            error = reason
        engine = self.engine
        cause = engine.refusal()
        failed = False
        # First of all: `on_failure` may raise, or restart the group.
        with self._lock:
            me = self._thread
            if me is not None and me.is_current():  # else what it has made sits
                failed = error is not None and not self._closing
                if failed:
                    self._give_up(engine)
                    self._teller = me
                self._error = error
                self._thread = None
        self._news.ring()
        if failed and not by_hand:
            logger.error("%s was not restarted: %s", self.spec.name, error)
            self._tell_failure(engine, cause, error)
        if failed:
            self._teller = None

    def _try(self, wait: float, timeout: float | None, by_hand: bool) -> BaseException | None:
        """Restart, in as many tries as there may be. Returns why the last one failed; None: one has
        succeeded, or the group is being closed."""
        warm: Held | None = None
        try:
            warm = self.engine.retire(timeout)
            while not self._news.wait_for(lambda: self._closing, deadline(wait)):
                error = self._start(warm)
                if error is None:
                    return None
                again = None if by_hand else self._policy.failed(clock())
                if again is None:
                    return error
                wait = again
                self._log_restart(str(error), wait)
            return None
        finally:
            if warm is not None:
                warm.close()

    def _start(self, warm: Held | None) -> BaseException | None:
        """Start new ranks and seat them. Returns why not, with nothing left of them."""
        spec = self.spec
        began = clock()
        try:
            self._fresh, boot = launch(spec, warm)
            engine = self._fresh
            if not self._closing:
                in_time = engine.wait(boot, deadline(spec.start_timeout))
                check_ready(spec, engine, boot, not in_time)
                self._reload(engine)
            if self._closing or not self.take(engine):
                engine.kill()
                return None  # nobody waits for it any more
        except BaseException as error:
            if self._fresh is not None:
                self._fresh.kill()
            return error
        finally:
            self._fresh = None
        logger.info("%s has been restarted in %.2f s", spec.name, clock() - began)
        return None

    def _reload(self, engine: Engine) -> None:
        """Have the user's `on_restart` bring the new ranks up to date."""
        on_restart = None if self._policy.terms is None else self._policy.terms.on_restart
        if on_restart is None:
            return
        ranks = ManyView()
        ranks._init_view(
            Seat(self.spec, engine), tuple(range(engine.world_size)), None, None, DEFAULTS
        )
        try:
            on_restart(ranks)
        except BaseException as error:  # SystemExit too: the new ranks have to end all the same
            raise StartupError(
                f"{engine.name}: on_restart raised {type(error).__name__}: {error}", phase="ready"
            ) from error

    def _give_up(self, engine: Engine) -> None:
        """No restart will come by itself any more."""
        self._over = True
        used = self._policy.used
        engine.outlook = "is broken and takes no more calls: make a new group, or try restart()" + (
            f" ({used} restart{'s' * (used != 1)} used up)" if used else ""
        )
        self._news.ring()

    def _tell_failure(
        self, engine: Engine, cause: Error | None, error: BaseException | None
    ) -> None:
        on_failure = self.spec.on_failure
        if on_failure is None or cause is None:
            return
        failure = explain(cause, None, engine)
        failure.__cause__ = failure.__cause__ or error
        try:
            on_failure(failure)
        except BaseException:
            logger.exception("on_failure of %s failed", self.spec.name)

    def _log_broken(self, engine: Engine, cause: Error, wait: float) -> None:
        self._log_restart(str(explain(cause, None, engine)).partition(". ")[0], wait)

    def _log_restart(self, why: str, wait: float) -> None:
        what = "%s; restart %s in %g s"
        logger.warning(what, why.rstrip("."), self._policy.count(), wait)

    # -- waiting ------------------------------------------------------------------------------

    def wait_ready(self, timeout: float | None) -> None:
        """See WorkerGroup.wait_ready."""
        self._check_owner()

        def decided() -> bool:
            if self._closing or (self._thread is None and self.engine.refusal() is None):
                return True
            return self._over and self._thread is None

        if not self._news.wait_for(decided, deadline(timeout)):
            raise CallTimeout(
                f"{self.spec.name} is not ready after {timeout:g} s: restart "
                f"{self._policy.count()} goes on",
                method="wait_ready",
                missing=tuple(range(self.spec.world_size)),
            )
        self._check_open()

    def _check_open(self) -> None:
        engine = self.engine
        cause = engine.refusal()
        if cause is not None:
            raise explain(cause, None, engine)

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            raise RuntimeError(self.engine.inert or f"{self.spec.name} belongs to another process")

    # -- the end ------------------------------------------------------------------------------

    def end(self, how: Callable[[Engine], None]) -> None:
        """End the engine as `how` does, and a restart that is under way with it."""
        engine = self.engine
        if self._owner != os.getpid():
            how(engine)  # which raises, or does nothing
            return
        engine.check_entry()  # before anything says that it is closing
        with self._lock:
            self._closing = True
            engine.outlook = None  # no restart follows, whatever was told of one
            threads = [thread for thread in (self._thread, self._teller) if thread is not None]
        self._news.ring()
        try:
            fresh = self._fresh
            if fresh is not None:
                fresh.kill()
            how(self.engine)
        finally:
            until = deadline(USERS_PATIENCE)
            for thread in threads:
                # Else a handler of ours has interrupted its start: to wait for it would be to wait
                # for ourselves, and it finds us closing.
                if thread.started:
                    thread.join(until)
            if threads:
                how(self.engine)  # the new one, where it was seated a moment before
        engine.outlook = None
        engine.retired = False

    def abandon(self) -> bool:
        """The group was collected. In a finalizer, so inside any lock. See Engine.abandon."""
        self._closing = True
        self._news.ring()
        # In this order: whoever is no longer fresh sits.
        fresh = self._fresh
        running = fresh is not None and fresh.abandon()
        return self.engine.abandon() or running or self._thread is not None


def _tell_broken(engine: Engine, cause: Error) -> None:
    """Have the user's `on_failure` called, on the callback thread; without one the failure is
    logged, if no call tells it."""
    on_failure = engine.spec.on_failure
    if on_failure is not None:
        engine.defer(lambda: on_failure(broken(cause, engine)))
    elif nobody_hears(cause):
        engine.defer(lambda: logger.error("%s", broken(cause, engine)))
