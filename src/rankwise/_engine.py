"""What a group needs of a backend: a Protocol, nothing to inherit.

    WorkerGroup > Engine.run / submit > Call
    GroupFuture > Engine.wait, cancel, watch

The ranks behind an engine may be processes (`backends.local`) or threads (`backends.inline`).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Generator
    from typing import Any, Protocol

    from rankwise._calls import Call, Error
    from rankwise._future import GroupFuture
    from rankwise._rankinfo import RankInfo
    from rankwise._ranks import Ranks
    from rankwise._report import RankReport
    from rankwise._spec import GroupSpec
    from rankwise._spin import Spin
    from rankwise.backends.launching import Held
    from rankwise.wire.arena import Arena

    class Engine(Protocol):
        """The running ranks of one group."""

        spec: GroupSpec
        name: str
        world_size: int
        ranks: Ranks
        infos: list[RankInfo]
        spin: Spin  # how long a waiter polls
        arena: Arena | None  # where large payloads lie
        starting: bool  # the boot call has not been looked at yet
        # Told once that the group has broken, and why. None until it sits: nobody is told.
        on_break: Callable[[Error], object] | None
        outlook: str | None  # what a refused call is told of the group's future
        retired: bool  # ended by `retire`: it says why it ended, not that it was closed

        @property
        def inert(self) -> str | None:
            """Why this process may not use it (a forked child's copy), or None."""
            ...

        def check_entry(self) -> None:
            """Raise RuntimeError in a forked child, and in a handler that has interrupted a step of
            the engine in this very thread."""
            ...

        def check_restart(self) -> None:
            """As `check_entry`; also in a handler that has interrupted a wait which all others lean
            on: a restart would wait for it, and it for the handler."""
            ...

        def run(self, call: Call) -> Error | None:
            """Submit `call` and wait until it is settled. Returns why it was refused, or None."""
            ...

        def submit(self, calls: tuple[Call, ...]) -> Error | None:
            """Give `calls` their place in the order. Never blocks. Returns as `run` does."""
            ...

        def deadline(self, timeout: float | None) -> float | None:
            """The moment `timeout` seconds from now, by the clock that it goes by; None: none."""
            ...

        def barrier(self, call: Call) -> None:
            """Settle `call` once every call before it has ended."""
            ...

        def wait(self, call: Call, until: float | None) -> bool:
            """Wait until `call` is settled (True), or until the clock reads `until` (False)."""
            ...

        def await_call(self, call: Call, loop: AbstractEventLoop) -> Generator[object, None, None]:
            """Wait in `loop` until `call` is settled."""
            ...

        def attend(self, call: Call) -> None:
            """Somebody looks whether `call` is done, and does not wait. Never blocks or raises."""
            ...

        def cancel(self, call: Call) -> bool:
            """Drop `call` if no byte of it was sent (True), else tell the ranks (False)."""
            ...

        def watch(self, future: GroupFuture[Any]) -> None:
            """Somebody who does not wait in `result` wants to hear of `future`."""
            ...

        def defer(self, job: Callable[[], object]) -> None:
            """Run `job` on the group's callback thread."""
            ...

        def unfetched(self, future: GroupFuture[Any]) -> None:
            """`future` failed and is gone without anybody having asked for its outcome."""
            ...

        def refusal(self) -> Error | None:
            """Why no call can be taken now, or None."""
            ...

        def owed(self) -> dict[int, Call]:
            """For each rank that owes an answer, the oldest call that it owes."""
            ...

        def inquire(
            self, ranks: tuple[int, ...], patience: float, *, lately: bool = False
        ) -> dict[int, RankReport]:
            """What each of `ranks` is doing, with its stacks. patience: seconds at most. lately: a
            stack that was told a moment ago, in the same call, will do."""
            ...

        def abandon(self) -> bool:
            """The group was collected; False where it had ended."""
            ...

        def learn_pids(self) -> None:
            """Wait, briefly, for the launcher's word on each rank's process."""
            ...

        def report_failure(self, cause: Error) -> None:
            """Have `on_break` called, once."""
            ...

        def break_calls(self) -> None:
            """Settle every open call: the interpreter is about to exit."""
            ...

        def become_inert(self, why: str) -> None:
            """This is a forked child's copy: close its descriptors, touch nothing else. `why`: what
            its user reads when he calls it."""
            ...

        def close(self, timeout: float | None, *, drop: bool = False) -> None:
            """End in order; `drop`: without what is queued, and with the cancel flags set."""
            ...

        def refuse(self, *, cancel: bool = False) -> None:
            """Take no more calls; `cancel`: those of which no byte has been sent are cancelled."""
            ...

        def kill(self) -> None:
            """End at once."""
            ...

        def retire(self, timeout: float | None) -> Held | None:
            """End as `close` does, to be replaced: the launcher is handed over, where it is warm.

            It does not wait for the callback thread, on which the user may have asked for this.
            """
            ...
