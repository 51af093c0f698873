"""Definitions on the wire: cloudpickle, taught what rankwise needs. Imported when first needed.

cloudpickle sends a class or function of `__main__` by value, and gives each such class an id by
which both sides know it again. To that we add:

- `codec.module_by_value` decides, also about modules that are in `sys.modules`. cloudpickle has a
  registry for that, which belongs to the user: it is read, and nothing is written to it.
- A class that is known already is not filled again. cloudpickle would overwrite the driver's own
  class, when one of its instances comes home, by copies whose globals are not the driver's; and a
  worker's class attributes by what they were when it was defined.
- What annotations name (ParamSpec, TypeVarTuple, NewType) travels too, and so does what
  `functools.lru_cache` and `functools.cached_property` make of a function.
- Code keeps the name of its file. cloudpickle makes it `<dynamic-code>`, so that equal code gives
  equal bytes; the tracebacks and stacks of a script's own class would then name no place.
"""

from __future__ import annotations

import copyreg
import functools
import io
import sys
import types
import typing
import weakref
from _pickle import Pickler
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle.cloudpickle as cp  # type: ignore[import-untyped]

from rankwise.wire.codec import module_by_value, reduce_specially, travels_by_value

# The classes that have all their attributes: those that were sent from here, and those that came
# and were filled. Weak, for a class must be able to go. Two threads may both fill a new class, with
# the same attributes, so there is no lock.
_complete: weakref.WeakSet[type] = weakref.WeakSet()

_DEFINITIONS = (type, types.FunctionType, types.ModuleType)
_NO_FILE = "<dynamic-code>"
_TYPING_NAMES = {typing.TypeVar, typing.ParamSpec, typing.TypeVarTuple, typing.NewType}


def _reduce_text_file(file: io.TextIOWrapper) -> Any:
    # cloudpickle would send any open file as a copy of its content, and nobody would notice.
    if file is sys.stdout or file is sys.stderr:
        return cp._file_reduce(file)
    raise TypeError(f"cannot pickle the open file {file!r}")


def _reduce_code(code: types.CodeType) -> Any:
    make, args, *rest = cp._code_reduce(code)
    named = (code.co_filename if type(each) is str and each == _NO_FILE else each for each in args)
    return make, tuple(named), *rest


def _reduce_cached_property(cached: functools.cached_property[Any]) -> Any:
    # Up to Python 3.11 it holds a lock.
    state = {name: value for name, value in vars(cached).items() if name != "lock"}
    return type(cached), (cached.func,), state


def _reduce_cached_function(cached: functools._lru_cache_wrapper[Any]) -> Any:
    if not travels_by_value(cached):
        return cached.__reduce__()
    return _make_cached_function, (cached.__wrapped__, cached.cache_parameters())


def _make_cached_function(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


_DISPATCH_TABLE = {
    **cp.Pickler._dispatch_table,
    io.TextIOWrapper: _reduce_text_file,
    types.CodeType: _reduce_code,
    functools.cached_property: _reduce_cached_property,
    functools._lru_cache_wrapper: _reduce_cached_function,
}


class ByValuePickler(cp.Pickler):  # type: ignore[misc]
    """Sends whatever the receiver cannot import as its definition, with the globals it names."""

    readers: Sequence[int] = ()  # as for the plain pickler
    kept: list[object] | None = None

    # cloudpickle's own turns a RecursionError into a PicklingError; we want to tell the two apart.
    dump = Pickler.dump  # pyright: ignore[reportAssignmentType]

    def __init__(
        self, file: Any, protocol: int, buffer_callback: Callable[[Any], object] | None = None
    ) -> None:
        # One plain dict: cloudpickle's ChainMap costs each object in the message a microsecond.
        self.dispatch_table = {**copyreg.dispatch_table, **_DISPATCH_TABLE}
        super().__init__(file, protocol, buffer_callback)

    def reducer_override(self, obj: Any) -> Any:
        """As for any pickler: how `obj` is rebuilt, or NotImplemented."""
        kind = type(obj)
        if issubclass(kind, _DEFINITIONS):
            return self._reduce_definition(obj)
        if kind in _TYPING_NAMES and travels_by_value(obj):
            return _reduce_typing_name(obj)
        return reduce_specially(obj, self)

    def _reduce_definition(self, obj: Any) -> Any:
        if isinstance(obj, types.ModuleType):
            return _reduce_module(obj)
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented:
            if obj.__module__ is None or not module_by_value(obj.__module__):
                return NotImplemented
            if isinstance(obj, types.FunctionType):
                return self._dynamic_function_reduce(obj)
            reduced = cp._dynamic_class_reduce(obj)
        if reduced[-1] is cp._class_setstate:
            _complete.add(obj)
            reduced = (*reduced[:-1], _fill_class)
        return reduced


def _fill_class(cls: type, state: Any) -> type:
    if cls not in _complete:
        cp._class_setstate(cls, state)
        _complete.add(cls)
    return cls


def _reduce_module(module: types.ModuleType) -> Any:
    name = module.__name__
    if not module_by_value(name):
        return cp.subimport, (name,)
    # As state and not as an argument: a function in it may name the module itself.
    left_out = ("__builtins__", "__loader__", "__spec__")
    state = {key: value for key, value in vars(module).items() if key not in left_out}
    return types.ModuleType, (name,), state, None, None, _fill_module


def _fill_module(module: types.ModuleType, state: dict[str, object]) -> None:
    vars(module).update(state)


def _reduce_typing_name(obj: Any) -> Any:
    if type(obj) is typing.TypeVar:
        return cp._make_typevar, cp._decompose_typevar(obj)
    args = (obj.__name__, obj.__supertype__) if type(obj) is typing.NewType else (obj.__name__,)
    return _make_typing_name, (type(obj), args, cp._get_or_create_tracker_id(obj))


def _make_typing_name(kind: Any, args: tuple[Any, ...], tracker_id: str) -> Any:
    return cp._lookup_class_or_track(tracker_id, kind(*args))
