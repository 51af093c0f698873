"""Where the ranks of a group live: processes of this machine, or threads of the driver."""

from __future__ import annotations

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
    from rankwise.backends.local import start_local

    return start_local(spec, warm)
