"""vLLM itself, in processes of its own: each test drives one and looks at what is left of it.

    test > Drive: python drivers.py WHAT CHECKPOINT ... > EVENT {json} lines > `event`
                     `> EngineCore > launcher > ranks                          > `processes`, `log`

Run by `make test-vllm`, in its own environment: the rest of the tests never sees vLLM.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoint import make

HERE = Path(__file__).parent
EXECUTOR = "rankwise.vllm.RankwiseExecutor"
DRIVERS = [sys.executable, str(HERE / "drivers.py")]
START = 300  # seconds that a start may take on a machine that does other things too


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return make(Path(sys.prefix) / "checkpoints" / "zen")


class Drive:
    """A process that runs vLLM; its output is kept, and what it says in EVENT lines is told."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._events: queue.SimpleQueue[tuple[float, dict[str, Any]] | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | env,
            stdin=subprocess.PIPE,  # a driver that waits reads a line
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("EVENT "):
                self._events.put((time.time(), json.loads(line[6:])))
        self._events.put(None)

    def event(self, name: str, timeout: float = START) -> tuple[float, Any]:
        """When it has told of `name`, and what."""
        until = time.monotonic() + timeout
        while True:
            try:
                item = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                item = None
            assert item is not None, f"no {name} in {timeout} s:\n{self.log()[-8000:]}"
            if item[1]["name"] == name:
                return item[0], item[1]["value"]

    def go_on(self) -> None:
        """Let a driver that waits do what comes next."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def log(self) -> str:
        return "".join(self.lines)

    def processes(self) -> list[psutil.Process]:
        """All that descend from it, itself first."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def named(self, *names: str) -> list[psutil.Process]:
        """Those that vLLM calls so."""
        titles = {_title(one): one for one in self.processes()}
        return [titles[f"VLLM::{name}"] for name in names]

    def wait(self, timeout: float = 60) -> int:
        code = self.process.wait(timeout)
        self._reader.join(20)
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            for one in reversed(self.processes()):
                one.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


@pytest.fixture
def drive(checkpoint: Path) -> Iterator[Any]:
    """`drive("tokens", 2)`: vLLM driven by `drivers.tokens`, with the checkpoint and `2`."""
    made: list[Drive] = []

    def start(what: str, *args: object, **env: str) -> Drive:
        made.append(Drive([*DRIVERS, what, str(checkpoint), *map(str, args)], env))
        return made[-1]

    yield start
    for one in made:
        one.end()


@pytest.fixture
def serve(checkpoint: Path) -> Iterator[Any]:
    """`serve(port, *flags)`: the OpenAI-compatible server."""
    made: list[Drive] = []

    def start(port: int, *flags: str, **env: str) -> Drive:
        program = str(Path(sys.executable).parent / "vllm")
        command = [program, "serve", str(checkpoint), "--port", str(port), "--host", "127.0.0.1"]
        command += ["--enforce-eager", "--max-model-len", "512", "--dtype", "bfloat16"]
        command += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "zen"]
        made.append(Drive([*command, *flags], env))
        return made[-1]

    yield start
    for one in made:
        one.end()


def gone(processes: list[psutil.Process], within: float) -> list[psutil.Process]:
    """Those that still run `within` seconds later."""
    _, alive = psutil.wait_procs(processes, timeout=within)
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def names_left() -> Iterator[None]:
    """Removes what vLLM's workers name in /dev/shm and, killed, leave there under any executor."""
    before = set(os.listdir("/dev/shm"))
    yield
    for name in set(os.listdir("/dev/shm")) - before:
        if "cpushm" in name or name.startswith("psm_"):
            os.unlink(f"/dev/shm/{name}")


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)
