"""What torch's TunableOp has found out is written at an orderly end, once a rank, where it tunes.

torch is a fake here, which notes in a file that its `write_file` was called.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
from functools import partial

import pytest
from drivers import SECONDS, Script, in_thread
from tunable_ranks import KINDS, OfVllm, Tuner, torch
from vllm_workers import handler, start, value

from rankwise import WorkerGroup, per_rank
from rankwise.compat.multiproc_worker_utils import _TERMINATE, _run_worker_process

__all__ = ["handler", "start"]  # fixtures


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes"
    path.touch()
    return path


# -- a group -----------------------------------------------------------------------------------


def group_of(notes, *kinds):
    args = per_rank([(kind, str(notes)) for kind in kinds])
    return WorkerGroup(Tuner, len(kinds), args=args, start_method="forkserver")


def test_an_orderly_close_writes_once_and_only_where_a_rank_tunes(notes, capfd):
    group = group_of(notes, *KINDS)
    group.close()
    assert sorted(notes.read_text().splitlines()) == ["torch: False", "tunes"]
    said = capfd.readouterr().err
    assert said.count("TunableOp's results could not be written") == 1
    assert "the disk is full" in said
    assert said.count("Traceback") == 1


def test_control_c_in_the_driver_is_an_orderly_end_too(notes):
    with pytest.raises(KeyboardInterrupt), group_of(notes, "tunes", "tunes"):
        signal.raise_signal(signal.SIGINT)
    assert notes.read_text() == "tunes\n" * 2


def test_a_kill_writes_nothing(notes, capfd):
    group = group_of(notes, "tunes", "tunes")
    group.kill()
    assert notes.read_text() == ""
    assert "TunableOp" not in "".join(capfd.readouterr())


# -- the drop-in for vLLM's module -------------------------------------------------------------


class Doing:
    """What vLLM's factory makes: a worker with ways to end."""

    def nothing(self):
        pass

    def interrupt(self):
        raise KeyboardInterrupt

    def leave(self):
        sys.exit(3)


@pytest.fixture
def run(notes, monkeypatch, capsys):
    """Runs `_run_worker_process` in a thread, with a torch of this kind; what is noted then.

    It prefixes streams that end with the test.
    """

    def one(kind, *tasks):
        monkeypatch.setitem(sys.modules, "torch", torch(kind, str(notes)))
        given = queue.Queue()
        for task in tasks:
            given.put(task)
        loop = partial(_run_worker_process, lambda *_: Doing(), given, queue.Queue(), None, 0)
        try:
            in_thread(loop).value()
        except SystemExit:
            pass
        return notes.read_text().splitlines()

    return one


NOTHING, INTERRUPT, LEAVE = ((1, name, (), {}) for name in ("nothing", "interrupt", "leave"))


@pytest.mark.parametrize(
    ("tasks", "written"),
    [((NOTHING, _TERMINATE), 1), ((INTERRUPT,), 1), ((LEAVE,), 0)],
    ids=["terminate", "keyboard-interrupt", "system-exit"],
)
def test_run_worker_process_writes_once_where_it_ends_in_order(run, tasks, written):
    assert run("tunes", *tasks) == ["tunes"] * written


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("tunes", "no torch")])
def test_run_worker_process_ends_in_order_where_there_is_nothing_to_write(
    run, kind, caplog, capsys
):
    caplog.set_level(logging.INFO)
    assert run(kind, _TERMINATE) == []
    assert caplog.messages[-1] == "Worker exiting"
    assert ("could not be written" in capsys.readouterr().err) == (kind == "disk is full")


def test_run_worker_process_writes_once_when_an_idle_one_is_interrupted(notes):
    script = """
    import io, queue
    sys.path.insert(0, sys.argv[1])
    from tunable_ranks import torch
    from rankwise.compat.multiproc_worker_utils import _run_worker_process, _TERMINATE

    class Worker:
        def begin(self):
            os.write(1, b"{}\\n")

    told, sys.stdout = sys.stdout, io.StringIO()  # it has its lines prefixed
    tasks = queue.Queue()
    tasks.put(_TERMINATE)
    _run_worker_process(lambda *_: Worker(), tasks, queue.Queue(), None, 0)
    imported = "torch" in sys.modules
    sys.modules["torch"] = torch("tunes", sys.argv[2])
    tasks.put((1, "begin", (), {}))
    _run_worker_process(lambda *_: Worker(), tasks, queue.Queue(), None, 0)
    sys.stdout = told
    say(imported=imported)
    """
    with Script(script, os.path.dirname(__file__), str(notes)) as driver:
        driver.line()
        driver.kill(signal.SIGINT)
        assert driver.line() == {"imported": False}  # by one that found none
        assert driver.end() == 0
    assert notes.read_text() == "tunes\n"


@pytest.mark.parametrize("end", ["terminated", "interrupted", "killed"])
def test_a_worker_of_the_drop_in_writes_once_where_it_ends_in_order(start, handler, notes, end):
    handler.start()
    worker = start(OfVllm, config=("tunes", str(notes)))
    pid = value(worker.execute_method("pid"))
    if end == "terminated":
        worker.terminate_worker()
    elif end == "interrupted":
        os.kill(pid, signal.SIGINT)
    else:
        worker.kill_worker()
    worker.process.join(SECONDS)
    assert notes.read_text() == ("" if end == "killed" else "tunes\n")


def test_a_worker_of_the_drop_in_ends_in_order_with_a_torch_that_writes_by_itself(
    start, handler, notes
):
    handler.start()
    worker = start(OfVllm, config=("torch 2.10", str(notes)))
    os.kill(value(worker.execute_method("pid")), signal.SIGINT)
    worker.process.join(SECONDS)
    assert worker.process.exitcode == 0
