"""The drop-in for vLLM's module, used as vLLM's own test uses it; and the original's defects.

crew(8) > handler, workers in a list, monitor; then handler and monitor are started
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait

import pytest
from drivers import SECONDS, Script, Watch, in_thread
from vllm_workers import Worker, value

from rankwise import SerializationError, WorkerDied
from rankwise.compat.multiproc_worker_utils import (
    ProcessWorkerWrapper,
    ResultHandler,
    WorkerMonitor,
)


class Crew:
    def __init__(self, size, factory=Worker, config=None):
        self.handler = ResultHandler()
        self.workers = [
            ProcessWorkerWrapper(self.handler, factory, config, rank) for rank in range(size)
        ]
        self.monitor = WorkerMonitor(self.workers, self.handler)
        assert not self.monitor.is_alive()
        assert not self.handler.is_alive()
        self.handler.start()
        self.monitor.start()

    def end(self):
        for worker in self.workers:
            worker.kill_worker()
        self.handler.close()
        for thread in (self.monitor, self.handler):
            thread.join(SECONDS)
            assert not thread.is_alive()
        for worker in self.workers:
            worker.process.join(SECONDS)

    def assert_stopped(self):
        assert not self.monitor.is_alive()
        assert not any(worker.process.is_alive() for worker in self.workers)
        for worker in self.workers:
            with pytest.raises(ChildProcessError, match=r"^worker died"):
                worker.execute_method("worker_method", "late")
        self.handler.join(SECONDS)
        assert not self.handler.tasks


@pytest.fixture
def crew():
    made = []

    def make(*args, **kwargs):
        made.append(Crew(*args, **kwargs))
        return made[-1]

    yield make
    while made:  # pytest keeps `make`; a process that has ended keeps its sentinel
        made.pop().end()


def execute_all(workers, value_):
    outputs = [worker.execute_method("worker_method", value_) for worker in workers]
    assert [value(output) for output in outputs] == [(rank, value_) for rank in range(len(workers))]


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_as_vllm_uses_it(crew, end):
    team = crew(8)
    with ThreadPoolExecutor(4) as threads:
        names = [f"thread {number}" for number in range(4)]
        list(threads.map(lambda name: execute_all(team.workers, name), names, timeout=SECONDS))
    assert not team.handler.tasks

    failed = team.workers[0].execute_method("worker_method", ValueError("fake error"))
    with pytest.raises(ValueError) as caught:
        value(failed)
    assert str(caught.value) == "fake error"
    assert team.monitor.is_alive()

    if end == "killed":
        team.workers[3].process.kill()
    else:
        team.monitor.close()
        team.monitor.close()  # a second call does nothing
    team.monitor.join(SECONDS)
    team.assert_stopped()
    codes = {worker.process.exitcode for worker in team.workers}
    assert codes == ({-signal.SIGKILL} if end == "killed" else {0})


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_as_vllm_uses_it_with_asyncio(crew, end):
    team = crew(8)

    async def execute_all_async(name):
        coroutines = [w.execute_method_async("worker_method", name) for w in team.workers]
        assert await asyncio.gather(*coroutines) == [(rank, name) for rank in range(8)]

    async def main():
        await asyncio.gather(*(execute_all_async(f"task {number}") for number in range(4)))
        assert not team.handler.tasks
        with pytest.raises(ValueError) as caught:
            await team.workers[0].execute_method_async("worker_method", ValueError("fake error"))
        assert str(caught.value) == "fake error"
        if end == "killed":
            team.workers[3].process.kill()
        else:
            team.monitor.close()
        await asyncio.to_thread(team.monitor.join, SECONDS)
        team.assert_stopped()
        with pytest.raises(ChildProcessError, match=r"^worker died"):
            await team.workers[0].execute_method_async("worker_method", "late")
        assert not team.handler.tasks

    asyncio.run(asyncio.wait_for(main(), SECONDS))


# -- the original's defects -------------------------------------------------------------------


def test_argument_that_cannot_be_pickled_raises_at_once(crew):
    team = crew(1)
    worker = team.workers[0]
    with pytest.raises(SerializationError, match=r"args\[0\]\['lock'\]"):
        worker.execute_method("worker_method", {"lock": threading.Lock()})
    assert not team.handler.tasks
    with pytest.raises(SerializationError, match="vllm_config"):
        ProcessWorkerWrapper(team.handler, Worker, threading.Lock(), 1)
    assert value(worker.execute_method("worker_method", "next")) == (0, "next")


def test_result_that_cannot_be_pickled_fails_its_call_alone(crew):
    worker = crew(1).workers[0]
    futures = [worker.execute_method(*m) for m in (["unpicklable"], ["worker_method", "next"])]
    with pytest.raises(SerializationError, match="result"):
        value(futures[0])
    assert value(futures[1]) == (0, "next")


def test_exception_that_cannot_be_rebuilt_fails_its_call_alone(crew):
    team = crew(2)
    failed = team.workers[0].execute_method("not_to_be_rebuilt")
    with pytest.raises(Exception, match="NotToBeRebuilt"):
        value(failed)
    execute_all(team.workers, "later answers arrive")
    assert team.handler.is_alive()


def test_worker_killed_while_it_writes_leaves_the_others_working(crew):
    team = crew(2)
    # The monitor would end the other one.
    assert team.monitor._first.acquire(blocking=False)
    with pytest.raises(WorkerDied, match=r"^worker died: rank 0 .*SIGKILL"):
        value(team.workers[0].execute_method("die_while_writing", 64 << 20))
    assert value(team.workers[1].execute_method("worker_method", 1)) == (1, 1)
    assert len(value(team.workers[1].execute_method("big", 1 << 20))) == 1 << 20


def test_no_worker_outlives_a_driver_that_is_killed():
    script = """
    from rankwise.compat.multiproc_worker_utils import *

    class Worker:
        def __init__(self, vllm_config, rank):
            self.rank = rank
        def spin(self):
            while True:
                pass

    handler = ResultHandler()
    workers = [ProcessWorkerWrapper(handler, Worker, None, rank) for rank in range(2)]
    handler.start()
    busy = workers[0].execute_method("spin")
    say(pids=[worker.process.pid for worker in workers])
    hear()
    """
    with Script(script) as driver, Watch(driver.line()["pids"]) as workers:
        driver.kill()
        assert workers.left(2.0) == []


def test_death_says_who_how_and_what_was_last_heard(crew, tmp_path):
    team = crew(2)
    fifo = tmp_path / "begun"
    os.mkfifo(fifo)
    first = team.workers[1].execute_method("block", str(fifo), "these are my last words")
    assert fifo.read_text() == "begun"
    pid = team.workers[1].process.pid
    os.kill(pid, signal.SIGTERM)
    with pytest.raises(ChildProcessError) as caught:
        value(first)
    error = caught.value
    assert isinstance(error, WorkerDied)
    assert str(error).startswith(
        f"worker died: rank 1 (pid {pid}) was killed by SIGTERM in block()"
    )
    assert (error.rank, error.pid, error.signal) == (1, pid, signal.SIGTERM)
    assert error.exitcode == -signal.SIGTERM
    assert "these are my last words" in error.log_tail


def test_callers_of_the_others_hear_who_died_first(crew, tmp_path, caplog):
    team = crew(2)
    fifo = tmp_path / "begun"
    os.mkfifo(fifo)
    waiting = team.workers[0].execute_method("block", str(fifo))
    caller = in_thread(waiting.get)
    assert fifo.read_text() == "begun"
    victim = team.workers[1].process
    pid = victim.pid
    victim.kill()
    with pytest.raises(WorkerDied, match=r"^worker died: rank 1 .*SIGKILL.*rank 0 was ended"):
        caller.value()
    team.monitor.join(SECONDS)
    text = f"Worker VllmWorkerProcess pid {pid} died, exit code: -9"
    assert text in [record.getMessage() for record in caplog.records]


def test_the_sentinel_tells_the_end_and_the_exit_code_is_there(crew):
    team = crew(1)
    process = team.workers[0].process
    assert process.name == "VllmWorkerProcess"
    assert process.is_alive()
    assert process.exitcode is None
    assert process.pid == process.ident
    process.join(0)
    assert process.is_alive()
    process.terminate()
    assert wait([process.sentinel], SECONDS) == [process.sentinel]
    assert not process.is_alive()
    assert process.exitcode == -signal.SIGTERM
