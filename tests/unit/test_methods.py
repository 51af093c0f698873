"""What is sent for the `method` argument of a call, and how it is called in messages."""

from __future__ import annotations

import functools
import operator

import pytest

from rankwise._methods import method_name, resolve_method


class Shard:
    def forward(self):
        pass

    @staticmethod
    def static():
        pass

    @classmethod
    def made(cls):
        pass

    def __secret(self):
        pass

    secret = __secret

    def __dunder__(self):
        pass

    anonymous = lambda self: None  # noqa: E731

    class Inner:
        def forward(self):
            pass

    @functools.lru_cache  # noqa: B019
    def cached(self):
        pass


class _Private:
    def __secret(self):
        pass

    secret = __secret


class Child(Shard):
    pass


def local_class():
    class Local:
        def forward(self):
            def inner():
                pass

            return inner

    return Local


def helper(worker):
    pass


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("forward", "forward"),
        (Shard.forward, "forward"),
        (Child.forward, "forward"),
        (Shard.static, "static"),
        (Shard.made, "made"),
        (Child.made, "made"),
        (Shard.secret, "_Shard__secret"),
        (_Private.secret, "_Private__secret"),
        (Shard.__dunder__, "__dunder__"),
        (Shard.Inner.forward, "forward"),
        (Shard.cached, "cached"),
        (local_class().forward, "forward"),
        (list.append, "append"),
    ],
)
def test_a_function_of_a_class_is_sent_as_its_name(method, name):
    shown, sent = resolve_method(method)
    assert sent == name
    assert shown.rpartition(".")[2] == name


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (helper, "helper"),
        (lambda worker: None, "<lambda>"),
        (Shard.anonymous, "Shard.<lambda>"),
        (functools.partial(helper, 1), "partial(helper)"),
        (functools.partial(functools.partial(Shard.forward)), "partial(Shard.forward)"),
        (local_class().forward(None), "inner"),
        (local_class, "local_class"),
        (Shard, "Shard"),
        (Shard.Inner, "Shard.Inner"),
        (local_class(), "Local"),
        (len, "len"),
        (operator.attrgetter("rank"), "attrgetter"),
    ],
)
def test_anything_else_is_sent_itself(method, name):
    assert resolve_method(method) == (name, method)
    assert method_name(method) == name


def test_the_name_is_of_one_line():
    shown, _ = resolve_method(functools.partial(helper, "x" * 5000))
    assert shown == "partial(helper)"


@pytest.mark.parametrize("method", [None, 0, 3.5, b"forward", [], {}, ("forward",), object()])
def test_what_cannot_be_called_is_a_type_error(method):
    with pytest.raises(TypeError, match=r"^method must be a name or a callable, not "):
        resolve_method(method)


def test_an_empty_name_is_refused():
    with pytest.raises((TypeError, ValueError), match="not an empty string"):
        resolve_method("")


@pytest.mark.parametrize(
    ("method", "owner", "hint"),
    [
        (Shard().forward, "a Shard", "pass Shard.forward or its name"),
        (Shard.Inner().forward, "a Shard.Inner", "forward or its name"),
        ([].append, "a list", "pass list.append or its name"),
        ("x".upper, "a str", "pass str.upper or its name"),
    ],
)
def test_a_method_of_an_object_of_the_driver_is_refused(method, owner, hint):
    with pytest.raises(TypeError) as caught:
        resolve_method(method)
    assert f"method is bound to an object of the driver ({owner}), which no worker has" in str(
        caught.value
    )
    assert hint in str(caught.value)
