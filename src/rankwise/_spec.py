"""What a group is, checked in full before any process exists.

``check_spec`` takes the arguments of ``WorkerGroup`` as the user wrote them. It raises a TypeError
or ValueError whose one sentence names the argument, what was given and what would be right, or
returns a ``GroupSpec`` that everything behind it may believe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rankwise._checks import (
    at_least,
    check_hash_seeds,
    check_variables,
    choice,
    is_list,
    one_a_rank,
    seconds,
    shorten,
    wrong_type,
    wrong_value,
)
from rankwise._inherited import Inherited
from rankwise._rankinfo import RankInfo
from rankwise._restart import Restart

T = TypeVar("T")

RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
VISIBILITY_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MAX_NAME = 64  # characters


class per_rank:
    """Marks a value of ``args=`` or ``kwargs=`` as one for each rank, in rank order.

    ``WorkerGroup(Shard, 2, args=per_rank([("a",), ("b",)]))``. Any iterable with an order will do,
    a generator too; a str, bytes, mapping or set is a TypeError.
    """

    __slots__ = ("values",)

    def __init__(self, values: Iterable[Any]) -> None:
        unordered = isinstance(values, (str, bytes, bytearray, Mapping, set, frozenset))
        if unordered or not isinstance(values, Iterable):
            raise TypeError(f"per_rank takes a sequence, one item a rank, not {shorten(values)}")
        self.values = tuple(values)

    def __repr__(self) -> str:
        return f"per_rank({list(self.values)!r})"


@dataclass(frozen=True, slots=True, eq=False)
class GroupSpec:
    """The checked arguments of a group; what may differ between ranks is one item a rank."""

    target: Callable[..., Any]
    world_size: int
    args: tuple[tuple[Any, ...], ...] = field(repr=False)
    kwargs: tuple[dict[str, Any], ...] = field(repr=False)
    shared_args: bool  # args and kwargs are the same for all ranks: serialise them once
    name: str
    env: tuple[dict[str, str], ...] | Callable[[RankInfo], object] = field(repr=False)
    devices: str | tuple[int | str, ...] | None
    threads: int | str | None
    cpus: str | tuple[tuple[int, ...], ...] | None
    start_method: str
    preload: tuple[str, ...]
    start_timeout: float | None  # seconds
    logs: str
    on_failure: Callable[[Any], object] | None
    restart: Restart | None
    spin: float | str  # seconds
    backend: str
    inherited: Inherited = field(default_factory=Inherited, repr=False)


def check_spec(
    target: object,
    world_size: object,
    *,
    args: object = (),
    kwargs: object = None,
    name: object = "workers",
    env: object = None,
    devices: object = None,
    threads: object = "auto",
    cpus: object = None,
    start_method: object = "spawn",
    preload: object = (),
    start_timeout: object = None,
    logs: object = "prefix",
    restart: object = None,
    on_failure: object = None,
    spin: object = "auto",
    backend: object = "local",
) -> GroupSpec:
    """The arguments of ``WorkerGroup``, checked; raises TypeError or ValueError for the first
    that is wrong. Containers are copied one level deep, so that they may be changed afterwards.
    """
    if not callable(target):
        raise wrong_type("target", "a class or another callable", target)
    size = at_least(1, "world_size", "an int of at least 1", world_size)
    if on_failure is not None and not callable(on_failure):
        raise wrong_type("on_failure", "a callable that takes the GroupBroken, or None", on_failure)
    if restart is not None and not isinstance(restart, Restart):
        raise wrong_type("restart", "a rankwise.Restart(...), or None", restart)
    checked_devices = _check_devices(devices, size)
    checked_threads = _check_threads(threads)
    spec = GroupSpec(
        target=target,
        world_size=size,
        args=_for_each_rank("args", args, size, _check_args),
        kwargs=_for_each_rank("kwargs", {} if kwargs is None else kwargs, size, _check_kwargs),
        shared_args=not isinstance(args, per_rank) and not isinstance(kwargs, per_rank),
        name=_check_name(name),
        env=_check_env(env, size, reserved_variables(checked_devices, checked_threads)),
        devices=checked_devices,
        threads=checked_threads,
        cpus=_check_cpus(cpus, size),
        start_method=_check_start_method(start_method),
        preload=_check_preload(preload),
        start_timeout=_check_start_timeout(start_timeout),
        logs=choice("logs", ("prefix", "inherit", "off"), logs),
        on_failure=on_failure,
        restart=restart,
        spin=_check_spin(spin),
        backend=choice("backend", ("local", "inline"), backend),
    )
    if spec.backend == "inline":
        _check_inline(spec, env)
    if spec.preload and spec.start_method != "forkserver":
        raise ValueError(
            f"preload={shorten(preload)} needs start_method='forkserver', not"
            f" {spec.start_method!r}: only forked ranks share what a launcher imported"
        )
    return spec


def reserved_variables(
    devices: str | tuple[int | str, ...] | None, threads: int | str | None
) -> dict[str, str]:
    """The variables that a user's ``env`` must not set, each with who sets it."""
    reserved: dict[str, str] = {}
    reserved |= dict.fromkeys(RANK_VARIABLES, "rankwise")
    if devices not in (None, "shared"):
        reserved |= dict.fromkeys(VISIBILITY_VARIABLES, f"devices={shorten(devices)}")
    if isinstance(threads, int):
        reserved |= dict.fromkeys(THREAD_VARIABLES, f"threads={threads}")
    return reserved


def _for_each_rank(
    label: str, value: object, size: int, check_one: Callable[[str, object], T]
) -> tuple[T, ...]:
    """One checked item a rank; the same object for all of them unless ``per_rank`` is given."""
    if not isinstance(value, per_rank):
        return (check_one(label, value),) * size
    label = f"{label}=per_rank([...])"
    items = one_a_rank(label, value.values, size)
    return tuple(check_one(f"item {rank} of {label}", item) for rank, item in enumerate(items))


