"""Guarantees 9 and 10 for what goes through the arena: private, writable, kept for as long as need
be, never seen by the wrong message, and an error where there is no room."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
from drivers import Script, until
from g10_large_payloads_ranks import LARGE, MIDDLE, Keeper, full

from rankwise import GroupBroken, WorkerDied, WorkerGroup
from rankwise._deadline import clock
from rankwise.wire.lending import IDLE


def lent(group):
    """How many messages of the driver's are with its ranks, as the arena knows it now."""
    lender = group._engine.arena._lender
    with lender._lock:
        lender._collect(lender._memory, clock())
        return len(lender._blocks.loans)


def lent_by(group, rank):
    """How many results of `rank` are with the driver."""

    def count(worker):
        import gc

        from rankwise._deadline import clock

        (lender,) = (one for one in gc.get_objects() if type(one).__name__ == "Lender")
        lender._collect(lender._memory, clock())
        return len(lender._blocks.loans)

    return group[rank].call(count)


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MIDDLE, LARGE, 5 * LARGE + 13])
def test_what_a_rank_keeps_stays_as_it_was_while_other_messages_come_and_go(size):
    with WorkerGroup(Keeper, 2) as group:
        for number in range(40):
            if number % 3 == 0:
                group.call("keep", number, full(number, size))
            elif number % 3 == 1:
                group[number % 2].call("keep", number, full(number, size))
            else:
                assert group.call("total", full(number, size)) == [number * size] * 2
            if number % 5 == 4:
                group[number % 2].call("forget", *range(number % 2, number, 6))
        for sums in group.call("sums"):
            assert len(sums) > 8
            assert all(pair == (number, number) for number, pair in sums.items())


def test_each_rank_writes_to_its_own_and_the_next_message_is_not_touched_by_it():
    with WorkerGroup(Keeper, 3) as group:
        for number in range(1, 12):
            array = full(number)
            futures = [group[rank].submit("add", array, rank) for rank in range(3)]
            together = group.submit("add", array, 5)
            array[:] = 99
            for rank, future in enumerate(futures):
                assert future.result(10) == (number + rank) * LARGE
            assert together.result(10) == [(number + 5) * LARGE] * 3


def test_one_copy_serves_all_ranks_and_is_used_again_when_the_last_has_let_go():
    with WorkerGroup(Keeper, 3) as group:
        group.call("keep", "a", full(1))
        assert lent(group) == 1
        group[0:2].call("forget", "a")
        assert lent(group) == 1
        group[2].call("forget", "a")
        assert lent(group) == 0
        blocks = group._engine.arena._lender._blocks
        assert sum(end - start for start, end, _ in blocks._free) == 2 * LARGE  # one huge page


def test_a_lease_that_ends_while_the_rank_is_idle_is_known_without_a_message():
    def forget_later(worker, array):
        timer = threading.Timer(0.05, array.__class__.__len__, (array,))
        timer.start()

    with WorkerGroup(Keeper, 1) as group:
        group.call(forget_later, full(1))
        assert until(lambda: lent(group) == 0)


def test_views_of_views_and_small_parts_keep_the_whole_message():
    def keep_part(worker, array):
        worker.kept["part"] = memoryview(array[10:20][2:4])

    with WorkerGroup(Keeper, 1) as group:
        group.call(keep_part, full(7))
        for number in range(5):
            group.call("total", full(number))
        assert lent(group) == 1
        assert group[0].call(lambda worker: bytes(worker.kept["part"])) == b"\7\7"
        group.call("forget", "part")
        assert lent(group) == 0


def test_many_arrays_of_any_size_in_one_call_arrive_as_they_were():
    arrays = [full(n % 251, size) for n, size in enumerate((1, 100, MIDDLE, 0, LARGE, 70_001) * 4)]
    with WorkerGroup(Keeper, 2) as group:
        for came in group.call("echo", arrays):
            assert all((one == other).all() for one, other in zip(came, arrays, strict=True))


@pytest.mark.parametrize("size", [10, 65_000, 66_000, LARGE, 3 * LARGE])
def test_bytes_strings_and_arrays_of_any_layout_arrive(size):
    values = [
        b"b" * size, bytearray(b"c" * size), "s" * size, "\u1234" * size,
        np.asfortranarray(np.arange(2 * size).reshape(2, size)),
        np.arange(2 * size)[::2], np.broadcast_to(np.int8(3), (size,)),
        {"deep": [(np.ones(size, "c16"), lambda: size)]},
    ]  # fmt: skip
    with WorkerGroup(Keeper, 1) as group:
        got = group[0].call("echo", values)
        assert got[:4] == values[:4]
        assert [type(one) for one in got] == [type(one) for one in values]
        for one, other in zip(got[4:7], values[4:7], strict=True):
            assert (one == other).all()
            assert one.flags.writeable
            assert one.flags.f_contiguous == (other.flags.f_contiguous or other.ndim == 1)
        array, function = got[7]["deep"][0]
        assert array.sum() == size
        assert function() == size


