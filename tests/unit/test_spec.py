"""A group's arguments are refused, in words, before any process exists."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest

from rankwise._rankinfo import RankInfo
from rankwise._spec import GroupSpec, check_spec, per_rank


class Shard:
    """A target."""


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr today")


class Index:
    """Stands for an int, as numpy's integers do."""

    def __index__(self) -> int:
        return 3


def spec(world_size: object = 2, target: object = Shard, **arguments: Any) -> GroupSpec:
    return check_spec(target, world_size, **arguments)


def names(arguments: object) -> str | None:
    """A case is called by the arguments that it gives."""
    return "-".join(arguments) if isinstance(arguments, dict) else None


def test_defaults() -> None:
    checked = spec()
    assert checked.target is Shard
    assert checked.world_size == 2
    assert checked.args == ((), ())
    assert checked.kwargs == ({}, {})
    assert checked.shared_args is True
    assert checked.name == "workers"
    assert checked.env == ({}, {})
    assert checked.devices is None
    assert checked.threads == "auto"
    assert checked.start_method == "spawn"
    assert checked.preload == ()
    assert checked.start_timeout is None
    assert checked.logs == "prefix"
    assert checked.on_failure is None
    assert checked.spin == "auto"
    assert checked.backend == "local"


def test_a_spec_is_frozen_and_its_repr_shows_no_argument_and_no_environment() -> None:
    checked = spec(args=("secret-1",), kwargs={"key": "secret-2"}, env={"TOKEN": "secret-3"})
    with pytest.raises(AttributeError):
        checked.name = "other"  # type: ignore[misc]
    assert "secret" not in repr(checked)
    assert "world_size=2" in repr(checked)


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        ({"world_size": Index()}, "world_size", 3),
        ({"args": ["a", 1]}, "args", (("a", 1), ("a", 1))),
        ({"args": per_rank([("a",), ["b"]])}, "args", (("a",), ("b",))),
        (
            {"args": per_rank((f"shard-{r}",) for r in range(2))},
            "args",
            (("shard-0",), ("shard-1",)),
        ),
        ({"kwargs": MappingProxyType({"x": 1})}, "kwargs", ({"x": 1}, {"x": 1})),
        ({"kwargs": per_rank([{"x": 1}, OrderedDict(x=2)])}, "kwargs", ({"x": 1}, {"x": 2})),
        ({"name": "x" * 64}, "name", "x" * 64),
        ({"name": "décodeur 7B"}, "name", "décodeur 7B"),
        ({"env": {"A": "1"}}, "env", ({"A": "1"}, {"A": "1"})),
        ({"env": [{"A": "1"}, {}]}, "env", ({"A": "1"}, {})),
        ({"env": {"PYTHONHASHSEED": "random"}}, "env", ({"PYTHONHASHSEED": "random"},) * 2),
        ({"env": [{"PYTHONHASHSEED": "7"}] * 2}, "env", ({"PYTHONHASHSEED": "7"},) * 2),
        ({"env": {"CUDA_VISIBLE_DEVICES": "1"}}, "env", ({"CUDA_VISIBLE_DEVICES": "1"},) * 2),
        ({"env": {"OMP_NUM_THREADS": "3"}}, "env", ({"OMP_NUM_THREADS": "3"},) * 2),
        ({"devices": "shared"}, "devices", "shared"),
        ({"devices": "isolated"}, "devices", "isolated"),
        ({"devices": range(2)}, "devices", (0, 1)),
        ({"devices": [1, 1]}, "devices", (1, 1)),
        ({"devices": [Index(), "GPU-8f"]}, "devices", (3, "GPU-8f")),
        ({"threads": None}, "threads", None),
        ({"threads": 4}, "threads", 4),
        ({"cpus": None}, "cpus", None),
        ({"cpus": "split"}, "cpus", "split"),
        ({"cpus": [{3, 1}, range(2)]}, "cpus", ((1, 3), (0, 1))),
        ({"preload": ["torch", "a.b"], "start_method": "forkserver"}, "preload", ("torch", "a.b")),
        ({"start_timeout": 30}, "start_timeout", 30.0),
        ({"logs": "off"}, "logs", "off"),
        ({"on_failure": print}, "on_failure", print),
        ({"spin": 0}, "spin", 0.0),
        ({"spin": 0.001}, "spin", 0.001),
        ({"backend": "inline", "threads": None}, "threads", None),
        ({"backend": "inline", "start_timeout": 5.0}, "backend", "inline"),
    ],
    ids=names,
)
def test_what_is_right_is_taken(arguments: dict[str, Any], field: str, expected: object) -> None:
    value = getattr(spec(**arguments), field)
    assert value == expected
    assert type(value) is type(expected)


