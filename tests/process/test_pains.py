"""What users of such systems suffer from: what of docs/pains.md no other test shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivers import Script, Watch
from pains_ranks import FailsTwice, Profiler

from rankwise import StartupError, WorkerGroup

# All four within one pause, and rank 2 first, however slow the machine is.
CHAIN = """
import os, time
import rankwise._ledger
from rankwise import WorkerGroup, worker_info
rankwise._ledger.FAILURE_PAUSE = 20.0
class Shard:
    def step(self):
        if worker_info().rank == 2:
            open("failed", "x").close()
            raise MemoryError("no room for the cache")
        while not os.path.exists("failed"):
            time.sleep(0.01)
        time.sleep(0.3)
        raise ConnectionError("a peer has closed the connection")
with WorkerGroup(Shard, 4) as group:
    group.call(Shard.step)
"""


def test_four_ranks_that_fail_in_a_chain_print_one_traceback(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CHAIN)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    # One of the rank that failed first, and the driver's own, which it is the cause of.
    assert done.stderr.count("Traceback (most recent call last):") == 2
    assert done.stderr.count(", in step\n") == 1
    assert 'raise MemoryError("no room for the cache")' in done.stderr
    later = [line for line in done.stderr.splitlines() if "ConnectionError" in line]
    assert len(later) == 1
    assert later[0].startswith("after it, ")
    assert later[0].endswith("ranks 0, 1, 3: ConnectionError: a peer has closed the connection")


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_clean_up_that_fails_does_not_hide_why_the_start_failed(start_method: str) -> None:
    with pytest.raises(StartupError) as caught:
        WorkerGroup(FailsTwice, 2, start_method=start_method, logs="off")
    error = caught.value
    assert "rank 1" in str(error) and "the weights are of another model" in str(error)
    assert "clean up" not in str(error)
    assert (error.rank, error.phase) == (1, "construct")
    assert type(error.__cause__) is ValueError
    assert "reading the weights" in error.log_tail


SERVICE = """
class Shard:
    def pid(self): return os.getpid()
def give_up(failure):
    say(why=str(failure), healthy=group.healthy)
    os._exit(17)  # whoever supervises this starts it again
group = WorkerGroup(Shard, 2, on_failure=give_up)
say(pids=group.call("pid"))
hear()
"""


def test_a_service_can_end_with_its_group_and_say_so_by_its_status() -> None:
    """The rank dies by a signal while nothing runs: no Python of its own tells anybody."""
    with Script(SERVICE) as script:
        pids = script.line()["pids"]
        with Watch(pids) as watch:
            os.kill(pids[1], signal.SIGABRT)
            told = script.line()
            assert "rank 1" in told["why"] and "SIGABRT" in told["why"]
            assert told["healthy"] is False
            assert script.process.wait(10) == 17
            assert watch.left(10) == []


MORTAL = """
class Shard:
    def take(self, data): return len(data)
group = WorkerGroup(Shard, 2, start_method="forkserver", logs="off")
assert group.call("take", bytes(1 << 20)) == [1 << 20] * 2
say(pids=group.pids)
hear()
"""


def test_fifty_drivers_that_are_killed_leave_nothing() -> None:
    """Nor in /dev/shm: a test that leaves a name there fails (tests/conftest.py)."""
    for _ in range(10):
        scripts = [Script(MORTAL) for _ in range(5)]
        try:
            pids = [pid for script in scripts for pid in script.line()["pids"]]
            with Watch(pids) as watch:
                for script in scripts:
                    script.kill()
                assert watch.left(10) == []
        finally:
            for script in scripts:
                script.__exit__()


def test_a_worker_that_needs_its_time_to_leave_has_it(tmp_path: Path) -> None:
    group = WorkerGroup(Profiler, 2, args=(str(tmp_path / "profile"),))
    began = time.monotonic()
    group.close(timeout=10)
    assert 1.4 < time.monotonic() - began < 9
    for rank in (0, 1):
        lines = (tmp_path / f"profile.{rank}").read_text().splitlines()
        assert lines == [str(part) for part in range(30)]
