"""Objects to bytes and back.

    encode_call   > plain pickle          most calls: a method's name, numbers, short strings
    encode_result > _PlainPickler         whatever the receiver can import
                  > ByValuePickler        what it cannot (`byvalue.py`, cloudpickle)
                    > Arena.put           large buffers and long pickles (`arena.py`)
      on failure  > culprit.find          SerializationError: args[0]['cfg'].lock cannot be pickled
    loads         < all of them

A class or function travels as its name where the receiver can import it, and as its definition
("by value") where it cannot. Which of the two shows only in the middle of an object, so the plain
pickler begins, gives up at the first definition, and the other one does the whole object again.

Nothing here is kept from one message to the next, so any number of threads may be at it, and an
exception out of a signal handler leaves nothing half done.
"""

from __future__ import annotations

import sys
import types

# The C half of `pickle` alone: the Python half imports re, struct and enum, 5 to 10 ms at the start
# of every worker. `types`, `copyreg` and `functools` come with it.
from _pickle import PickleBuffer, Pickler, PicklingError
from _pickle import dumps as _dumps
from _pickle import loads as _loads
from copyreg import dispatch_table
from functools import _lru_cache_wrapper

from rankwise.wire.lending import LENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Any, Final, Protocol

    from rankwise.wire.arena import Arena

    class Taker(Protocol):
        """Takes what is too large for a frame: an arena, or a parcel."""

        def put(
            self,
            stream: list[bytes | memoryview],
            length: int,
            buffers: list[memoryview],
            receivers: Sequence[int],
            keep: object = None,
            /,
        ) -> bytes | None: ...


PROTOCOL: Final = 5

# Objects of exactly these types hold nothing that the plain pickler could get wrong.
_ATOMS: Final = frozenset({type(None), bool, int, float, str})
_INNER_ATOMS: Final = _ATOMS | {bytes}  # outside of containers these may be large
# Longer containers are not looked into: it would take longer than the pickler it saves (0.7 us).
_SHORT: Final = 8

# From this size on a buffer travels through the arena, and so does a pickle: bytes.
LARGE: Final = 64 << 10


def encode_call(
    method: str | Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    arena: Taker | None = None,
    ranks: Sequence[int] = (0,),
) -> bytes:
    """The body of a call: the tuple `(method, args, kwargs)`, pickled.

    What is large goes into `arena`, where there is one, to be read by `ranks`.

    Raises SerializationError, with the path to the culprit, whatever went wrong but for MemoryError
    and what is not an `Exception`.
    """
    try:
        if (
            type(method) is str
            and _all_plain(args)
            and (not kwargs or (_all_plain(kwargs) and _all_plain(kwargs.values())))
        ):
            body = _dumps((method, args, kwargs), PROTOCOL)
            if arena is None or len(body) < LARGE:
                return body
        return dumps((method, args, kwargs), arena, ranks)
    except MemoryError:
        raise
    except Exception as error:
        from rankwise._interrupts import is_interrupt
        from rankwise.wire.culprit import explain

        if is_interrupt(error):
            raise  # an alarm struck while we pickled: no argument is to blame

        roots: dict[str, object] = {"method": method}
        roots |= {f"args[{index}]": value for index, value in enumerate(args)}
        roots |= {f"kwargs[{key!r}]": value for key, value in kwargs.items()}
        raise explain("the arguments", roots, error) from error


def encode_result(value: object, arena: Taker | None = None) -> bytes:
    """The body of a result: `value`, pickled. Raises as `encode_call`; the path is `result...`."""
    try:
        if type(value) in _ATOMS or _all_plain((value,)):
            body = _dumps(value, PROTOCOL)
            if arena is None or len(body) < LARGE:
                return body
        return dumps(value, arena)
    except MemoryError:
        raise
    except Exception as error:
        from rankwise._interrupts import is_interrupt
        from rankwise.wire.culprit import explain

        if is_interrupt(error):
            raise  # an alarm struck while we pickled: no argument is to blame

        raise explain("the result", {"result": value}, error) from error


def loads(data: bytes | bytearray | memoryview, arena: Arena | None = None) -> Any:
    """The object that `data` was made from. Raises whatever its unpickling raises.

    A class that came by value and is known here (made here, or met in an earlier message) is that
    very class, as it is now: its definition in the message is passed over.
    """
    if arena is not None and data[0] == LENT:
        return arena.load(data)
    return _loads(data)


