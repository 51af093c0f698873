"""wire.codec: what arrives is what was sent, and what cannot be sent is named."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
import functools
import io
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import rankwise
from rankwise.errors import SerializationError
from rankwise.wire import codec
from rankwise.wire.codec import dumps, encode_call, encode_result, loads, module_by_value

SOURCE = str(Path(next(iter(rankwise.__path__))).parent)
LOCK = threading.Lock()


def there_and_back(obj):
    return loads(dumps(obj))


def python(*args, stdin=None, cwd=None):
    done = subprocess.run(
        [sys.executable, *args],
        input=stdin,
        text=True,
        capture_output=True,
        timeout=60,
        cwd=cwd,
        env={"PYTHONPATH": SOURCE, "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fileless():
    """A module as a notebook or `exec` makes one, known to `sys.modules`."""
    module = types.ModuleType("made_by_hand")
    code = """
        import enum
        OFFSET = 10
        class Point:
            scale = 2
            def __init__(self, x): self.x = x
            def moved(self): return self.x * self.scale + OFFSET
        class Color(enum.Enum):
            RED = 1
        def add(x): return x + OFFSET
    """
    sys.modules[module.__name__] = module
    exec(textwrap.dedent(code), vars(module))
    yield module
    del sys.modules[module.__name__]


# ---- what travels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "args", "kwargs"),
    [
        ("forward", (), {}),
        ("forward", (1.0, "abc"), {}),
        ("forward", (None, b"x", True, 2**80, [1, (2,)], {"a": [1]}), {"k": (1, 2), "d": {"e": 1}}),
        ("forward", (list(range(100)), {"a": {"b": {"c": {1, 2}}}}), {"x": bytearray(b"y")}),
        ("forward", (collections.Counter("aab"), range(3), 1j, slice(1, 2)), {"e": ValueError(1)}),
        (len, ([1],), {}),
    ],
)
def test_a_call_arrives_as_it_was_made(method, args, kwargs):
    arrived = loads(encode_call(method, args, kwargs))
    assert repr(arrived) == repr((method, args, kwargs))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_loads_takes_any_buffer(kind):
    assert loads(kind(dumps([1, "a"]))) == [1, "a"]


@pytest.mark.parametrize(
    "value", [None, 1, "x", [1], {"a": (1,)}, {1, 2}, range(5), b"x" * 300_000]
)
def test_a_result_arrives(value):
    assert loads(encode_result(value)) == value


def test_one_object_twice_arrives_as_one_object():
    for shared in ([1], Plain(1), np.ones(3), lambda: 0):
        _, (one, [two]), kwargs = loads(encode_call("m", (shared, [shared]), {"k": shared}))
        assert one is two is kwargs["k"]


def test_an_object_that_holds_itself_arrives():
    ring = [1]
    ring.append(ring)
    arrived = there_and_back(ring)
    assert arrived[1] is arrived
    node = Plain(None)
    node.x = [lambda: node]
    arrived = there_and_back(node)
    assert arrived.x[0]() is arrived


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_an_array_arrives_writable_and_private(read_only, by_value):
    for sent in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array(3.0)):
        sent.flags.writeable = not read_only
        arrived, _ = there_and_back((sent, (lambda: 0) if by_value else None))
        assert arrived.flags.writeable
        assert arrived.flags.f_contiguous == sent.flags.f_contiguous
        arrived += 1
        assert (arrived == sent + 1).all()


def test_a_small_view_does_not_travel_with_its_base():
    assert len(dumps(np.ones(1 << 20)[10:20])) < 500


def test_a_broadcast_array_arrives_writable():
    arrived = there_and_back(np.broadcast_to(np.arange(3), (2, 3)))
    arrived[0, 0] = 7
    assert arrived.tolist() == [[7, 1, 2], [0, 1, 2]]


class Plain:
    def __init__(self, x):
        self.x = x

    def __private(self):
        return self.x

    def private(self):
        return self.__private

    def public(self):
        return self.x


class Words(list):
    pass


def test_subclasses_of_builtins_keep_their_class_and_attributes():
    words = Words(["a"])
    words.language = "en"
    arrived = there_and_back(words)
    assert type(arrived) is Words and arrived == ["a"] and arrived.language == "en"


def test_bound_methods_arrive_also_where_their_name_leads_nowhere():
    plain = Plain(3)
    assert there_and_back(plain.public)() == 3
    assert there_and_back(plain.private())() == 3
    assert there_and_back(types.MethodType(lambda self: self.x + 1, plain))() == 4


def test_lambdas_closures_and_partials_carry_what_they_name():
    add = functools.partial(lambda a, b: a + b + len(LIMITS), 1)
    assert there_and_back(add)(2) == 5
    assert there_and_back(counter(5))() == 6
    method, _, _ = loads(encode_call(lambda worker: worker.x, (), {}))
    assert method(Plain(8)) == 8


LIMITS = (1, 2)


def counter(start):
    def step():
        return start + 1

    return step


def test_functions_that_can_be_imported_travel_as_their_name():
    assert there_and_back(counter) is counter
    assert there_and_back(Plain) is Plain
    assert there_and_back(textwrap.dedent) is textwrap.dedent
    assert len(dumps(Plain(1))) < 150


def test_a_local_class_comes_back_as_itself():
    class Local:
        count = 0

    arrived = there_and_back(Local())
    assert type(arrived) is Local


def test_modules_travel_by_name_or_by_value(fileless):
    assert there_and_back([np.linalg, time]) == [np.linalg, time]
    fileless.myself = fileless
    arrived = there_and_back(fileless)
    assert arrived is not fileless and arrived.myself is arrived and arrived.add(1) == 11
    unknown = types.ModuleType("unknown")
    unknown.x = 3
    assert there_and_back(unknown).x == 3


def test_a_module_without_a_file_travels_by_value(fileless):
    data = dumps([fileless.Point(3), fileless.add, fileless.Color.RED])
    script = f"""
        from rankwise.wire.codec import loads
        point, add, red = loads({data!r})
        assert point.moved() == 16 and add(1) == 11 and red.value == 1 and red is type(red)(1)
    """
    python("-c", textwrap.dedent(script))
    point, add, red = loads(data)
    assert type(point) is fileless.Point and red is fileless.Color.RED and add is not fileless.add


def test_typing_names_of_such_a_module_travel(fileless):
    code = """
        from typing import Callable, Generic, NewType, ParamSpec, TypeVar, TypeVarTuple
        P = ParamSpec("P"); T = TypeVar("T"); Ts = TypeVarTuple("Ts"); Id = NewType("Id", int)
        class Box(Generic[T]):
            def __init__(self, x: T) -> None: self.x = x
        def traced(function: Callable[P, T]) -> Callable[P, T]:
            def inner(*args: P.args, **kwargs: P.kwargs) -> T: return function(*args, **kwargs)
            return inner
        @traced
        def f(x: Id, *rest: *Ts) -> Box[int]: return Box(x)
    """
    exec(textwrap.dedent(code), vars(fileless))
    data = dumps(fileless.f)
    script = f"""
        from rankwise.wire.codec import dumps, loads
        f = loads({data!r})
        assert f(3).x == 3
        assert loads(dumps(f))(4).x == 4
    """
    python("-c", textwrap.dedent(script))


def test_cached_functions_and_properties_of_such_a_module_travel(fileless):
    code = """
        import functools
        @functools.lru_cache(maxsize=50)
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        class Lazy:
            @functools.cached_property
            def x(self): return fib(30)
    """
    exec(textwrap.dedent(code), vars(fileless))
    script = f"""
        from rankwise.wire.codec import loads
        fib = loads({dumps(fileless.fib)!r})
        assert fib(40) == 102334155 and fib.cache_parameters()["maxsize"] == 50
        lazy = loads({dumps(fileless.Lazy())!r})
        assert lazy.x == 832040 and vars(lazy)["x"] == lazy.x
    """
    python("-c", textwrap.dedent(script))
    assert there_and_back(cached_here) is cached_here
    assert there_and_back([cached_here, lambda: 0])[0] is cached_here


@functools.cache
def cached_here():
    return 1


def test_what_decides_between_name_and_value(fileless, tmp_path, monkeypatch):
    for name in ("__main__", "__mp_main__", "made_by_hand", "never_imported"):
        assert module_by_value(name)
    for name in ("sys", "builtins", "_frozen_importlib", "numpy", "zipimport", "math", __name__):
        assert not module_by_value(name)
    (tmp_path / "a_namespace" / "inner").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    importlib_import("a_namespace.inner")
    assert not module_by_value("a_namespace.inner")
    # What an extension module makes below itself has no file, and comes with that module.
    monkeypatch.setitem(sys.modules, "numpy.made_by_c", types.ModuleType("numpy.made_by_c"))
    assert not module_by_value("numpy.made_by_c")


def importlib_import(name):
    __import__(name)
    return sys.modules[name]


def test_the_registry_of_cloudpickle_is_read_at_each_call_and_left_alone():
    import cloudpickle

    before = cloudpickle.list_registry_pickle_by_value()
    assert b"codec_test_package" not in dumps(fractions().Fraction(1))
    cloudpickle.register_pickle_by_value(fractions())
    try:
        assert module_by_value("fractions") and module_by_value("fractions.below")
        assert b"_make_skeleton_class" in dumps(fractions().Fraction(1))
    finally:
        cloudpickle.unregister_pickle_by_value(fractions())
    assert b"_make_skeleton_class" not in dumps(fractions().Fraction(1))
    assert cloudpickle.list_registry_pickle_by_value() == before


def fractions():
    return importlib_import("fractions")


# ---- exceptions --------------------------------------------------------------------------------


class TwoArguments(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code = code


class Prefixed(OSError):
    def __init__(self, text, number=5):
        super().__init__(number, f"while reading: {text}")


class Garbled(UnicodeDecodeError):
    def __init__(self, data):
        super().__init__("ascii", data, 0, 1, "garbled")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int
    text: str


class Group(ExceptionGroup):
    def __new__(cls, *found):
        return super().__new__(cls, "found", found)


class OwnWay(Exception):
    def __init__(self, *, code):
        self.code = code

    def __reduce__(self):
        return functools.partial(OwnWay, code=self.code), ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: TwoArguments(3, "x"),
        lambda: Prefixed("file"),
        lambda: Garbled(b"\xff"),
        lambda: Frozen(1, "x"),
        lambda: Group(ValueError(1), KeyError("a")),
        lambda: OwnWay(code=4),
        lambda: ImportError("no", name="n", path="p"),
        lambda: KeyError("k"),
        lambda: SystemExit(3),
        lambda: StopIteration(5),
        lambda: FileNotFoundError(2, "gone", "/x"),
        lambda: subprocess.CalledProcessError(1, ["ls"]),
    ],
    ids=lambda make: type(make()).__name__,
)
@pytest.mark.parametrize("by_value", [False, True])
def test_an_exception_arrives_with_its_type_args_and_fields(make, by_value):
    error = make()
    vars(error)["__notes__"] = ["a note"]
    arrived, _ = there_and_back((error, (lambda: 0) if by_value else None))
    assert type(arrived) is type(error)
    assert repr(arrived.args) == repr(error.args) and str(arrived) == str(error)
    if not isinstance(error, OwnWay):
        assert vars(arrived) == vars(error)
    for field in ("errno", "strerror", "filename", "object", "reason", "code", "value", "name"):
        assert getattr(arrived, field, None) == getattr(error, field, None)


# ---- what comes home ---------------------------------------------------------------------------

WORKER = """
import sys
from rankwise.wire.codec import encode_result, loads

