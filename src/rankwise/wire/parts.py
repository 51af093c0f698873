"""What an object holds, in the eyes of the pickler, and the expressions that lead to it.

`__closure__['name']` is not quite Python (it is a tuple there); all others can be evaluated.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from rankwise._interrupts import is_interrupt
from rankwise.wire.byvalue import ByValuePickler
from rankwise.wire.codec import PROTOCOL

_ATOMS = (type(None), bool, int, float, str, bytes)
_MEMBER = types.MemberDescriptorType
_COMPUTED = types.GetSetDescriptorType
# Longer pieces of a `__reduce_ex__` are one part, to be looked into when they are at fault.
_MANY = 1000


class Parts(NamedTuple):
    """Some of what an object holds: `label(i)` is the expression that gives `values[i]`."""

    values: Sequence[object]
    label: Callable[[int], str]


def parts_of(obj: object, path: str) -> list[Parts]:
    """What pickling `obj` pickles, as far as there is an expression for it, in a few groups.

    `path` is the expression for `obj` itself. Raises nothing but what a signal handler raises.
    """
    try:
        return _parts(obj, path)
    except Exception as error:
        if is_interrupt(error):
            raise
        return []  # its own __reduce__ failed, say: then it is the culprit


def _parts(obj: Any, path: str) -> list[Parts]:
    kind = type(obj)
    if kind is list or kind is tuple:
        # A copy: the object itself counts as done by now.
        return [Parts(list(obj), lambda index: f"{path}[{index}]")]
    if kind is dict:
        return _items(obj, path)
    if kind is set or kind is frozenset:
        return [Parts(list(obj), lambda index: f"list({path})[{index}]")]
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
        return [Parts(list(obj.flat), lambda index: f"{path}.flat[{index}]")]
    if issubclass(kind, types.FunctionType):
        return _listed(_of_function(obj, path))
    if issubclass(kind, type):
        return _listed(_of_class(obj, path))
    if issubclass(kind, types.ModuleType):
        return _listed((f"{path}.{name}", value) for name, value in vars(obj).items())
    return _of_object(obj, path)


def _of_function(function: Any, path: str) -> Iterator[tuple[str, object]]:
    fields, slots = _pickler().reducer_override(function)[2]
    cells = slots["__closure__"] or ()
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        try:
            yield f"{path}.__closure__[{name!r}]", cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    for name, value in slots["__globals__"].items():
        yield f"{path}.__globals__[{name!r}]", value
    for name in ("__defaults__", "__kwdefaults__", "__annotations__"):
        yield f"{path}.{name}", slots[name]
    for name, value in fields.items():
        yield f"{path}.{name}", value


def _of_class(cls: type, path: str) -> Iterator[tuple[str, object]]:
    _, made_of, (attributes, _), *_ = _pickler().reducer_override(cls)
    for index, base in enumerate(cls.__bases__):
        yield f"{path}.__bases__[{index}]", base
    if isinstance(members := made_of[3], dict) and hasattr(cls, "__members__"):  # an enum
        for name, value in members.items():
            yield f"{path}.{name}.value", value
    for name, value in attributes.items():
        plain = getattr(cls, name, None) is value
        yield f"{path}.{name}" if plain else f"{path}.__dict__[{name!r}]", value


def _of_object(obj: Any, path: str) -> list[Parts]:
    reducer = _pickler().dispatch_table.get(type(obj))
    reduced = reducer(obj) if reducer else obj.__reduce_ex__(PROTOCOL)
    if not isinstance(reduced, tuple):
        return []
    names = _names(obj, path)
    made, args, state, items, pairs, *_ = (*reduced, None, None, None, None)
    # A reducer from a table is no method, so there is an expression only for what has a name.
    call = None if reducer else f"{path}.__reduce_ex__({PROTOCOL})"
    found = [*_unfold(made, call and f"{call}[0]", names)]
    found += _unfold(args, call and f"{call}[1]", names)
    found += _unfold(state, call and f"{call}[2]", names)
    parts = _listed(found)
    if items is not None:
        parts.append(Parts(list(items), lambda index: f"{path}[{index}]"))
    if pairs is not None:
        parts += _items(dict(pairs), path)
    return parts


def _pickler() -> Any:
    return ByValuePickler(BytesIO(), PROTOCOL)


def _items(mapping: dict[Any, object], path: str) -> list[Parts]:
    keys = list(mapping)

    def label(index: int) -> str:
        key = keys[index]
        if type(key) in _ATOMS and len(text := repr(key)) <= 80:
            return f"{path}[{text}]"
        return f"list({path}.values())[{index}]"

    return [
        Parts(list(mapping.values()), label),
        Parts(keys, lambda index: f"list({path})[{index}]"),
    ]


def _listed(pairs: Iterable[tuple[str, object]]) -> list[Parts]:
    found = [(label, value) for label, value in pairs if type(value) not in _ATOMS]
    return [Parts([value for _, value in found], lambda index: found[index][0])]


def _names(obj: Any, path: str) -> dict[int, tuple[str, object]]:
    """Expressions for what hangs on `obj`, by id; with the values, so that no id is used again."""
    kind = type(obj)
    names: dict[int, tuple[str, object]] = {id(kind): (f"type({path})", kind)}
    if isinstance(obj, tuple | set | frozenset):
        fields = getattr(kind, "_fields", ()) if isinstance(obj, tuple) else None
        for index, value in enumerate(obj):
            if fields is None:
                label = f"list({path})[{index}]"
            else:
                label = f"{path}.{fields[index]}" if index < len(fields) else f"{path}[{index}]"
            names[id(value)] = (label, value)
    for base in kind.__mro__:
        for name, found in vars(base).items():
            # Slots and the fields of C types. What C types compute may cost anything: these do not.
            computed = type(found) is _COMPUTED and name in ("args", "cell_contents", "__self__")
            if type(found) is _MEMBER or computed:
                try:
                    value = found.__get__(obj)
                except (AttributeError, ValueError):
                    continue  # an empty slot or cell
                names[id(value)] = (f"{path}.{_unmangled(name, base)}", value)
    for name, value in getattr(obj, "__dict__", {}).items():
        plain = isinstance(name, str) and name.isidentifier()
        names[id(value)] = (f"{path}.{name}" if plain else f"{path}.__dict__[{name!r}]", value)
    return names


def _unmangled(name: str, base: type) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{base.__name__.lstrip('_')}{name}" if private else name


def _unfold(
    value: Any, label: str | None, names: dict[int, tuple[str, object]], depth: int = 3
) -> Iterator[tuple[str, object]]:
    """What a piece of a `__reduce_ex__` holds, down to what has a name of its own."""
    if id(value) in names:
        yield names[id(value)]
    elif depth and type(value) in (tuple, list) and len(value) < _MANY:
        for index, one in enumerate(value):
            yield from _unfold(one, label and f"{label}[{index}]", names, depth - 1)
    elif depth and type(value) is dict and len(value) < _MANY:
        for key, one in value.items():
            known = label if type(key) in _ATOMS else None
            yield from _unfold(one, known and f"{known}[{key!r}]", names, depth - 1)
    elif label is not None:
        yield label, value
