"""ProcessWorkerWrapper: its start, its methods, its output, its ends."""

from __future__ import annotations

import gc
import os
import signal
import threading
from functools import partial

import cloudpickle
import numpy as np
import pytest
from drivers import SECONDS, Script, Watch
from vllm_workers import Louder, Worker, exact, handler, start, value

from rankwise import WorkerDied
from rankwise.compat.multiproc_worker_utils import (
    ProcessWorkerWrapper,
    ResultHandler,
    WorkerMonitor,
)

__all__ = ["handler", "start"]  # fixtures


def test_constructor_returns_while_the_factory_runs(start, handler, tmp_path):
    fifo = str(tmp_path / "go")
    os.mkfifo(fifo)

    def factory(config, rank):
        with open(fifo) as go:
            return Worker(go.read(), rank)

    handler.start()
    worker = start(factory, rank=5)
    future = worker.execute_method(lambda worker: worker.config)
    assert not future.is_set()
    assert worker.process.is_alive()
    assert list(handler.tasks.values()) == [future]
    with open(fifo, "w") as go:
        go.write("made in the worker")
    assert value(future) == "made in the worker"


@pytest.mark.parametrize(
    ("method", "args", "expected"),
    [
        ("worker_method", (1,), (3, 1)),
        (exact, (1,), (3, 1)),
        (partial(exact), (1,), (3, 1)),
        (lambda worker: worker.rank, (), 3),
        (cloudpickle.dumps(exact), (1, 2), (3, 1, 2)),
        ("rank_of_worker", (), "overridden"),
        (Worker.rank_of_worker, (), 3),  # the function that was given, and no other
    ],
)
def test_a_method_is_a_name_or_a_callable_or_a_pickled_one(start, handler, method, args, expected):
    handler.start()
    assert value(start(Louder, rank=3).execute_method(method, *args)) == expected


def test_a_large_argument_goes_through_shared_memory(start, handler):
    def mapping(worker, array):
        with open("/proc/self/maps") as maps:
            for line in maps:
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                if first <= array.ctypes.data < last:
                    return line, int(array.sum())

    handler.start()
    line, total = value(start().execute_method(mapping, np.ones(4 << 20, np.uint8)))
    assert "/memfd:" in line
    assert total == 4 << 20


def test_a_missing_method_is_not_implemented(start, handler):
    handler.start()
    worker = start()
    with pytest.raises(NotImplementedError, match="'nothing_of_the_kind'"):
        value(worker.execute_method("nothing_of_the_kind"))
    assert value(worker.execute_method("worker_method", 1)) == (0, 1)


def test_a_failing_factory_is_a_dead_worker(start, handler):
    def factory(config, rank):
        raise ValueError("no such model")

    handler.start()
    workers = [start(factory, rank=4), start()]
    waiting = workers[0].execute_method("worker_method", 1)
    monitor = WorkerMonitor(workers, handler)
    monitor.start()
    with pytest.raises(WorkerDied, match=r"^worker died: rank 4 .*status 1") as caught:
        value(waiting)
    assert "ValueError: no such model" in caught.value.log_tail
    monitor.join(SECONDS)
    assert not monitor.is_alive()
    assert [worker.process.exitcode for worker in workers] == [1, -signal.SIGKILL]


def test_terminate_worker_lets_it_finish_what_is_queued(start, handler, tmp_path):
    path = str(tmp_path / "log")
    handler.start()
    worker = start()
    futures = [worker.execute_method("append", path, f"{n} ") for n in range(200)]
    worker.terminate_worker()
    with pytest.raises(ChildProcessError, match=r"^worker died"):
        worker.execute_method("append", path, "late")
    assert len(handler.tasks) <= len(futures)
    assert [value(future) for future in futures] == [None] * 200
    worker.process.join(SECONDS)
    assert worker.process.exitcode == 0
    with open(path) as file:
        assert file.read() == "".join(f"{n} " for n in range(200))
    worker.terminate_worker()  # again: it would be killed, if it lived


def test_terminate_worker_kills_one_that_was_asked_before(start, handler, tmp_path):
    fifo = tmp_path / "begun"
    os.mkfifo(fifo)
    handler.start()
    worker = start()
    worker.execute_method("block", str(fifo))
    assert fifo.read_text() == "begun"
    worker.terminate_worker()
    assert worker.process.is_alive()
    worker.terminate_worker()
    worker.process.join(SECONDS)
    assert worker.process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("code", [0, 3])