def _check_args(label: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        right = "args=(x,)" if label == "args" else "(x,)"
        raise TypeError(
            f"{label} must be a tuple, not {shorten(value)}; one argument x alone is {right}"
        )
    _refuse_marker(label, value)
    return tuple(value)


def _check_kwargs(label: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong_type(label, "a mapping of names to values", value)
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{label} must have names of type str, not {shorten(key)}")
    _refuse_marker(label, value.values())
    return dict(value)


def _refuse_marker(label: str, items: Iterable[object]) -> None:
    # It would travel to the workers as it is, and surprise the user's own code there.
    if any(isinstance(item, per_rank) for item in items):
        raise TypeError(
            f"{label} must not have per_rank(...) inside, but be given as a whole by"
            " per_rank([...]), one item a rank"
        )


def _check_name(value: object) -> str:
    # It becomes part of process titles, prefixes of log lines and names of files.
    right = f"1 to {MAX_NAME} printable characters without '/'"
    if not isinstance(value, str):
        raise wrong_type("name", f"a str of {right}", value)
    if not value.strip() or len(value) > MAX_NAME or "/" in value or not value.isprintable():
        raise wrong_value("name", right, value)
    return value


def _check_env(
    value: object, size: int, reserved: Mapping[str, str]
) -> tuple[dict[str, str], ...] | Callable[[RankInfo], object]:
    if value is None:
        return ({},) * size
    if isinstance(value, Mapping):
        return (check_variables("env", value, reserved),) * size
    if is_list(value):
        each = tuple(
            check_variables(f"env for rank {rank}", variables, reserved)
            for rank, variables in enumerate(one_a_rank("env", value, size))
        )
        check_hash_seeds(dict(enumerate(each)))
        return each
    if callable(value):
        return value
    right = "a mapping, a list of mappings (one a rank) or a callable that takes a RankInfo"
    raise TypeError(f"env must be {right}, not of type {type(value).__name__}")


def _check_devices(value: object, size: int) -> str | tuple[int | str, ...] | None:
    right = "None, 'shared', 'isolated' or a list of indices or UUIDs, one a rank"
    if value is None:
        return None
    if isinstance(value, str):
        return choice("devices", ("shared", "isolated"), value, right)
    if not is_list(value):
        raise wrong_type("devices", right, value)
    entries = one_a_rank("devices", value, size)
    return tuple(_check_device(f"devices[{rank}]", entry) for rank, entry in enumerate(entries))


def _check_device(label: str, entry: object) -> int | str:
    right = "an index of at least 0 or a UUID"
    if not isinstance(entry, str):
        return at_least(0, label, right, entry)
    if not entry.strip() or not entry.isprintable():
        raise wrong_value(label, right, entry)
    return entry


def _check_threads(value: object) -> int | str | None:
    right = "'auto', None or an int of at least 1"
    if isinstance(value, str):
        return choice("threads", ("auto",), value, right)
    return None if value is None else at_least(1, "threads", right, value)


def _check_cpus(value: object, size: int) -> str | tuple[tuple[int, ...], ...] | None:
    right = "None, 'split' or a list of lists of CPU numbers, one a rank"
    if value is None:
        return None
    if isinstance(value, str):
        return choice("cpus", ("split",), value, right)
    if not is_list(value):
        raise wrong_type("cpus", right, value)
    entries = one_a_rank("cpus", value, size)
    for rank, entry in enumerate(entries):
        if not isinstance(entry, Collection) or isinstance(entry, str) or not entry:
            raise wrong_value(f"cpus[{rank}]", "one CPU's number or more, in a list or set", entry)
    return tuple(
        tuple(at_least(0, f"a CPU in cpus[{rank}]", "its number", cpu) for cpu in sorted(entry))
        for rank, entry in enumerate(entries)
    )


def _check_start_method(value: object) -> str:
    if isinstance(value, str) and value == "fork":
        raise ValueError(
            "start_method must be 'spawn' or 'forkserver', not 'fork': the driver is never forked,"
            " but start_method='forkserver' forks ranks from a clean process that imported preload"
        )
    return choice("start_method", ("spawn", "forkserver"), value)


def _check_preload(value: object) -> tuple[str, ...]:
    right = "a sequence of module names"
    if not is_list(value):
        raise wrong_type("preload", right, value)
    for name in value:
        if not isinstance(name, str):
            raise wrong_type("preload", right, value)
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"preload must be {right}, and {shorten(name)} is none")
    return tuple(value)


def _check_start_timeout(value: object) -> float | None:
    right = "a positive, finite number of seconds, or None"
    return None if value is None else seconds("start_timeout", right, value, zero=False)


def _check_spin(value: object) -> float | str:
    right = "'auto' or a finite number of seconds, 0 or more"
    if isinstance(value, str):
        return choice("spin", ("auto",), value, right)
    return seconds("spin", right, value, zero=True)


def _check_inline(spec: GroupSpec, env: object) -> None:
    for label, given, possible in (
        ("env", None if env is None else ..., (None,)),  # its values are not shown
        ("devices", spec.devices, (None,)),
        ("threads", spec.threads, ("auto", None)),
        ("cpus", spec.cpus, (None,)),
        ("logs", spec.logs, ("prefix",)),
        ("start_method", spec.start_method, ("spawn",)),
        ("preload", spec.preload, ((),)),
    ):
        if given not in possible:
            shown = "..." if given is ... else shorten(given)
            raise ValueError(
                f"{label}={shown} cannot be had with backend='inline', whose ranks are threads of"
                f" the driver: leave {label} out"
            )
