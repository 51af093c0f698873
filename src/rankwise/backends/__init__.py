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

    Raises SerializationError before anything is started. Whatever it raises, nothing is left.
    """
    from rankwise import _lifetime
    from rankwise._shielded import Shielded
    from rankwise.backends.boot import encode_targets

    blobs = encode_targets(spec)
    started = Shielded(lambda: _start(spec, blobs, warm))
    try:
        return started.run()
    except BaseException:
        started.settle()
        _lifetime.kill_started(spec)
        raise


def _start(spec: GroupSpec, blobs: list[bytes], warm: Held | None) -> tuple[Engine, Call]:
    from rankwise.backends.boot import boot_call

    engine: Engine
    if spec.backend == "inline":
        from rankwise.backends.inline import InlineEngine

        engine = InlineEngine(spec)
    else:
        from rankwise.backends.local import start_local

        engine = start_local(spec, warm)
    boot = boot_call(engine.infos, blobs, engine.spin, spec.inherited)
    engine.submit((boot,))
    return engine, boot