def test_a_call_that_never_left_gives_its_memory_back():
    release = threading.Event()
    with WorkerGroup(Keeper, 1) as group:
        read, write = os.pipe()
        path = f"/proc/{os.getpid()}/fd/{read}"

        def hold(worker, path):
            with open(path, "rb") as file:
                file.read(1)

        held = group.submit(hold, path)
        futures = [group.submit("total", full(1)) for _ in range(100)]
        dropped = sum(future.cancel() for future in futures)
        assert dropped > 10
        os.write(write, b"x")
        held.result(10)
        for future in futures:
            if not future.cancelled():
                assert future.result(10) == [LARGE]
        del futures, future, held
        gc.collect()
        assert lent(group) == 0
        os.close(read)
        os.close(write)
    release.set()


# -- results ----------------------------------------------------------------------------------


def test_results_are_writable_private_and_outlive_the_group():
    with WorkerGroup(Keeper, 2) as group:
        kept = [group[n % 2].call("make", LARGE + n, n) for n in range(10)]
        undecoded = group.submit("make", LARGE, 77)
        group.flush()
        for n in range(0, 10, 2):
            kept[n] += 100
    for n, array in enumerate(kept):
        assert (array == (n + 100 if n % 2 == 0 else n)).all()
    assert all((array == 77).all() for array in undecoded.result())


def test_a_result_that_nobody_fetches_gives_its_memory_back():
    with WorkerGroup(Keeper, 1) as group:
        for _ in range(20):
            group.submit("make", LARGE, 1)
        late = group.options(timeout=0.05).submit(
            lambda worker: __import__("time").sleep(1.0) or np.ones(LARGE)
        )
        with pytest.raises(TimeoutError):
            late.result()
        group.flush()
        del late
        gc.collect()
        assert until(lambda: lent_by(group, 0) == 0)


def test_results_that_are_kept_are_not_touched_by_later_ones():
    with WorkerGroup(Keeper, 1) as group:
        kept = []
        for n in range(60):
            array = group[0].call("make", MIDDLE if n % 4 == 3 else LARGE, n)
            if n % 3 == 0:
                kept.append((n, array))
        assert all((array == n).all() for n, array in kept)


# -- forks and deaths -------------------------------------------------------------------------


def test_a_child_that_a_rank_forks_sees_its_argument_unchanged_for_ever():
    def fork(worker, array):
        import os

        read, worker.tell = os.pipe()
        worker.hear, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.read(read, 1)
            os.write(write, bytes([int(array.min()), int(array.max())]))
            os._exit(0)
        worker.child = pid

    def ask(worker):
        import os

        os.write(worker.tell, b"x")
        said = os.read(worker.hear, 2)
        os.waitpid(worker.child, 0)
        return said

    with WorkerGroup(Keeper, 1) as group:
        group.call("total", full(1))
        group.call(fork, full(42))
        for number in range(10):
            group.call("total", full(number))
        assert group[0].call(ask) == bytes([42, 42])
        assert lent(group) == 1  # for good: neither of the two can know of the other


def test_a_child_that_comes_out_of_its_method_writes_nothing_that_others_see():
    def fork(worker, size):
        import os

        worker.pid = os.fork()
        return np.full(size, 1 if worker.pid else 2, np.uint8)

    with WorkerGroup(Keeper, 1, logs="off") as group:
        kept = group[0].call("make", LARGE, 9)
        for _ in range(5):
            array = group[0].call(fork, LARGE)
            group.call(lambda worker: __import__("os").waitpid(worker.pid, 0) and None)
            assert (array == 1).all()
        assert (kept == 9).all()