def dumps(obj: object, arena: Taker | None = None, readers: Sequence[int] = (0,)) -> bytes:
    """`obj` as bytes, by name where the receiver can import it and by value where it cannot.

    What is large goes into `arena`, where there is one, to be read by `readers`; a tensor in a
    GPU's memory stays there for them (empty: it does not). Raises whatever the pickling raises.
    """
    try:
        return _dump(_PlainPickler, obj, arena, readers)
    except (_Definition, PicklingError, TypeError):
        pass  # a definition, or one of the kinds that only cloudpickle knows (modules, dict views)
    from rankwise.wire.byvalue import ByValuePickler

    return _dump(ByValuePickler, obj, arena, readers)


class Parcel:
    """Stands in for an arena while there is none: keeps what is large where the pickler found it.

    `stream` is empty where nothing is; then the pickle is what `dumps` returned.
    """

    __slots__ = ("buffers", "keep", "length", "stream")

    def __init__(self) -> None:
        self.stream: list[bytes | memoryview] = []
        self.length = 0
        self.buffers: list[memoryview] = []
        self.keep: object = None

    def put(
        self,
        stream: list[bytes | memoryview],
        length: int,
        buffers: list[memoryview],
        receivers: Sequence[int],
        keep: object = None,
        /,
    ) -> bytes:
        self.stream, self.length, self.buffers, self.keep = stream, length, buffers, keep
        return b""

    def lend(self, arena: Arena, readers: Sequence[int]) -> bytes | None:
        """As `dumps` with that arena; None: not now. Raises MemoryError."""
        return arena.put(self.stream, self.length, self.buffers, readers, self.keep)


class _Parts:
    """A file that keeps what is written as it comes: the pickler hands long bytes over uncopied."""

    __slots__ = ("parts", "write")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.write = self.parts.append


def _dump(pickler: Any, obj: object, arena: Taker | None, readers: Sequence[int]) -> bytes:
    file = _Parts()
    parts = file.parts
    if arena is None:
        pickler(file, PROTOCOL).dump(obj)
        return parts[0] if len(parts) == 1 else b"".join(map(_raw, parts))
    buffers: list[memoryview] = []

    def keep(buffer: PickleBuffer) -> bool:
        raw = buffer.raw()
        if len(raw) < LARGE:
            return True  # in the pickle
        buffers.append(raw)
        return False

    made = pickler(file, PROTOCOL, buffer_callback=keep)
    made.readers = readers
    made.dump(obj)
    if len(parts) == 1 and not buffers and len(parts[0]) < LARGE and made.kept is None:
        return parts[0]
    stream = [*map(_raw, parts)]
    length = sum(map(len, stream))
    if buffers or length >= LARGE or made.kept is not None:
        body = arena.put(stream, length, buffers, readers, made.kept)
        if body is not None:
            return body
        if buffers or made.kept is not None:
            return _dump(pickler, obj, None, readers)
    return b"".join(stream)


def _raw(part: Any) -> bytes | memoryview:
    return part if type(part) is bytes else PickleBuffer(part).raw()


def _all_plain(values: Collection[object]) -> bool:
    """Whether plain pickle will do for each of these; False too where that takes long to tell."""
    if _ATOMS.issuperset(map(type, values)):
        return True
    for value in values:
        kind = type(value)
        if kind in _ATOMS:
            continue
        if kind is bytes:
            if len(value) >= LARGE:  # type: ignore[arg-type]
                return False
        elif kind is tuple or kind is list:
            inner: Collection[object] = value  # type: ignore[assignment]
            if len(inner) > _SHORT or not _INNER_ATOMS.issuperset(map(type, inner)):
                return False
        elif kind is dict:
            items: dict[object, object] = value  # type: ignore[assignment]
            if (
                len(items) > _SHORT
                or not _ATOMS.issuperset(map(type, items))
                or not _INNER_ATOMS.issuperset(map(type, items.values()))
            ):
                return False
        else:
            return False
    return True


class _Definition(Exception):
    """The plain pickler has come to something that must travel as its definition."""


class _PlainPickler(Pickler):
    """The C pickler, which asks here about everything but the plain builtins."""

    readers: Sequence[int] = ()  # processes that may be shown what lies in a GPU's memory
    kept: list[object] | None = None  # what is to outlive their looking at it

    def reducer_override(self, obj: object) -> Any:
        kind = type(obj)
        if not issubclass(kind, _QUESTIONED) and kind.__name__ not in _SPECIAL:
            return NotImplemented  # nearly always; the rest costs 0.15 us more
        if issubclass(kind, _NAMED) and travels_by_value(obj):
            raise _Definition
        return reduce_specially(obj, self)


# By their type and not by isinstance: the __class__ of a proxy may claim anything.
_NAMED: Final = (type, types.FunctionType, types.MethodType, _lru_cache_wrapper)
_QUESTIONED: Final = (*_NAMED, BaseException)
_SPECIAL: Final = frozenset({"ndarray", "Tensor", "Parameter", "UntypedStorage"})


