"""Where the ranks of a group live: processes of this machine, or threads of the driver."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rankwise._calls import Call
    from rankwise._engine import Engine
    from rankwise._spec import GroupSpec
    from rankwise.backends.launching import Held


def launch(spec: GroupSpec, warm: Held | None = None) -> tuple[Engine, Call]:
    """Start the ranks of `spec`: the engine, and the call that makes the worker objects.

    warm: a launcher that has imported `preload` already; taken if there is use for it.

    Raises SerializationError before anything is started, and MemoryError where there is no room
    for the arguments. Whatever it raises, nothing is left.
    """
    from rankwise import _lifetime
    from rankwise._shielded import Shielded
    from rankwise.backends.boot import boot_call, encode_targets

    targets = encode_targets(spec)
    started = Shielded(lambda: _start(spec, warm))
    try:
        engine = started.run()
        # Large arguments are copied while the processes start, and ^C is heard meanwhile.
        boot = boot_call(engine, targets)
        refusal = engine.submit((boot,))
        if refusal is not None:  # it has broken already: nobody else will settle this call
            boot.error = refusal
            boot.done = True
        return engine, boot
    except BaseException:
        started.settle()
        _lifetime.kill_started(spec)
        raise


def _start(spec: GroupSpec, warm: Held | None) -> Engine:
    if spec.backend == "inline":
        from rankwise.backends.inline import InlineEngine

        return InlineEngine(spec)
    system = _too_old_or_other()
    if system is not None:  # where its modules cannot even be imported
        raise RuntimeError(
            f"backend='local' needs Linux 5.4 or newer, and this is {system}: backend='inline' "
            "works everywhere"
        )
    from rankwise.backends.local import start_local

    return start_local(spec, warm)


def _too_old_or_other() -> str | None:
    """What this machine runs, if it is not Linux 5.4 (pidfd_open and waitid by it) or newer."""
    if sys.platform != "linux":
        return sys.platform
    release = os.uname().release
    numbers = [int(part) for part in release.replace("-", ".").split(".")[:2] if part.isdigit()]
    return f"Linux {release}" if numbers and numbers < [5, 4] else None