def test_a_forked_child_of_the_driver_sees_its_result_unchanged():
    with WorkerGroup(Keeper, 1) as group:
        array = group[0].call("make", LARGE, 42)
        go, tell = os.pipe()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.read(go, 1)
                code = 0 if (array == 42).all() else 2
            finally:
                os._exit(code)
        del array
        for number in range(10):
            group[0].call("make", LARGE, number)
        os.write(tell, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.close(go)
        os.close(tell)


def test_a_rank_that_dies_with_an_argument_breaks_the_group_and_nothing_remains():
    group = WorkerGroup(Keeper, 2, logs="off")
    kept = group[1].call("make", LARGE, 3)
    with pytest.raises(WorkerDied):
        group[0].call("die", full(1))
    with pytest.raises(GroupBroken):
        group.call("total", full(1))
    group.close()
    assert (kept == 3).all()


# -- room -------------------------------------------------------------------------------------


def memory_of(group):
    """Bytes of memory in the group's file."""
    return os.fstat(group._engine.arena._file.fd).st_blocks * 512


def test_a_message_larger_than_the_memory_there_is_fails_alone(monkeypatch):
    from rankwise import _procfs

    with WorkerGroup(Keeper, 2) as group:
        monkeypatch.setattr(_procfs, "mem_available", lambda: 300 << 20)
        before = memory_of(group)
        with pytest.raises(MemoryError, match="no memory for"):
            group.submit("total", full(1, 400 << 20))
        gc.collect()
        assert lent(group) == 0
        assert memory_of(group) < before + LARGE
        assert group.call("total", full(1)) == [LARGE] * 2


def test_a_result_larger_than_the_memory_there_is_fails_that_call_alone():
    def shrink(worker):
        from rankwise import _procfs

        _procfs.mem_available = lambda: 300 << 20

    with WorkerGroup(Keeper, 1) as group:
        group.call(shrink)
        with pytest.raises(MemoryError, match="no memory for"):
            group.call("make", 400 << 20, 1)
        assert (group[0].call("make", LARGE, 5) == 5).all()


def test_what_is_idle_is_given_back_and_comes_again():
    with WorkerGroup(Keeper, 1) as group:
        arena = group._engine.arena
        for number in (1, 2, 3):
            assert group.call("total", full(number, 8 * LARGE)) == [number * 8 * LARGE]
        assert memory_of(group) > 8 * LARGE
        assert arena.tend(clock()) is not None
        assert memory_of(group) > 8 * LARGE
        arena.tend(clock() + IDLE + 1)
        assert memory_of(group) < LARGE
        for number in (4, 5, 6):
            assert group.call("total", full(number, 8 * LARGE)) == [number * 8 * LARGE]


def test_a_driver_that_may_write_no_large_files_sends_all_through_the_sockets():
    code = """
    import resource, numpy as np
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    class Worker:
        def echo(self, array): return array
    group = WorkerGroup(Worker, 2)
    array = np.arange(1 << 18)
    say(arena=group._engine.arena is not None,
        same=all((array == got).all() for got in group.call("echo", array)))
    group.close()
    """
    with Script(code) as script:
        assert script.line() == {"arena": False, "same": True}
        assert script.end() == 0


def test_a_small_dev_shm_is_no_limit():
    code = """
    import numpy as np
    class Worker:
        def echo(self, array): return array
    with WorkerGroup(Worker, 2) as group:
        array = np.arange(8 << 20)
        say(shm=os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
            same=all((array == got).all() for got in group.call("echo", array)))
    """
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    unshare = ["unshare", "-m", *(["-Ur"] if os.getuid() else [])]
    command = [*unshare, "sh", "-c", f'{mount} && exec "$0" "$@"']
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False).returncode
    ):
        pytest.skip("no mount namespace of our own may be made here")
    with Script(code, wrapper=command) as script:
        assert script.line() == {"shm": 1 << 20, "same": True}
        assert script.end() == 0


def test_five_thousand_small_arrays_in_one_call_need_no_descriptor_each():
    code = """
    import resource, numpy as np
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    class Worker:
        def echo(self, arrays): return arrays
        def keep(self, number, array): self.__dict__[f"kept{number}"] = array
        def check(self): return [n for n in range(600) if (getattr(self, f"kept{n}") != n).any()]
    group = WorkerGroup(Worker, 2)
    arrays = [np.full(200, number) for number in range(5000)]
    for got in group.call("echo", arrays):
        assert all((one == other).all() for one, other in zip(got, arrays))
    kept = []
    for number in range(600):
        array = np.full(50_000, number)
        group.call("keep", number, array)
        kept.append(group[0].call("echo", [array])[0])
    say(wrong=group.call("check"), here=[n for n, got in enumerate(kept) if (got != n).any()])
    group.close()
    """
    with Script(code) as script:
        assert script.line(60) == {"wrong": [[], []], "here": []}
        assert script.end() == 0


# -- shared arrays ----------------------------------------------------------------------------


def test_a_shared_array_is_passed_without_a_copy_and_what_a_rank_writes_stays_its_own():
    with WorkerGroup(Keeper, 2) as group:
        shared = group.shared_array((4, LARGE), np.uint8)
        assert shared.shape == (4, LARGE)
        assert not shared.any()
        taken = memory_of(group)
        for number in range(1, 6):
            shared[:] = number
            assert group.call("total", shared) == [4 * LARGE * number] * 2
            assert group[1].call("total", shared[1:3]) == 2 * LARGE * number
            assert group[0].call("add", shared[2], 1) == LARGE * (number + 1)
            assert (shared == number).all()
        assert memory_of(group) <= taken + (2 << 20), "one page a message, of one huge page"


