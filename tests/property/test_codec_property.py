"""wire.codec under any data: round trips, culprits that are culprits, garbage that does no harm."""

from __future__ import annotations

import collections
import dataclasses
import functools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import rankwise
from rankwise.errors import SerializationError
from rankwise.wire.codec import dumps, encode_call, encode_result, loads

SOURCE = str(Path(next(iter(rankwise.__path__))).parent)

atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
plain = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=12)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=12)
        | st.sets(atoms, max_size=5)
        | st.frozensets(atoms, max_size=5)
    ),
    max_leaves=40,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(), st.lists(plain).map(tuple), st.dictionaries(st.text(), plain, max_size=5))
def test_any_plain_call_arrives(method, args, kwargs):
    assert loads(encode_call(method, args, kwargs)) == (method, args, kwargs)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plain, st.booleans())
def test_any_plain_result_arrives_by_either_pickler(value, by_value):
    if by_value:
        assert loads(dumps((value, lambda: 0)))[0] == value
    assert loads(encode_result([value])) == [value]


dtypes = (
    npst.scalar_dtypes()
    | npst.unicode_string_dtypes()
    | npst.byte_string_dtypes()
    | npst.nested_dtypes(max_leaves=3, max_itemsize=64)
    | st.just(np.dtype(object))
)


@settings(deadline=None)
@given(st.data(), dtypes)
def test_any_array_arrives_writable_and_private(data, dtype):
    shape = data.draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    whole = np.zeros(shape, dtype)
    size = whole.nbytes
    if size and not whole.dtype.hasobject and whole.dtype.kind not in "U":
        bits = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype)
        whole = bits.reshape(shape).copy()
    sent = data.draw(npst.basic_indices(shape, allow_ellipsis=True).map(lambda at: whole[at]))
    sent = np.asarray(sent)
    sent = data.draw(st.sampled_from([sent, sent.T, np.asfortranarray(sent)]))
    if data.draw(st.booleans()):
        sent.flags.writeable = False
    arrived, _ = loads(dumps((sent, (lambda: 0) if data.draw(st.booleans()) else None)))
    assert arrived.shape == sent.shape
    # numpy itself may turn strings and dates to the native byte order.
    native = sent.dtype.newbyteorder("=")
    assert arrived.dtype.newbyteorder("=") == native
    assert arrived.astype(native).tobytes() == sent.astype(native).tobytes()
    assert arrived.flags.writeable and not np.shares_memory(arrived, whole)


# ---- culprits ----------------------------------------------------------------------------------


class Holder:
    def __init__(self, inner):
        self.inner = inner


@dataclasses.dataclass
class Data:
    number: int
    inner: object


@dataclasses.dataclass(slots=True)
class Slotted:
    inner: object


class Words(list):
    pass


class Refuses:
    def __reduce__(self):
        raise ValueError("not this one")


Pair = collections.namedtuple("Pair", "left right")


def closure(inner):
    return lambda: inner


def ring(inner):
    """A cycle that leads from the culprit's container back to its parent."""
    parent = Holder(None)
    parent.inner = [parent, Holder(parent), {"back": parent, "inner": inner}]
    return parent


def local_class(inner):
    class Local:
        attribute = inner

    return Local()


BAD = {
    "lock": threading.Lock(),
    "thread": threading.current_thread(),
    "generator": (x for x in ()),
    "refuses": Refuses(),
}
wrappers = [
    lambda inner: [inner],
    lambda inner: (1, inner),
    lambda inner: [0, "x", inner, {}],
    lambda inner: {"key": inner, "other": []},
    lambda inner: {3: inner},
    lambda inner: {(1, 2): inner},
    lambda inner: {b"x": 1, "a b": inner},
    Holder,
    functools.partial(Data, 1),
    Slotted,
    lambda inner: Pair(1, inner),
    lambda inner: Words([1, inner]),
    lambda inner: collections.deque([inner]),
    lambda inner: collections.OrderedDict(a=inner),
    lambda inner: collections.defaultdict(list, a=inner),
    lambda inner: functools.partial(print, 1, k=inner),
    lambda inner: functools.partial(print, inner),
    lambda inner: ValueError("x", inner),
    closure,
    ring,
    local_class,
]


@st.composite
def spoilt(draw, bad):
    """`bad` somewhere in an object, which is the rest of the time in good order."""
    value = bad
    for wrap in draw(st.lists(st.sampled_from(wrappers), max_size=6)):
        value = wrap(value)
        if draw(st.booleans()):
            value = [draw(plain), np.ones(3), value, Holder(1)]
    return value


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(sorted(BAD)), st.booleans())
def test_the_path_leads_to_the_culprit(data, name, in_kwargs):
    bad = BAD[name]
    value = data.draw(spoilt(bad))
    args: tuple = (1, [2])
    kwargs = {"k": value} if in_kwargs else {}
    if not in_kwargs:
        args += (value,)
    with pytest.raises(SerializationError) as caught:
        encode_call("method", args, kwargs)
    path = caught.value.path
    assert ("kwargs['k']" if in_kwargs else "args[2]") in path
    found = follow(path, args=args, kwargs=kwargs)
    with pytest.raises((TypeError, ValueError)):
        dumps(found)
    if name == "thread":  # not the deepest: it has locks of its own
        assert not isinstance(found, threading.Thread)
    else:
        assert found is bad

    with pytest.raises(SerializationError) as caught:
        encode_result(value)
    assert follow(caught.value.path, result=value) is found


def follow(path, **roots):
    # The one thing in a path that Python itself does not take; these closures name one variable.
    return eval(path.replace(".__closure__['inner']", ".__closure__[0].cell_contents"), roots)


# ---- garbage -----------------------------------------------------------------------------------

# In a process of its own, which may crash, with little memory: four bytes of garbage may ask for a
# memo of 2**32 entries.
EATER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from rankwise.wire.codec import loads
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
while size := stdin.read(4):
    data = stdin.read(int.from_bytes(size, "little"))
    try:
        loads(data)
        stdout.write(b"+")
    except Exception:
        stdout.write(b"-")
    stdout.flush()
"""


@pytest.fixture(scope="module")
def eat():
    child = subprocess.Popen(
        [sys.executable, "-c", EATER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": SOURCE, "OPENBLAS_NUM_THREADS": "1"},
    )

    def send(data):
        assert child.poll() is None
        child.stdin.write(len(data).to_bytes(4, "little") + data)
        child.stdin.flush()
        answer = child.stdout.read(1)
        assert answer, f"the interpreter ended with {child.wait()} on {data!r}"
        return answer

    yield send
    child.stdin.close()
    child.wait(20)
    child.stdout.close()


@settings(deadline=None)
@given(plain, st.data())
def test_a_message_cut_short_is_an_error(eat, value, data):
    whole = encode_call("method", (value,), {"array": np.ones(4)})
    length = data.draw(st.integers(0, len(whole) - 1))
    assert eat(whole[:length]) == b"-"


@settings(deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(b"\x80\x05".__add__))
def test_garbage_is_an_error_or_an_object_and_never_a_crash(eat, data):
    eat(data)


@settings(deadline=None)
@given(plain, st.data())
def test_a_message_with_wrong_bytes_never_crashes(eat, value, data):
    wrong = bytearray(encode_call("method", (value, {1}, ValueError("x")), {}))
    for _ in range(data.draw(st.integers(1, 4))):
        wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    eat(bytes(wrong))