FORKSERVER = {"start_method": "forkserver"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        # target, world_size
        ({"target": 3}, TypeError, ["target", "a class or another callable", "not 3"]),
        ({"target": "m:C"}, TypeError, ["target", "callable", "not 'm:C'"]),
        ({"world_size": 0}, ValueError, ["world_size", "an int of at least 1", "not 0"]),
        ({"world_size": -2}, ValueError, ["world_size", "at least 1", "not -2"]),
        ({"world_size": True}, TypeError, ["world_size", "an int of at least 1", "not True"]),
        ({"world_size": 2.0}, TypeError, ["world_size", "an int", "not 2.0"]),
        ({"world_size": "2"}, TypeError, ["world_size", "an int", "not '2'"]),
        ({"world_size": None}, TypeError, ["world_size", "an int", "not None"]),
        # args
        ({"args": "model"}, TypeError, ["args must be a tuple", "not 'model'", "args=(x,)"]),
        ({"args": {"x": 1}}, TypeError, ["args must be a tuple", "not {'x': 1}", "args=(x,)"]),
        ({"args": None}, TypeError, ["args must be a tuple", "not None"]),
        ({"args": Broken()}, TypeError, ["args must be a tuple", "not <Broken object>"]),
        (
            {"args": per_rank([("a",)])},
            ValueError,
            ["args=per_rank([...])", "one item for each of the 2 ranks", "not 1"],
        ),
        (
            {"args": per_rank([("a",), "b"])},
            TypeError,
            ["item 1 of args=per_rank([...]) must be a tuple", "not 'b'", "is (x,)"],
        ),
        ({"args": (per_rank([1, 2]),)}, TypeError, ["args", "per_rank(...) inside", "whole"]),
        # kwargs
        ({"kwargs": [1]}, TypeError, ["kwargs", "a mapping of names to values", "not [1]"]),
        ({"kwargs": {1: 2}}, TypeError, ["kwargs", "names of type str", "not 1"]),
        (
            {"kwargs": per_rank([{}] * 3)},
            ValueError,
            ["kwargs=per_rank([...])", "each of the 2 ranks", "not 3"],
        ),
        (
            {"kwargs": per_rank([{}, ()])},
            TypeError,
            ["item 1 of kwargs=per_rank", "a mapping", "()"],
        ),
        ({"kwargs": {"x": per_rank([1, 2])}}, TypeError, ["kwargs", "per_rank(...) inside"]),
        # name
        ({"name": ""}, ValueError, ["name", "1 to 64 printable characters without '/'", "not ''"]),
        ({"name": "  "}, ValueError, ["name", "printable", "not '  '"]),
        ({"name": "x" * 65}, ValueError, ["name", "1 to 64", "not 'xxx"]),
        ({"name": "a\nb"}, ValueError, ["name", "printable", r"not 'a\nb'"]),
        ({"name": "a\0b"}, ValueError, ["name", "printable", r"not 'a\x00b'"]),
        ({"name": "a/b"}, ValueError, ["name", "without '/'", "not 'a/b'"]),
        ({"name": 7}, TypeError, ["name", "a str of 1 to 64", "not 7"]),
        ({"name": None}, TypeError, ["name", "a str", "not None"]),
        # env
        ({"env": "A=1"}, TypeError, ["env", "a mapping, a list of mappings", "of type str"]),
        ({"env": {("A", "1")}}, TypeError, ["env", "a callable", "of type set"]),
        ({"env": [{}]}, ValueError, ["env", "one item for each of the 2 ranks", "not 1"]),
        (
            {"env": [{}, "A=1"]},
            TypeError,
            ["env for rank 1", "a mapping of str to str", "type str"],
        ),
        ({"env": per_rank([{}, {}])}, TypeError, ["env", "a list of mappings", "type per_rank"]),
        ({"env": {1: "a"}}, TypeError, ["env", "names of type str", "not 1"]),
        ({"env": {"A": 1}}, TypeError, ["env", "'A' a str", "of type int"]),
        ({"env": {"A": None}}, TypeError, ["env", "'A' a str", "of type NoneType"]),
        ({"env": [{}, {"A": b"1"}]}, TypeError, ["env for rank 1", "'A' a str", "of type bytes"]),
        ({"env": {"": "a"}}, ValueError, ["env", "''", "cannot be the name of a variable"]),
        ({"env": {"A=B": "a"}}, ValueError, ["env", "'A=B'", "cannot be the name"]),
        ({"env": {"A\0": "a"}}, ValueError, ["env", r"'A\x00'", "cannot be the name"]),
        ({"env": {"A": "a\0"}}, ValueError, ["env", "'A'", "an environment can hold"]),
        ({"env": {"A": "\ud800"}}, ValueError, ["env", "'A'", "an environment can hold"]),
        ({"env": {"RANK": "0"}}, ValueError, ["env must not set 'RANK'", "rankwise sets"]),
        ({"env": [{}, {"MASTER_PORT": "1"}]}, ValueError, ["env for rank 1", "'MASTER_PORT'"]),
        (
            {"env": {"CUDA_VISIBLE_DEVICES": "1"}, "devices": "isolated"},
            ValueError,
            ["env", "'CUDA_VISIBLE_DEVICES'", "devices='isolated' sets"],
        ),
        (
            {"env": {"ASCEND_RT_VISIBLE_DEVICES": "1"}, "devices": [0, 1]},
            ValueError,
            ["env", "'ASCEND_RT_VISIBLE_DEVICES'", "devices=(0, 1) sets"],
        ),
        (
            {"env": {"MKL_NUM_THREADS": "4"}, "threads": 4},
            ValueError,
            ["env", "'MKL_NUM_THREADS'", "threads=4 sets"],
        ),
        (
            {"env": [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"}]},
            ValueError,
            ["env", "one PYTHONHASHSEED", "'1' to rank 0", "'2' to rank 1"],
        ),
        (
            {"env": [{"PYTHONHASHSEED": "1"}, {}]},
            ValueError,
            ["one PYTHONHASHSEED", "'1' to rank 0", "None to rank 1"],
        ),
        ({"env": {"PYTHONHASHSEED": "abc"}}, ValueError, ["PYTHONHASHSEED", "'random'", "'abc'"]),
        (
            {"env": {"PYTHONHASHSEED": "4294967296"}},
            ValueError,
            ["0 to 4294967295", "'4294967296'"],
        ),
        # devices
        ({"devices": 0}, TypeError, ["devices", "'shared', 'isolated' or a list", "not 0"]),
        ({"devices": {0, 1}}, TypeError, ["devices", "a list of indices", "not {0, 1}"]),
        ({"devices": "all"}, ValueError, ["devices", "'shared', 'isolated'", "not 'all'"]),
        ({"devices": [0]}, ValueError, ["devices", "each of the 2 ranks", "not 1"]),
        (
            {"devices": [0, -1]},
            ValueError,
            ["devices[1]", "an index of at least 0 or a UUID", "-1"],
        ),
        ({"devices": [0, True]}, TypeError, ["devices[1]", "an index", "not True"]),
        ({"devices": [0, 1.0]}, TypeError, ["devices[1]", "an index", "not 1.0"]),
        ({"devices": ["", 1]}, ValueError, ["devices[0]", "a UUID", "not ''"]),
        ({"devices": ["a\0", 1]}, ValueError, ["devices[0]", "a UUID", r"not 'a\x00'"]),
        # threads
        ({"threads": 0}, ValueError, ["threads", "'auto', None or an int of at least 1", "not 0"]),
        ({"threads": True}, TypeError, ["threads", "an int of at least 1", "not True"]),
        ({"threads": 1.5}, TypeError, ["threads", "'auto'", "not 1.5"]),
        ({"threads": "4"}, ValueError, ["threads", "'auto'", "not '4'"]),
        # cpus
        ({"cpus": "all"}, ValueError, ["cpus", "'split'", "not 'all'"]),
        ({"cpus": 2}, TypeError, ["cpus", "None, 'split' or a list of lists", "not 2"]),
        ({"cpus": [[0]]}, ValueError, ["cpus", "one item for each of the 2 ranks", "not 1"]),
        ({"cpus": [[0], []]}, ValueError, ["cpus[1]", "one CPU's number or more", "not []"]),
        ({"cpus": [0, 1]}, ValueError, ["cpus[0]", "one CPU's number or more", "not 0"]),
        ({"cpus": [[0], [-1]]}, ValueError, ["a CPU in cpus[1]", "its number", "not -1"]),
        ({"cpus": [[0], "01"]}, ValueError, ["cpus[1]", "one CPU's number or more", "not '01'"]),
        # start_method, preload
        (
            {"start_method": "fork"},
            ValueError,
            ["start_method", "the driver is never forked", "'forkserver'", "preload"],
        ),
        (
            {"start_method": "exec"},
            ValueError,
            ["start_method", "'spawn' or 'forkserver'", "'exec'"],
        ),
        ({"start_method": None}, TypeError, ["start_method", "'spawn' or 'forkserver'", "None"]),
        ({"preload": "torch", **FORKSERVER}, TypeError, ["preload", "a sequence", "not 'torch'"]),
        ({"preload": {"torch"}, **FORKSERVER}, TypeError, ["preload", "a sequence", "{'torch'}"]),
        (
            {"preload": [math], **FORKSERVER},
            TypeError,
            ["preload", "module names", "module 'math'"],
        ),
        ({"preload": ["a-b"], **FORKSERVER}, ValueError, ["preload", "module names", "'a-b'"]),
        ({"preload": [".a"], **FORKSERVER}, ValueError, ["preload", "module names", "'.a'"]),
        ({"preload": [""], **FORKSERVER}, ValueError, ["preload", "module names", "''"]),
        (
            {"preload": ["torch"]},
            ValueError,
            ["preload=['torch']", "start_method='forkserver'", "not 'spawn'"],
        ),
        # start_timeout, logs, on_failure, spin, backend
        ({"start_timeout": 0}, ValueError, ["start_timeout", "a positive, finite number", "not 0"]),
        ({"start_timeout": -1.5}, ValueError, ["start_timeout", "seconds, or None", "not -1.5"]),
        ({"start_timeout": math.inf}, ValueError, ["start_timeout", "finite", "not inf"]),
        ({"start_timeout": math.nan}, ValueError, ["start_timeout", "finite", "not nan"]),
        ({"start_timeout": 10**400}, ValueError, ["start_timeout", "finite", "not 1000"]),
        ({"start_timeout": "30"}, TypeError, ["start_timeout", "number of seconds", "not '30'"]),
        ({"start_timeout": True}, TypeError, ["start_timeout", "number", "not True"]),
        ({"logs": "json"}, ValueError, ["logs", "'prefix', 'inherit' or 'off'", "not 'json'"]),
        ({"logs": None}, TypeError, ["logs", "'prefix', 'inherit' or 'off'", "not None"]),
        ({"on_failure": "exit"}, TypeError, ["on_failure", "a callable", "not 'exit'"]),
        ({"spin": -0.1}, ValueError, ["spin", "'auto' or a finite number", "not -0.1"]),
        ({"spin": math.inf}, ValueError, ["spin", "finite", "not inf"]),
        ({"spin": "fast"}, ValueError, ["spin", "'auto'", "not 'fast'"]),
        ({"spin": None}, TypeError, ["spin", "'auto'", "not None"]),
        ({"spin": False}, TypeError, ["spin", "'auto'", "not False"]),
        ({"backend": "thread"}, ValueError, ["backend", "'local' or 'inline'", "not 'thread'"]),
        ({"backend": 1}, TypeError, ["backend", "'local' or 'inline'", "not 1"]),
    ],
    ids=names,
)
def test_what_is_wrong_is_refused_in_one_sentence(
    arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        spec(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("argument", "value", "shown"),
    [
        ("env", {"TOKEN": "secret"}, "env=..."),
        ("env", {}, "env=..."),
        ("env", lambda info: {}, "env=..."),
        ("devices", "shared", "devices='shared'"),
        ("devices", [0, 1], "devices=(0, 1)"),
        ("threads", 2, "threads=2"),
        ("cpus", "split", "cpus='split'"),
        ("logs", "off", "logs='off'"),
        ("start_method", "forkserver", "start_method='forkserver'"),
        ("preload", ["torch"], "preload=('torch',)"),
    ],
)
def test_inline_ranks_are_threads_and_cannot_have(argument: str, value: object, shown: str) -> None:
    with pytest.raises(ValueError, match="inline") as caught:
        spec(backend="inline", **{argument: value})
    message = str(caught.value)
    assert message.startswith(f"{shown} cannot be had with backend='inline'")
    assert "threads of the driver" in message
    assert message.endswith(f"leave {argument} out")


@pytest.mark.parametrize(
    "env",
    [
        ["TOKEN=hush"],
        "TOKEN=hush",
        [("TOKEN", "hush")],
        {"TOKEN": ["hush"]},
        {"TOKEN": "hush\0"},
        {"RANK": "hush"},
    ],
    ids=repr,
)
def test_no_error_shows_the_value_of_a_variable(env: object) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        spec(1, env=env)
    assert "hush" not in str(caught.value)


def test_a_long_value_is_cut_short_and_stays_on_one_line() -> None:
    class Matrix:
        def __repr__(self) -> str:
            return "\n".join(["[0, 0, 0, 0]"] * 1000)

    with pytest.raises(TypeError) as caught:
        spec(args=Matrix())
    assert "not [0, 0, 0, 0] [0, 0, 0, 0] " in str(caught.value)
    assert "...; one argument" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_containers_may_be_changed_once_they_are_checked() -> None:
    args: list[object] = ["a"]
    kwargs: dict[str, object] = {"x": 1}
    env = {"A": "1"}
    devices: list[object] = [0, 1]
    checked = spec(args=args, kwargs=kwargs, env=env, devices=devices)
    args.append("b")
    kwargs["y"] = env["B"] = "2"
    devices.clear()
    assert checked.args[0] == ("a",)
    assert checked.kwargs[0] == {"x": 1}
    assert checked.env == ({"A": "1"},) * 2
    assert checked.devices == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "shared"),
    [
        ({"args": ("a",), "kwargs": {"x": 1}}, True),
        ({"args": per_rank([("a",), ("a",)])}, False),
        ({"kwargs": per_rank([{}, {}])}, False),
    ],
)
def test_shared_args_tells_whether_one_serialisation_does(
    arguments: dict[str, Any], shared: bool
) -> None:
    assert spec(**arguments).shared_args is shared


def test_an_env_function_is_kept_for_later() -> None:
    def env(info: RankInfo) -> dict[str, str]:
        raise AssertionError("called too early")

    assert spec(env=env).env is env


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda: [("a",), ("b",)], (("a",), ("b",))),
        (lambda: (i for i in range(3)), (0, 1, 2)),
        (lambda: {"x": 1}.values(), (1,)),
        (list, ()),
    ],
)
def test_per_rank_holds_a_tuple(make: Callable[[], Any], values: tuple[object, ...]) -> None:
    assert per_rank(make()).values == values


def test_per_rank_shows_its_items() -> None:
    assert repr(per_rank((("a",), ("b",)))) == "per_rank([('a',), ('b',)])"


@pytest.mark.parametrize(
    "value", ["ab", b"ab", bytearray(b"ab"), {"a": 1}, {1, 2}, 3, None], ids=repr
)
def test_per_rank_refuses_what_has_no_order_or_no_items(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        per_rank(value)
    assert str(caught.value) == f"per_rank takes a sequence, one item a rank, not {value!r}"