def test_a_shared_array_may_be_mixed_with_others_and_sent_in_parts():
    with WorkerGroup(Keeper, 1) as group:
        one = group.shared_array(3 * LARGE, "u1")
        other = group.shared_array((LARGE,), np.int32)
        one[:] = np.arange(3 * LARGE) % 251
        other[:] = 7
        sent = [full(1), one[5:-5], b"x" * LARGE, other, full(2), one[LARGE:], one[::2], one[:10]]
        got = group[0].call("echo", sent)
        assert got[2] == sent[2]
        assert all((a == b).all() for a, b in zip(got, sent, strict=True) if a is not got[2])


def test_a_shared_array_that_is_gone_here_lives_as_long_as_a_rank_keeps_it():
    with WorkerGroup(Keeper, 2) as group:
        shared = group.shared_array(LARGE, np.uint8)
        shared[:] = 5
        group.call("keep", "a", shared[: LARGE // 2])
        assert lent(group) == 2
        del shared
        assert lent(group) == 2
        for number in range(10):
            group.call("total", full(number))
        assert group.call("sums") == [{"a": (5, 5)}] * 2
        group.call("forget", "a")
        assert lent(group) == 0
        again = group.shared_array(LARGE, np.uint8)
        assert not again.any()


def test_an_array_at_the_address_of_a_shared_one_that_has_gone_is_not_taken_for_it():
    with WorkerGroup(Keeper, 1) as group:
        for number in range(1, 10):
            shared = group.shared_array(8 * LARGE, np.uint8)
            shared[:] = 99
            del shared
            assert group[0].call("total", full(number, 8 * LARGE)) == 8 * LARGE * number


def test_a_shared_array_outlives_its_group_and_goes_to_another():
    with WorkerGroup(Keeper, 1) as group:
        shared = group.shared_array(LARGE, np.uint8)
    shared[:] = 3
    with WorkerGroup(Keeper, 1) as other:
        assert other[0].call("total", shared) == 3 * LARGE
        with pytest.raises(TypeError, match="Python objects"):
            other.shared_array(3, object)
        assert other.shared_array((0, 3)).shape == (0, 3)


# -- exceptions out of signal handlers --------------------------------------------------------

STRIKES = """
import numpy as np
class Worker:
    def __init__(self): self.kept = []
    def twice(self, array):
        if len(self.kept) < 5 and int(array[0]) % 40 == 0: self.kept.append(array)
        return array.copy() if len(array) % 2 else np.full(len(array), array[-1])
    def unchanged(self): return all((array == array[0]).all() for array in self.kept)
class Strike(Exception): pass
armed = [False]
def handler(number, frame):
    if armed[0]:
        armed[0] = False
        raise Strike
signal.signal(signal.SIGALRM, handler)
sys.unraisablehook = lambda args: None
group = WorkerGroup(Worker, 2, logs="inherit")
struck = answered = 0
wrong = []
kept = []
import random
began = time.monotonic()
def goes_on():
    took = time.monotonic() - began
    return took < float(sys.argv[1]) or (took < 40 and (struck <= 100 or answered <= 10))
number = 0
while goes_on():
    number += 1
    array = np.full((300_001, 9_000, 120_000)[number % 3], number)
    try:
        try:
            armed[0] = True
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + random.random() * 1e-2)
            values = group.call("twice", array)
            armed[0] = False
        finally:
            armed[0] = False
    except Strike:
        struck += 1
        continue
    except BaseException as error:
        wrong.append([number, repr(error)])
        break
    answered += 1
    if not all(len(value) == len(array) and (value == number).all() for value in values):
        wrong.append([number, "a wrong answer"])
    if number % 50 == 0: kept.append((number, values[0]))
signal.setitimer(signal.ITIMER_REAL, 0)
say(wrong=wrong[:5], struck=struck, answered=answered)
say(kept=all((array == n).all() for n, array in kept), theirs=group.call("unchanged"))
group.close()
"""


def test_alarms_that_raise_during_large_calls_mix_up_nothing():
    with Script(STRIKES, "4") as script:
        said = script.line(90)
        assert said["wrong"] == []
        assert said["struck"] > 100
        assert said["answered"] > 10
        assert script.line(30) == {"kept": True, "theirs": [True, True]}
        assert script.end() == 0


def test_a_handler_that_makes_a_large_call_of_its_own_is_served():
    with WorkerGroup(Keeper, 1) as group:
        heard = []

        def handler(number, frame):
            try:
                heard.append(group[0].options(timeout=10).call("total", full(2)))
            except RuntimeError as error:
                heard.append(str(error))

        before = signal.signal(signal.SIGALRM, handler)
        try:
            for turn in range(60):
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + turn % 100 * 1e-5)
                assert group[0].call("total", full(3)) == 3 * LARGE
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert 2 * LARGE in heard
        assert all(one == 2 * LARGE or "signal handler" in one for one in heard)