def test_system_exit_ends_the_worker(start, handler, code):
    handler.start()
    worker = start()
    with pytest.raises(WorkerDied, match=rf"^worker died: rank 0 .*status {code} in leave\(\)"):
        value(worker.execute_method("leave", code))
    worker.process.join(SECONDS)
    assert worker.process.exitcode == code


def test_keyboard_interrupt_ends_the_worker_in_order(start, handler):
    handler.start()
    worker = start()
    with pytest.raises(ChildProcessError, match=r"^worker died"):
        value(worker.execute_method("interrupt"))
    assert worker.process.exitcode == 0


def test_an_idle_worker_that_is_interrupted_ends_in_order(start, handler):
    handler.start()
    worker = start()
    value(worker.execute_method("worker_method", 1))
    os.kill(worker.process.pid, signal.SIGINT)
    worker.process.join(SECONDS)
    assert worker.process.exitcode == 0


def test_output_has_the_original_prefix_also_what_c_prints(start, handler, capfd):
    handler.start()
    worker = start()
    value(worker.execute_method("say", "two\nlines\n"))
    value(worker.execute_method("say", "partial "))
    worker.terminate_worker()
    worker.process.join(SECONDS)
    shown = [f"(VllmWorkerProcess pid={worker.process.pid}) {line}" for line in
             ("two", "lines", "from C", "partial from C")]  # fmt: skip
    assert capfd.readouterr().out.splitlines() == shown


def test_a_failure_is_logged_in_the_worker_with_its_traceback(start, handler, capfd):
    handler.start()
    worker = start()
    with pytest.raises(ValueError, match=r"^boom"):
        value(worker.execute_method("worker_method", ValueError("boom")))
    worker.terminate_worker()
    worker.process.join(SECONDS)
    text = capfd.readouterr().err
    assert "Exception in worker VllmWorkerProcess while processing method worker_method." in text
    assert "Traceback" in text
    assert "raise value" in text


def test_a_worker_inherits_the_environment_as_it_is(start, handler, monkeypatch):
    monkeypatch.setenv("RANK", "77")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_PORT", "4711")
    handler.start()
    found = value(start().execute_method("variables"))
    assert found == {"RANK": "77", "WORLD_SIZE": None, "MASTER_PORT": "4711"}


def test_a_worker_that_is_collected_is_ended(handler):
    handler.start()
    worker = ProcessWorkerWrapper(handler, Worker, None, 0)
    value(worker.execute_method("worker_method", 1))
    with Watch([worker.process.pid]) as process:
        with pytest.warns(ResourceWarning, match="rank 0 was collected"):
            del worker
            gc.collect()
        assert process.left(SECONDS) == []


def test_nothing_remains_of_an_orderly_end():
    def descriptors():
        return sorted(os.listdir("/proc/self/fd"))

    def children():
        with open(f"/proc/self/task/{threading.main_thread().native_id}/children") as file:
            return file.read().split()

    gc.collect()
    before = descriptors(), children(), set(threading.enumerate())
    handler = ResultHandler()
    workers = [ProcessWorkerWrapper(handler, Worker, None, rank) for rank in range(2)]
    monitor = WorkerMonitor(workers, handler)
    handler.start()
    monitor.start()
    assert [value(w.execute_method("worker_method", 0)) for w in workers] == [(0, 0), (1, 0)]
    monitor.close()
    monitor.join(SECONDS)
    handler.join(SECONDS)
    del monitor, workers, handler
    gc.collect()
    assert (descriptors(), children(), set(threading.enumerate())) == before


def test_the_interpreter_exits_though_workers_are_busy():
    script = """
    from rankwise.compat.multiproc_worker_utils import *

    class Worker:
        def __init__(self, vllm_config, rank):
            pass
        def block(self):
            signal.pause()

    handler = ResultHandler()
    workers = [ProcessWorkerWrapper(handler, Worker, None, rank) for rank in range(3)]
    monitor = WorkerMonitor(workers, handler)
    handler.start()
    monitor.start()
    busy = [worker.execute_method("block") for worker in workers]
    threading.Thread(target=lambda: busy[0].wait()).start()  # no daemon: it must be let go
    say(pids=[worker.process.pid for worker in workers])
    hear()
    """
    with Script(script) as driver, Watch(driver.line()["pids"]) as workers:
        driver.tell()
        assert driver.end(8.0) == 0, driver.errors()
        assert workers.left(2.0) == []