def travels_by_value(obj: Any) -> bool:
    """Whether this class, function or bound method would not be found by its name elsewhere."""
    found: Any
    if type(obj) is types.MethodType:
        # Pickled as (object, name), which leads nowhere from `self.__private` or one bound by hand.
        found = getattr(obj.__self__, obj.__func__.__name__, None)
        return type(found) is not types.MethodType or found != obj
    if module_by_value(obj.__module__):
        return True
    found = sys.modules[obj.__module__]
    qualname: Any = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", "")
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found is not obj


def module_by_value(name: str) -> bool:
    """Whether other processes cannot import the module of this name, or are not to.

    So it is with the main module, with one without a file (made by `types.ModuleType`, `exec`, a
    notebook), and with one given to `cloudpickle.register_pickle_by_value`, or a module below it.
    """
    module = sys.modules.get(name)
    if module is None or name == "__main__" or name == "__mp_main__":
        return True
    cloudpickle = sys.modules.get("cloudpickle.cloudpickle")  # never imported for this question
    registered = getattr(cloudpickle, "_PICKLE_BY_VALUE_MODULES", None)
    if registered and any(parent in registered for parent in _self_and_parents(name)):
        return True
    if getattr(module, "__file__", None) is not None:
        return False
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if origin in ("built-in", "frozen") or hasattr(module, "__path__"):
        return False
    # Below a module with a file it is that one's work, and comes into being when that is imported:
    # so it is with the submodules of extension modules (torch._C._nn), which have no file either.
    return not any(
        getattr(sys.modules.get(parent), "__file__", None) is not None
        for parent in _self_and_parents(name)
    )


def _self_and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def reduce_specially(obj: object, pickler: Any) -> Any:
    """What `pickler` is to pickle in place of `obj`, or NotImplemented: it knows best itself.

    Three kinds do not. An array that is read-only here would be read-only there, but what is
    received is the receiver's own. torch copies a tensor's memory into the pickle. An exception
    would be made anew by calling its class with its `args`, which fails, or doubles its message,
    where `__init__` takes something else than it passes on.
    """
    kind = type(obj)
    if issubclass(kind, BaseException):
        return _reduce_exception(obj)
    if kind is getattr(sys.modules.get("numpy"), "ndarray", None):
        array: Any = obj
        return NotImplemented if array.flags.writeable else array.copy("K").__reduce_ex__(PROTOCOL)
    if kind.__name__ in _SPECIAL and kind.__module__.startswith("torch"):
        return _reduce_torch(obj, pickler)
    return NotImplemented


def _reduce_torch(obj: object, pickler: Any) -> Any:
    kind = type(obj)
    torch = sys.modules.get("torch")
    if kind is getattr(torch, "Tensor", None) or kind is sys.modules["torch.nn"].Parameter:
        from rankwise.wire.tensors import is_on_gpu, reduce_tensor, refuse_graph

        refuse_graph(obj)
        if not pickler.readers or not is_on_gpu(obj):
            return reduce_tensor(obj)
        if type(pickler) is _PlainPickler:
            raise _Definition  # which may come later: what is shared twice would be copied twice
        from rankwise.wire.gpu import share_tensor

        return share_tensor(obj, pickler)
    if kind is getattr(torch, "UntypedStorage", None):
        from rankwise.wire.tensors import reduce_storage

        return reduce_storage(obj)
    return NotImplemented


_CMethod = type(BaseException.__reduce__)
_CInit = type(BaseException.__init__)
_CNew = type(BaseException.__new__)


def _reduce_exception(error: Any) -> Any:
    kind: Any = type(error)
    if (
        type(kind.__init__) is not types.FunctionType
        or type(kind.__new__) is not _CNew
        or type(kind.__reduce__) is not _CMethod
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__setstate__ is not BaseException.__setstate__
        or kind in dispatch_table
    ):
        return NotImplemented  # no __init__ to get round, or the class has its own way to travel
    made, args, *state = error.__reduce_ex__(PROTOCOL)
    if made is not kind:
        return NotImplemented
    return _remake, (kind, *args), state[0] if state else None, None, None, _restore


def _remake(kind: type[BaseException], *args: object) -> BaseException:
    """An exception as its builtin base makes it, past every `__init__` written in Python."""
    inits = (vars(base).get("__init__") for base in kind.__mro__)
    error = kind.__new__(kind, *args)
    init: Any = next(init for init in inits if type(init) is _CInit)
    init(error, *args)
    return error


def _restore(error: BaseException, state: Mapping[str, object]) -> None:
    for name, value in state.items():
        object.__setattr__(error, name, value)  # past the __setattr__ of a frozen dataclass