def frame(data):
    sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
    sys.stdout.buffer.flush()

kept = {}
while header := sys.stdin.buffer.read(8):
    method, args, kwargs = loads(sys.stdin.buffer.read(int.from_bytes(header, "little")))
    try:
        value = method(kept, *args, **kwargs)
    except Exception as error:
        value = error
    frame(encode_result(value))
"""

DRIVER = """
import dataclasses, enum, subprocess, sys
from rankwise.wire.codec import encode_call, loads

worker = subprocess.Popen(
    [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)

def call(method, *args, **kwargs):
    data = encode_call(method, args, kwargs)
    worker.stdin.write(len(data).to_bytes(8, "little") + data)
    worker.stdin.flush()
    return loads(worker.stdout.read(int.from_bytes(worker.stdout.read(8), "little")))

SEEN = []

@dataclasses.dataclass
class Config:
    width: int
    layers: list
    made = 0

    def seen(self):
        SEEN.append(self.width)

class Refused(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code = code

class Mode(enum.Enum):
    FAST = 1
    SLOW = 2

    def other(self):
        return Mode.SLOW if self is Mode.FAST else Mode.FAST

class Base: pass
class Derived(Base):
    __slots__ = ("x",)

def work(kept, config, mode):
    Config.made += 1
    kept.setdefault("classes", set()).update((type(config), type(mode), Config, Mode))
    return Config(config.width * 2, [mode.other(), type(config).made, len(kept["classes"])])

def refuse(kept):
    raise Refused(4, "no")

def derive(kept):
    derived = Derived()
    derived.x = [Base(), Derived, Mode]
    return derived

def attributes():  # but for what copyreg notes on any class that is pickled
    return {name: value for name, value in vars(Config).items() if name != "__slotnames__"}

before = attributes()
for count in (1, 2, 3):
    # One class in the worker however often it is sent, and its attributes stay the worker's.
    found = call(work, Config(count, []), Mode.FAST)
    assert type(found) is Config and isinstance(found, Config), type(found)
    assert found == Config(2 * count, [Mode.SLOW, count, 2]), found
    assert found.layers[0] is Mode.SLOW
found.seen()
assert SEEN == [6], "its methods are still the driver's own, with the driver's globals"
assert attributes() == before and Config.made == 0
error = call(refuse)
assert type(error) is Refused and error.args == ("4: no",) and error.code == 4, error
derived = call(derive)
assert type(derived) is Derived and type(derived.x[0]) is Base and derived.x[1:] == [Derived, Mode]

def make(kept):
    class Local:
        x = 5
    kept["local"] = Local
    return Local()

local = call(make)          # a class of the worker's own, here and back again
assert local.x == 5
assert call(lambda kept, sent: type(sent) is kept["local"], local)

Old = Config
class Config(Old): pass     # defined anew: another class
assert type(call(lambda kept, sent: sent, Config(1, []))) is Config
assert type(call(lambda kept, sent: sent, Old(1, []))) is Old
worker.stdin.close()
assert worker.wait(20) == 0
print("ok")
"""


@pytest.mark.parametrize("how", ["script", "-c", "stdin"])
def test_classes_of_the_main_module_come_home_as_themselves(how, tmp_path):
    script = f"WORKER = {WORKER!r}\n{DRIVER}"
    if how == "script":
        (tmp_path / "driver.py").write_text(script)
        out = python("driver.py", cwd=tmp_path)
    elif how == "-c":
        out = python("-c", script)
    else:
        out = python("-", stdin=script)
    assert out == "ok\n"


def test_classes_of_the_main_module_of_a_spawned_driver_travel(tmp_path):
    """In a process of multiprocessing's own the user's main module is `__mp_main__`."""
    script = """
import multiprocessing, subprocess, sys
class Config:
    x = 3
def child():
    from rankwise.wire.codec import dumps, loads
    assert Config.__module__ == "__mp_main__"
    data = dumps([Config(), child, Config])
    code = f"from rankwise.wire.codec import loads; assert loads({data!r})[0].x == 3"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert type(loads(data)[0]) is Config
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    process = multiprocessing.Process(target=child)
    process.start(); process.join()
    sys.exit(process.exitcode)
"""
    (tmp_path / "main.py").write_text(script)
    python("main.py", cwd=tmp_path)


def test_threads_that_meet_a_new_class_together_all_get_it_whole():
    class Local:
        x = 1

    data = dumps([Local() for _ in range(3)]).replace(tracker_id(Local), b"0" * 32)
    gate = threading.Barrier(8)
    found = []

    def load():
        gate.wait()
        found.append([value.x for value in loads(data)])

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1, 1, 1]] * 8


def tracker_id(cls):
    from cloudpickle import cloudpickle

    return cloudpickle._get_or_create_tracker_id(cls).encode()


def test_many_threads_at_once():
    class Local:
        def __init__(self, x):
            self.x = x

    failed = []

    def work(number):
        for turn in range(200):
            sent = [number, {"turn": turn, "a": np.full(3, turn)}, Local(number)]
            _, (_, items, local), _ = loads(encode_call("m", tuple(sent), {}))
            if items["turn"] != turn or type(local) is not Local or local.x != number:
                failed.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# ---- what does not travel ----------------------------------------------------------------------


class Holder:
    def __init__(self, **fields):
        vars(self).update(fields)


@dataclasses.dataclass
class Data:
    a: int
    b: object


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    a: int
    b: object


class Private:
    __slots__ = ("__lock",)

    def __init__(self):
        self.__lock = LOCK


class Refuses:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


class RefusesState:
    def __getstate__(self):
        raise ValueError("not this one")


class OtherState:
    def __getstate__(self):
        return {"handle": LOCK}


class NoReduce:
    def __reduce__(self):
        return 5


class WithoutEnd:
    def __reduce__(self):
        return self.__reduce__()


Pair = collections.namedtuple("Pair", "left right")


def closure_over(lock):
    return lambda: lock


def family():
    """Parents and children that know each other; the lock hangs on the parent, not on the child."""
    parent = Holder(child=Holder())
    parent.child.parent = parent
    parent.lock = LOCK
    return parent


def local_class_with_lock():
    class Local:
        guard = LOCK

    return Local


@pytest.mark.parametrize(
    ("make", "path", "type_name"),
    [
        (lambda: LOCK, "args[0]", "_thread.lock"),
        (lambda: {"cfg": Holder(lock=LOCK)}, "args[0]['cfg'].lock", "_thread.lock"),
        (
            lambda: [0, 1, 2, Holder(items=[0, 1, LOCK])],
            "args[0][3].items[2]",
            "_thread.lock",
        ),
        (lambda: (x for x in "ab"), "args[0]", "generator"),
        (lambda: Data(1, LOCK), "args[0].b", "_thread.lock"),
        (lambda: Slotted(1, [LOCK]), "args[0].b[0]", "_thread.lock"),
        (lambda: Private(), "args[0]._Private__lock", "_thread.lock"),
        (lambda: Pair(1, LOCK), "args[0].right", "_thread.lock"),
        (lambda: {1: {LOCK: 2}}, "list(args[0][1])[0]", "_thread.lock"),
        (lambda: {Pair(1, 2): LOCK}, "list(args[0].values())[0]", "_thread.lock"),
        (lambda: {LOCK}, "list(args[0])[0]", "_thread.lock"),
        (lambda: collections.deque([1, LOCK]), "args[0][1]", "_thread.lock"),
        (lambda: collections.OrderedDict(a=1, b=LOCK), "args[0]['b']", "_thread.lock"),
        (lambda: Words([1, LOCK]), "args[0][1]", "_thread.lock"),
        (lambda: np.array([1, LOCK]), "args[0].flat[1]", "_thread.lock"),
        (lambda: closure_over(LOCK), "args[0].__closure__['lock']", "_thread.lock"),
        (lambda: lambda: LOCK, "args[0].__globals__['LOCK']", "_thread.lock"),
        (lambda: lambda x=LOCK: x, "args[0].__defaults__[0]", "_thread.lock"),
        (lambda: functools.partial(print, 1, LOCK), "args[0].args[1]", "_thread.lock"),
        (lambda: functools.partial(print, k=[LOCK]), "args[0].keywords['k'][0]", "_thread.lock"),
        (lambda: Holder(f=LOCK).__init__, "args[0].__self__.f", "_thread.lock"),
        (lambda: ValueError("x", LOCK), "args[0].args[1]", "_thread.lock"),
        (lambda: [local_class_with_lock()()], "type(args[0][0]).guard", "_thread.lock"),
        (lambda: enum.Enum("Locks", {"A": LOCK}), "args[0].A.value", "_thread.lock"),
        (lambda: [Refuses(ValueError("no"))], "args[0][0]", f"{__name__}.Refuses"),
        (lambda: [RefusesState()], "args[0][0]", f"{__name__}.RefusesState"),
        (lambda: OtherState(), "args[0].__reduce_ex__(5)[2]['handle']", "_thread.lock"),
        (lambda: [NoReduce()], "args[0][0]", f"{__name__}.NoReduce"),
        (lambda: [WithoutEnd()], "args[0][0]", f"{__name__}.WithoutEnd"),
        (family, "args[0].lock", "_thread.lock"),
        (lambda: open(__file__), "args[0]", "_io.TextIOWrapper"),  # noqa: SIM115
        (lambda: asyncio.sleep(0), "args[0]", "coroutine"),
    ],
)
def test_the_culprit_is_named(make, path, type_name):
    sent = make()
    with pytest.raises(SerializationError) as caught:
        encode_call("forward", (sent,), {})
    assert caught.value.path == path
    text = str(caught.value)
    assert text.startswith(f"{path} cannot be pickled: its type is {type_name} (")
    assert str(caught.value.__cause__) and type(caught.value.__cause__).__name__ in text
    with pytest.raises(SerializationError) as caught:
        encode_result([sent])
    assert caught.value.path == path.replace("args[0]", "result[0]")
    for close in ("close", "__del__"):
        getattr(sent, close, lambda: None)()


def test_the_culprit_is_named_in_kwargs_and_in_the_method():
    with pytest.raises(SerializationError) as caught:
        encode_call("m", (1, [2]), {"y": 1, "x": [0, 1, 2, Holder(items=[LOCK])]})
    assert caught.value.path == "kwargs['x'][3].items[0]"
    with pytest.raises(SerializationError) as caught:
        encode_call(closure_over(LOCK), (), {})
    assert caught.value.path == "method.__closure__['lock']"


def test_the_message_says_what_where_why_and_what_to_do():
    with pytest.raises(SerializationError) as caught:
        encode_call("forward", ({"cfg": Holder(lock=LOCK)},), {})
    assert str(caught.value) == (
        "args[0]['cfg'].lock cannot be pickled: its type is _thread.lock (TypeError: cannot pickle "
        "'_thread.lock' object). Make it in the worker, or leave it out of what its owner pickles "
        "(__getstate__)."
    )
    assert isinstance(caught.value, TypeError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.path == caught.value.path


def test_each_kind_of_failure_in_user_code_is_a_serialization_error():
    for error in (ValueError("x"), AttributeError("x"), pickle.PicklingError("x"), StopIteration()):
        with pytest.raises(SerializationError) as caught:
            encode_call("m", (Refuses(error),), {})
        assert caught.value.path == "args[0]"
        assert caught.value.__cause__ is error
        encode_call("m", (Plain(1),), {})  # and the next call works


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError("x")], ids=repr)
def test_what_is_no_failure_of_the_pickling_passes_through(error):
    for encode in (lambda value: encode_call("m", (value,), {}), encode_result):
        with pytest.raises(type(error)) as caught:
            encode(Refuses(error))
        assert caught.value is error


def test_an_interrupt_in_the_search_passes_through():
    class Once:
        def __reduce__(self):
            raise errors.pop(0)

    errors = [ValueError("first"), KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        encode_result([Once()])


@pytest.mark.parametrize("at", range(1, 7))
def test_an_alarm_passes_through_wherever_it_strikes(at):
    class Alarming:
        tries = 0

        def __reduce__(self):
            type(self).tries += 1
            if self.tries == at:
                signal.raise_signal(signal.SIGALRM)
            raise ValueError("never pickled")

    def strike(number, frame):
        raise TimeoutError("struck")

    before = signal.signal(signal.SIGALRM, strike)
    try:
        with pytest.raises(TimeoutError, match="struck"):
            for _ in range(3):
                with contextlib.suppress(SerializationError):
                    encode_call("m", ([Alarming()],), {})
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_failure_that_does_not_come_again_still_has_its_reason():
    class Flaky:
        tries = 0

        def __reduce__(self):
            type(self).tries += 1
            if self.tries == 1:
                raise ValueError("only once")
            return int, ()

    with pytest.raises(SerializationError, match=r"the result cannot be pickled.*only once") as e:
        encode_result([Flaky()])
    assert e.value.path == ""


def deep_list(depth):
    nested = []
    for _ in range(depth):
        nested = [nested]
    return nested


def deep_dict(depth):
    nested = {}
    for _ in range(depth):
        nested = {"a": nested}
    return nested


def deep_objects(depth):
    nested = None
    for _ in range(depth):
        nested = Holder(next=nested)
    return nested


def deep_tuple_of_lambdas(depth):
    nested = ()
    for _ in range(depth):
        nested = (nested, lambda: 0)
    return nested


@pytest.mark.parametrize("where", ["main thread", "other thread"])
@pytest.mark.parametrize("make", [deep_list, deep_dict, deep_objects, deep_tuple_of_lambdas])
def test_what_is_nested_too_deeply_is_an_error_and_no_crash(make, where):
    def work():
        with pytest.raises(SerializationError, match="nested too deeply") as caught:
            encode_call("m", (1, make(100_000)), {})
        found.append(caught.value.path)

    found = []
    if where == "main thread":
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == ["args[1]"]


def test_the_search_gives_up_in_time(monkeypatch):
    from rankwise.wire import culprit

    wide = [[Holder(x=number) for number in range(100)] for _ in range(500)] + [LOCK]
    assert culprit.find({"result": wide}).path == "result[500]"
    before = time.process_time()
    assert culprit.find({"result": wide}, seconds=0.005) is None
    assert time.process_time() - before < 0.1
    monkeypatch.setattr(culprit, "find", lambda roots: None)
    with pytest.raises(SerializationError, match=r"the result cannot be pickled \(TypeError: "):
        encode_result(wide)


def test_a_lock_beside_large_arrays_is_found_without_copying_them():
    arrays = [np.ones(4 << 20) for _ in range(8)]
    roots = {"args[0]": {"arrays": arrays, "lock": LOCK}}
    from rankwise.wire.culprit import find

    before = time.process_time()
    found = find(roots)
    assert found is not None and found.path == "args[0]['lock']"
    assert time.process_time() - before < 0.2


# ---- what it costs -----------------------------------------------------------------------------


def test_importing_it_imports_nothing_heavy():
    script = """
        import sys
        from rankwise.wire import codec
        heavy = {"typing", "dataclasses", "enum", "re", "cloudpickle", "logging", "pickle", "uuid"}
        # Some interpreters' site imports a few of these; what counts is what comes on top.
        print(sorted(heavy & set(sys.modules)))
    """
    assert python("-S", "-c", textwrap.dedent(script)) == "[]\n"


def test_a_process_that_moves_plain_things_never_imports_cloudpickle():
    script = """
        import sys, datetime, fractions
        import numpy
        from rankwise.wire.codec import encode_call, encode_result, loads
        sent = (fractions.Fraction(1, 3), datetime.date.today(), {1}, numpy.ones(3), ValueError(1))
        assert len(loads(encode_call(len, sent, {"k": sys.exit}))[1]) == 5
        loads(encode_result(list(range(100))))
        assert "cloudpickle" not in sys.modules
    """
    python("-c", textwrap.dedent(script))


def test_plain_calls_skip_the_slower_pickler(monkeypatch):
    monkeypatch.setattr(codec, "dumps", None)
    for args in ((1.0, "abc"), ([1, 2], (3, b"x"), {"a": None}), ()):
        encode_call("forward", args, {"k": 1, "l": [1]})
    for value in (1, [1.0, "abc"], {"a": None}, ()):
        encode_result(value)


def test_standard_output_is_a_name_and_an_open_file_an_error(capfd):
    def says():
        sys.stdout.write("")
        return sys.stdout

    with capfd.disabled():
        assert there_and_back([says, sys.stdout])[1] is sys.stdout
    with pytest.raises(TypeError, match="open file"):
        dumps([lambda: 0, io.TextIOWrapper(io.BytesIO())])
