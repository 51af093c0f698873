"""What a call runs: by name, by reference, by value."""

from __future__ import annotations

import functools
import operator

import pytest
from contract_worker import Base, Loud, Worker

from rankwise import RemoteError


def test_a_name_is_looked_up_on_the_worker(group):
    assert group.call("get_rank") == [0, 1, 2]


def test_a_reference_runs_the_override_of_a_subclass(make):
    group = make(Loud)
    assert group.call(Worker.get_rank) == [0, -1]
    assert group.call(Loud.get_rank) == [0, -1]
    assert group.call("get_rank") == [0, -1]


def test_a_reference_to_an_inherited_method_works(make):
    assert make(Base, 1).call(Base.get_rank) == [0]


def test_a_class_inside_a_function_has_methods_by_reference(make):
    class Local(Worker):
        def greet(self, name="you"):
            return f"hello {name} from {self.rank}"

        class Deep:
            @staticmethod
            def greet():
                return "never"

    group = make(Local)
    assert group.call(Local.greet) == ["hello you from 0", "hello you from 1"]
    assert group.call(Local.get_rank) == [0, 1]


def test_a_method_of_a_nested_class_goes_by_its_name(group):
    assert group[1].call(Worker.Inner.get_rank) == 1, "its qualname ends in Class.name"


def test_a_nested_class_can_be_the_worker(make):
    class Outer:
        class Inner(Worker):
            def twice(self):
                return 2 * self.rank

    assert make(Outer.Inner).call(Outer.Inner.twice) == [0, 2]


def test_a_static_method_and_a_class_method_by_reference(make):
    group = make(Loud)
    assert group.call(Worker.double, 4) == [8, 8]
    assert group.call("double", 4) == [8, 8]
    assert group.call(Worker.class_name) == ["Loud", "Loud"]
    assert group.call("class_name") == ["Loud", "Loud"]


def test_a_private_method_by_reference(group):
    assert group.call(Worker.secret, "word") == [f"word of {rank}" for rank in range(3)]
    assert group[0].call("_Worker__secret", "word") == "word of 0"
    with pytest.raises(AttributeError, match="__secret"):
        group.call("__secret", "word")


def test_a_private_method_of_a_private_class(make):
    class _Hidden:
        def __inner(self):
            return "found"

        inner = __inner

    assert make(_Hidden, 1)[0].call(_Hidden.inner) == "found"


def helper(worker, factor=1):
    return worker.rank * factor


class Callable:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, worker):
        return worker.rank * self.factor


def test_any_other_callable_is_called_with_the_worker_first(group):
    offset = 7
    assert group.call(helper) == [0, 1, 2]
    assert group.call(helper, 3) == [0, 3, 6]
    assert group.call(helper, factor=3) == [0, 3, 6]
    assert group.call(lambda worker, x: worker.rank + x + offset, 1) == [8, 9, 10]
    assert group.call(functools.partial(helper, factor=5)) == [0, 5, 10]
    assert group.call(functools.partial(helper), 5) == [0, 5, 10]
    assert group.call(Callable(4)) == [0, 4, 8]
    assert group.call(operator.attrgetter("rank")) == [0, 1, 2]
    assert group.call(operator.methodcaller("add", 1, right=0)) == [1, 2, 3]
    assert group.call(isinstance, Worker) == [True] * 3


def test_a_function_inside_a_function_travels_by_value(group):
    calls = []

    def count(worker, word):
        calls.append(word)
        return len(calls)

    assert group.call(count, "x") == [1] * 3
    assert calls == []


def test_a_method_bound_to_an_object_of_the_driver_is_a_type_error(group):
    class Mine(Worker):
        def __init__(self):
            pass

    with pytest.raises(TypeError) as caught:
        group.call(Mine().get_rank)
    assert str(caught.value).startswith("method is bound to an object of the driver (a ")
    assert str(caught.value).endswith("Mine), which no worker has: pass Mine.get_rank or its name")
    with pytest.raises(TypeError, match="method is bound to an object of the driver"):
        group.submit([].append, 1)
    with pytest.raises(TypeError, match="method is bound to an object of the driver"):
        group.submit_each(Mine().get_rank)
    with pytest.raises(TypeError, match="method is bound to an object of the driver"):
        group.scatter(Mine().get_rank, [1, 2, 3])
    with pytest.raises(TypeError, match="method is bound to an object of the driver"):
        group.collective_rpc(Mine().get_rank)


@pytest.mark.parametrize("method", [None, 5, b"get_rank", ["get_rank"], object()])
def test_what_is_neither_name_nor_callable_is_a_type_error(group, method):
    for verb in (group.call, group.submit, group.submit_each, group[0].call, group.collective_rpc):
        with pytest.raises(TypeError, match="method must be a name or a callable, not"):
            verb(method)
    with pytest.raises(TypeError, match="method must be a name or a callable, not"):
        group.scatter(method, [1, 2, 3])


def test_an_empty_name_is_an_error(group):
    with pytest.raises((TypeError, ValueError), match="method must be a name or a callable, not"):
        group.call("")


def test_a_method_that_does_not_exist_is_an_attribute_error_of_the_worker(group):
    with pytest.raises(AttributeError, match="'Worker' object has no attribute 'forwrad'") as e:
        group.call("forwrad", 1)
    assert type(e.value.__cause__) is RemoteError
    assert sorted(e.value.failures) == [0, 1, 2]
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_an_attribute_that_is_no_method_is_a_type_error_of_the_worker(group):
    with pytest.raises(TypeError, match="'int' object is not callable"):
        group[0].call("rank")
    assert group.call(Worker.get_rank) == [0, 1, 2]


def test_wrong_arguments_are_a_type_error_of_the_worker(group):
    with pytest.raises(TypeError, match=r"add\(\) missing 1 required positional argument: 'left'"):
        group.call(Worker.add)
    assert group.call(Worker.get_rank) == [0, 1, 2]
