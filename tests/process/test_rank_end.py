"""How a rank's process ends when its group is closed: in order, with all that was to be done."""

from __future__ import annotations

import os

import pytest
from rank_end_ranks import ExitsInC, Steps

from rankwise import WorkerGroup

START_METHODS = ["spawn", "forkserver"]
BUFFERED = {"PYTHONUNBUFFERED": ""}


def reports(group):
    """The exit reports of a closed group's ranks."""
    found = group._seat.engine.ranks.reports
    return [found[rank] for rank in range(group.world_size)]


@pytest.mark.parametrize("start_method", START_METHODS)
def test_an_orderly_end_leaves_nothing_undone(start_method, tmp_path):
    notes, kept = tmp_path / "notes", tmp_path / "kept"
    notes.touch()
    with WorkerGroup(
        Steps, 1, args=(str(notes),), logs="off", start_method=start_method, env=BUFFERED
    ) as group:
        servant = group[0].call("last_call", str(kept))
    done = notes.read_text().split()
    assert sorted(done) == sorted(
        ["exit", "object", "thread", "atexit", "child", "finalize", "garbage"]
    )
    assert done[:3] == ["exit", "object", "thread"]
    assert done.index("atexit") < done.index("child")
    assert kept.read_text() == "in a buffer"
    (report,) = reports(group)
    assert report.exitcode == 0
    assert "of Python" in report.log_tail and "of C" in report.log_tail
    with pytest.raises(ProcessLookupError):
        os.kill(servant, 0)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_an_atexit_function_that_raises_keeps_no_other_from_running(start_method, tmp_path):
    path = tmp_path / "ran"

    class Worker:
        def __init__(self):
            import atexit

            atexit.register(path.touch)
            atexit.register(lambda: 1 / 0)
            atexit.register(lambda: exit(3))

    with WorkerGroup(Worker, 1, logs="off", start_method=start_method) as group:
        pass
    assert path.exists()
    (report,) = reports(group)
    assert report.exitcode == 0 and "ZeroDivisionError" in report.log_tail


@pytest.mark.parametrize("start_method", START_METHODS)
def test_output_that_cannot_be_written_shows_in_the_exit_status(start_method):
    class Worker:
        def close_output(self):
            import os
            import sys

            sys.stdout.write("nowhere to go")
            os.close(1)

    with WorkerGroup(Worker, 1, logs="off", start_method=start_method, env=BUFFERED) as group:
        group.call("close_output")
    assert reports(group)[0].exitcode == 120  # as any Python


@pytest.mark.parametrize(
    ("start_method", "device", "runs"),
    [("spawn", False, True), ("forkserver", False, False), ("forkserver", True, True)],
    ids=["spawned", "forked", "forked-with-an-accelerator"],
)
def test_functions_of_c_run_at_exit_where_they_are_the_ranks_own(
    start_method, device, runs, tmp_path
):
    path = tmp_path / "ran"
    with WorkerGroup(
        ExitsInC, 1, args=(str(path), device), logs="off", start_method=start_method
    ) as group:
        pass
    assert reports(group)[0].exitcode == 0
    assert path.exists() is runs


@pytest.mark.parametrize(
    ("start_method", "computes"),
    # A thread that is inside C++ while its globals are destroyed may crash any Python program.
    [("spawn", False), ("forkserver", False), ("forkserver", True)],
)
def test_a_rank_with_torch_ends_well(start_method, computes):
    pytest.importorskip("torch")

    class Worker:
        def __init__(self):
            import threading

            import torch

            def compute():
                ones = torch.ones(64, 64, requires_grad=True)
                (ones @ ones).sum().backward()

            def compute_for_ever():
                while True:
                    compute()

            compute()
            if computes:
                threading.Thread(target=compute_for_ever, daemon=True).start()

        def idle(self):
            pass

    preload = ["torch"] if start_method == "forkserver" else []
    with WorkerGroup(Worker, 2, logs="off", start_method=start_method, preload=preload) as group:
        group.call("idle")
    assert [report.exitcode for report in reports(group)] == [0, 0]


def test_what_torch_has_registered_at_import_is_not_undone_by_each_forked_rank():
    pytest.importorskip("torch")

    class Worker:
        def finalizers(self):
            import weakref

            import torch

            own = torch.library.Library("of_a_rank", "DEF")
            kinds = [
                (finalizer.peek()[1].__name__, finalizer.atexit, finalizer.peek()[0] is own)
                for finalizer in weakref.finalize._registry
            ]
            return [kind[1:] for kind in kinds if kind[0] == "_del_library"]

    with WorkerGroup(Worker, 1, start_method="forkserver", preload=["torch"]) as group:
        found = group[0].call("finalizers")
    assert (False, False) in found, "torch has none any more: _spare_torchs_libraries can go"
    assert (True, True) in found and (True, False) not in found
