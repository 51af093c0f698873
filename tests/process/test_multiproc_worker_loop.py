"""What of the drop-in for vLLM's module is used without a worker of rankwise's."""

from __future__ import annotations

import io
import logging
import os
import queue
import sys
import types
from functools import partial

import pytest
from drivers import Script, in_thread
from vllm_workers import Worker, exact

from rankwise.compat import multiproc_worker_utils as utils
from rankwise.compat.multiproc_worker_utils import (
    _TERMINATE,
    CYAN,
    RESET,
    Result,
    _add_prefix,
    _run_worker_process,
    set_multiprocessing_worker_envs,
)


@pytest.fixture
def streams(capsys):
    """Its own: what is prefixed once stays so, and pytest's are there until the end."""


def test_run_worker_process_in_a_thread(streams, caplog):
    caplog.set_level(logging.INFO)
    tasks, results = queue.Queue(), queue.Queue()
    for task in [
        (1, "worker_method", (1,), {}),
        (2, "worker_method", (), {"value": ValueError("boom")}),
        (3, exact, (), {}),
        (4, "unpicklable", (), {}),
        _TERMINATE,
    ]:
        tasks.put(task)
    in_thread(partial(_run_worker_process, Worker, tasks, results, None, 7)).value()
    found = [results.get_nowait() for _ in range(4)]
    assert found[0] == Result(1, value=(7, 1))
    assert repr(found[1].exception) == "ValueError('boom')"
    assert found[2] == Result(3, value=(7,))
    assert found[3].exception is None
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "Worker ready; awaiting tasks"
    assert messages[-1] == "Worker exiting"
    assert "while processing method worker_method" in messages[1]
    assert sys.stdout.start_new_line
    assert sys.stderr.start_new_line


@pytest.mark.parametrize(("method", "ends"), [("leave", SystemExit), ("interrupt", None)])
def test_what_ends_run_worker_process(streams, method, ends):
    tasks, results = queue.Queue(), queue.Queue()
    tasks.put((1, method, (3,) if method == "leave" else (), {}))
    run = in_thread(partial(_run_worker_process, Worker, tasks, results, None, 0))
    if ends is None:
        run.value()
    else:
        with pytest.raises(ends):
            run.value()
    assert results.empty()


def test_run_worker_process_in_a_process_of_multiprocessing():
    """What cannot travel fails its task, where multiprocessing's feeder thread would drop it."""
    # In a process of its own: multiprocessing's resource tracker stays until that ends.
    script = """
    import multiprocessing
    sys.path.insert(0, sys.argv[1])
    from rankwise.compat.multiproc_worker_utils import _run_worker_process, _TERMINATE
    from vllm_workers import Worker

    mp = multiprocessing.get_context("spawn")
    tasks, results = mp.Queue(), mp.Queue()
    process = mp.Process(target=_run_worker_process, kwargs={
        "worker_factory": Worker, "task_queue": tasks, "result_queue": results,
        "vllm_config": None, "rank": 7}, name="VllmWorkerProcess", daemon=True)
    process.start()
    for number, method in enumerate(["unpicklable", "not_to_be_rebuilt", "rank_of_worker"]):
        tasks.put((number, method, (), {}))
    tasks.put(_TERMINATE)
    found = [results.get(timeout=20) for _ in range(3)]
    process.join(20)
    say(errors=[repr(result.exception) for result in found], value=found[2].value,
        exitcode=process.exitcode)
    """
    with Script(script, os.path.dirname(__file__)) as driver:
        said = driver.line()
        assert driver.end() == 0
    assert "the result cannot be pickled" in said["errors"][0]
    assert "NotToBeRebuilt: text" in said["errors"][1]
    assert (said["errors"][2], said["value"], said["exitcode"]) == ("None", 7, 0)


def test_add_prefix():
    file = io.StringIO()
    _add_prefix(file, "NAME", 12)
    prefix = f"{CYAN}(NAME pid=12){RESET} "
    assert file.start_new_line
    for text in ("a", "", "b\n", "c\nd\n", "\n", "e"):
        file.write(text)
    assert not file.start_new_line
    assert file.getvalue().split("\n") == [prefix + line for line in ("ab", "c", "d", "", "e")]


# -- the environment --------------------------------------------------------------------------


@pytest.fixture
def torch_of(monkeypatch):
    for name in ("OMP_NUM_THREADS", "VLLM_WORKER_MULTIPROC_METHOD", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)

    def make(threads=1, cuda=False):
        fake = types.SimpleNamespace(
            cuda=types.SimpleNamespace(is_initialized=lambda: cuda),
            get_num_threads=lambda: threads,
            set_num_threads=lambda count: setattr(fake, "set_to", count),
            set_to=None,
        )
        monkeypatch.setitem(sys.modules, "torch", fake)
        return fake

    return make


def test_cuda_forces_spawn(torch_of, caplog):
    torch_of(cuda=True)
    set_multiprocessing_worker_envs(None)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert "CUDA is initialized" in caplog.text
    caplog.clear()
    set_multiprocessing_worker_envs(None)
    assert not caplog.text  # it is spawn already


def test_a_ray_actor_forces_spawn(torch_of, monkeypatch, caplog):
    torch_of()
    context = types.SimpleNamespace(get_actor_id=lambda: "id", gcs_address="1.2.3.4:5")
    ray = types.SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    set_multiprocessing_worker_envs(None)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["RAY_ADDRESS"] == "1.2.3.4:5"
    assert "Ray actor" in caplog.text


def test_nothing_is_forced_and_ray_is_not_imported_otherwise(torch_of):
    torch = torch_of(threads=1)
    set_multiprocessing_worker_envs(None)
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ
    assert "OMP_NUM_THREADS" not in os.environ
    assert torch.set_to is None
    assert "ray" not in sys.modules


@pytest.mark.parametrize("users", [None, "4"])
def test_the_threads_of_torch_become_one_unless_the_user_chose(
    torch_of, monkeypatch, caplog, users
):
    torch = torch_of(threads=8)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    set_multiprocessing_worker_envs(None)
    assert os.environ["OMP_NUM_THREADS"] == (users or "1")
    assert torch.set_to == (None if users else 1)
    assert bool(caplog.text) is (users is None)


def test_without_torch_there_is_nothing_to_set(torch_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    set_multiprocessing_worker_envs(None)
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_constants():
    assert (utils.JOIN_TIMEOUT_S, _TERMINATE) == (2, "TERMINATE")
    assert (CYAN, RESET) == ("\033[1;36m", "\033[0;0m")
    assert isinstance(utils.logger, logging.Logger)
    assert Result("id") == Result(task_id="id", value=None, exception=None)
    assert Result[int] is not None
    assert utils.T is not None
