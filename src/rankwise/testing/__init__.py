"""For tests of code that uses rankwise: leaks, planned faults, and ranks without processes.

    with faults(kill(1, at="run", call=7)):             the group that is made in here has them
        group = WorkerGroup(Shard, 4)

    with leak_check():                                  no process, thread, descriptor or memory
        ...                                             is left behind

    with ManualClock() as clock:                        deadlines and grace without waiting
        group = WorkerGroup(Shard, 4, backend="inline")
        clock.advance(30)

With rankwise installed, pytest has the fixtures `leak_check`, `worker_group`, `inline_group` and
`manual_clock` (`rankwise.testing.plugin`). See docs/testing.md.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise.testing._clock import ManualClock
    from rankwise.testing._faults import (
        STAGES,
        Fault,
        Refused,
        delay,
        drop,
        faults,
        hold_gil,
        kill,
        refuse,
    )
    from rankwise.testing._leaks import Leaked, leak_check

# Imported when first asked for: a rank that has a fault, and every run of pytest where rankwise is
# installed, import this package.
_HOMES = {
    "STAGES": "_faults",
    "Fault": "_faults",
    "Leaked": "_leaks",
    "ManualClock": "_clock",
    "Refused": "_faults",
    "delay": "_faults",
    "drop": "_faults",
    "faults": "_faults",
    "hold_gil": "_faults",
    "kill": "_faults",
    "leak_check": "_leaks",
    "refuse": "_faults",
}

__all__ = [
    "STAGES",
    "Fault",
    "Leaked",
    "ManualClock",
    "Refused",
    "delay",
    "drop",
    "faults",
    "hold_gil",
    "kill",
    "leak_check",
    "refuse",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
