"""What a call runs: a name that is looked up on the worker, or a callable that travels by value."""

from __future__ import annotations

from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# What was found before: the qualified names of methods, and what is sent for them. Strings alone,
# so no class is kept alive; few, for a program that makes its names up.
_KNOWN: dict[str, str] = {}
_MOST = 1000


def resolve_method(method: object) -> tuple[str, str | Callable[..., object]]:
    """(the name to show, what to send) for the `method` argument of a call.

    A function whose `__qualname__` ends in `Class.name` is sent as its name, so that an override in
    a subclass runs; any other callable by value, to be called as `f(worker, *args, **kwargs)`.
    Raises TypeError for a method bound to an object of the driver, and for what cannot be called.
    """
    if type(method) is FunctionType:
        known = _KNOWN.get(method.__qualname__)
        if known is not None:
            return known, known
    if isinstance(method, str):
        if not method:
            raise TypeError("method must be a name or a callable, not an empty string")
        return method, method
    if not callable(method):
        raise TypeError(f"method must be a name or a callable, not {method!r}")
    owner = getattr(method, "__self__", None)
    # A class method is bound to a class and a builtin to its module; the worker has both.
    if owner is not None and not isinstance(owner, type) and not _is_module(owner):
        raise TypeError(
            f"method is bound to an object of the driver ({_short(owner)}), which no worker has: "
            f"pass {type(owner).__name__}.{getattr(method, '__name__', 'method')} or its name"
        )
    path = "" if isinstance(method, type) else getattr(method, "__qualname__", "")
    holder, _, name = path.rpartition(".")
    if holder and not holder.endswith("<locals>") and name.isidentifier():
        if name.startswith("__") and not name.endswith("__"):
            name = f"_{holder.rpartition('.')[2].lstrip('_')}{name}"  # as the compiler mangled it
        if isinstance(method, FunctionType) and len(_KNOWN) < _MOST:
            _KNOWN[path] = name
        return name, name
    return method_name(method), method


def method_name(method: object) -> str:
    """A name for a callable that travels by value: `helper`, `<lambda>`, `partial(helper)`."""
    name = getattr(method, "__qualname__", None)
    if isinstance(name, str):
        return name.rpartition("<locals>.")[2]
    inner = getattr(method, "func", None)
    kind = type(method).__name__
    return f"{kind}({method_name(inner)})" if callable(inner) else kind


def _is_module(owner: object) -> bool:
    return type(owner).__name__ == "module"


def _short(owner: object) -> str:
    return f"a {type(owner).__qualname__}"
