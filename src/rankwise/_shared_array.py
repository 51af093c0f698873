"""`group.shared_array`: an array in the arena. The one file of the core that needs numpy."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rankwise._engine import Engine


def make_shared_array(engine: Engine, shape: int | tuple[int, ...], dtype: object) -> Any:
    """Zeros that `engine` passes to its ranks without a copy; an ordinary array where it cannot."""
    import numpy

    wanted: Any = dtype
    kind = numpy.dtype(wanted)
    if kind.hasobject:
        raise TypeError(f"dtype must have no Python objects in it: they cannot be shared: {kind}")
    layout = numpy.broadcast_to(numpy.zeros((), numpy.uint8), shape)  # checks the shape, for free
    size = layout.size * kind.itemsize
    view = engine.arena.share(size) if engine.arena is not None and size else None
    if view is None:
        return numpy.zeros(shape, kind)
    return numpy.frombuffer(view, kind).reshape(layout.shape)
