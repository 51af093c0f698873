"""What the tests of the drop-in for vLLM's module share: a worker with many ways to fail."""

from __future__ import annotations

import os
import signal
import sys
import threading

import cloudpickle
import pytest
from drivers import SECONDS

from rankwise.compat.multiproc_worker_utils import ProcessWorkerWrapper, ResultHandler

__all__ = ["Louder", "Worker", "exact", "handler", "start", "value"]

# The workers then need not import this file, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """What vLLM's test calls DummyWorkerWrapper, and more ways to fail."""

    def __init__(self, vllm_config, rank):
        self.config = vllm_config
        self.rank = rank

    def worker_method(self, value):
        if isinstance(value, BaseException):
            raise value
        return self.rank, value

    def unpicklable(self):
        return threading.Lock()

    def not_to_be_rebuilt(self):
        raise NotToBeRebuilt("text")

    def big(self, size):
        return b"x" * size

    def die_while_writing(self, size):
        def watch(main):
            while True:
                frame = sys._current_frames()[main]
                while frame is not None:
                    if frame.f_code.co_name in ("put", "_send_all"):
                        os.kill(os.getpid(), signal.SIGKILL)
                    frame = frame.f_back

        threading.Thread(target=watch, args=[threading.get_ident()], daemon=True).start()
        return self.big(size)

    def block(self, path, last_words=""):
        print(last_words, flush=True)
        with open(path, "w") as there:
            there.write("begun")
        signal.pause()

    def say(self, text):
        print(text, end="", flush=True)
        os.write(1, b"from C\n")

    def leave(self, code):
        sys.exit(code)

    def interrupt(self):
        raise KeyboardInterrupt

    def variables(self):
        return {key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "MASTER_PORT")}

    def append(self, path, text):
        with open(path, "a") as file:
            file.write(text)

    def read(self, path):
        with open(path) as file:
            return file.read()

    def rank_of_worker(self):
        return self.rank


class NotToBeRebuilt(Exception):
    """Unpickling calls __reduce__'s function, which fails."""

    def __reduce__(self):
        return _fail, ()


def _fail():
    raise RuntimeError("cannot be rebuilt")


class Louder(Worker):
    def rank_of_worker(self):
        return "overridden"


def exact(worker, *args):
    return worker.rank, *args


def value(future):
    assert future.wait(SECONDS), "its caller would wait for ever"
    return future.get()


@pytest.fixture
def handler():
    made = ResultHandler()
    yield made
    made.close()
    if made.ident is not None:
        made.join(SECONDS)
        assert not made.is_alive()


@pytest.fixture
def start(handler):
    workers = []

    def one(factory=Worker, rank=0, config=None):
        workers.append(ProcessWorkerWrapper(handler, factory, config, rank))
        return workers[-1]

    yield one
    for worker in workers:
        worker.kill_worker()
        worker.process.join(SECONDS)
        assert not worker.process.is_alive()
    workers.clear()  # pytest keeps `one`; a process that has ended keeps its sentinel
    del worker
