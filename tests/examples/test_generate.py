"""examples/tensor_parallel/generate.py keeps what it promises, run as a user runs it.

It is also the test of transformers' own tensor parallelism inside a group: two ranks that hold half
of a checkpoint each write what one rank with all of it writes.

A start costs some six seconds, nearly all of them the imports of torch and transformers.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.testing import leak_check

# Not imported: that takes as long as a start.
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel" / "generate.py"
CHECKPOINT = EXAMPLE.with_name("checkpoint")
SECONDS = 120  # an import of torch may take ten times as long where others compute too
LIMIT = 3 * SECONDS

pytestmark = [
    pytest.mark.skipif(bool(ABSENT), reason=f"needs {', '.join(ABSENT)}"),
    pytest.mark.limit(LIMIT),
]

PROMPT = "Create a new process"
TEXT = PROMPT + " object and return the result of the call"
TOKENS = 8


class Running:
    """The example in a process of its own, and in a process group, as a terminal's job has.

    Its standard output is a pipe that keeps each write apart and has room for one: whoever reads
    sees what was flushed together, and the example is never further than that ahead of the reader.
    """

    def __init__(self, *options: str) -> None:
        self.reader, writer = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), *options],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": ""},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        os.close(writer)
        self.said = ""

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.reader)
        self.process.kill()
        self.process.communicate()

    def write(self) -> str:
        """The next write, "" at the end."""
        ready, _, _ = select.select([self.reader], [], [], SECONDS)
        assert ready, f"no output for {SECONDS} s after {self.said!r}"
        data = os.read(self.reader, select.PIPE_BUF).decode()
        self.said += data
        return data

    def text(self, tokens: int) -> None:
        """Read until so many tokens of the text are there."""
        while PROMPT not in self.said:
            assert self.write(), self.process.communicate()
        for _ in range(tokens - 1):
            assert self.write()

    def calls(self) -> bool:
        """Read what is there; whether the example then sleeps, as it does in a call alone."""
        while select.select([self.reader], [], [], 0)[0]:
            assert self.write(), self.process.communicate()
        return state(self.process.pid) == "S"

    def end(self) -> tuple[int, str]:
        """All that it still says is read; its exit status and standard error."""
        while self.write():
            pass
        _, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, errors


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# -- a text ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writes() -> list[str]:
    """What one good run has written, each write by itself."""
    found = []
    with leak_check(), Running("--max-new-tokens", str(TOKENS)) as running:
        while said := running.write():
            found.append(said)
        assert running.end() == (0, "")
    return found


def test_the_phases_of_the_start_are_shown_with_their_seconds(writes):
    phases = [
        r"starting 2 ranks",
        r"\(shard rank=0 pid=\d+\) torch \S+, transformers \S+ +\d+\.\d\d s",
        r"\(shard rank=0 pid=\d+\) process group, gloo +\d+\.\d\d s",
        r"ready in \d+\.\d\d s: 806,208 of 1,611,072 weights a rank",
    ]
    assert re.match(r"\n".join(phases) + r"\n\n", "".join(writes))


def test_the_text_comes_token_by_token(writes):
    first = next(index for index, said in enumerate(writes) if PROMPT in said)
    pieces = writes[first : first + TOKENS]
    assert "".join(pieces).endswith("\n\n" + TEXT)
    assert all(re.fullmatch(r" ?\w+", piece) for piece in pieces[1:])


def test_one_process_gives_the_same_tokens(writes):
    _, _, after = "".join(writes).partition(TEXT)
    rate = r"\d+\.\d tokens a second"
    assert re.match(rf"\n\n{TOKENS} tokens, {rate}\n\nstarting 1 rank\n", after)
    assert "1,611,072 of 1,611,072 weights a rank" in after
    assert re.search(rf"\n\nthe same {TOKENS} tokens, {rate}\n$", after)


# -- a mistake ---------------------------------------------------------------------------------


def refused(running: Running) -> str:
    """The one sentence that the example ends with."""
    with running:
        status, errors = running.end()
    assert status == 1
    assert re.fullmatch(r"generate\.py: .+\n", errors), errors
    assert PROMPT not in running.said
    return errors.removeprefix("generate.py: ").rstrip()


def test_a_wrong_path_is_one_sentence(tmp_path):
    for model, why in [
        (tmp_path / "nowhere", "is not a directory"),
        (tmp_path, "has no config.json: not a model directory"),
    ]:
        assert refused(Running("--model", str(model))) == f"{model} {why}"


def test_heads_that_the_ranks_cannot_share_are_one_sentence():
    sentence = "num_attention_heads is 4, which 3 ranks cannot share"
    assert refused(Running("--world-size", "3")) == sentence


@pytest.mark.parametrize(
    "text", ['{"vocab_size": ', "[]", "[" * 100_000], ids=["cut", "list", "deep"]
)
def test_a_broken_config_is_one_sentence(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert refused(Running("--model", str(tmp_path))).startswith(f"cannot read {path}: ")


def test_what_transformers_refuses_is_one_sentence(tmp_path):
    """Weights that are cut off, and a number that is none: side by side, a start is dear."""
    models = [Path(shutil.copytree(CHECKPOINT, tmp_path / name)) for name in ("cut", "none")]
    os.truncate(models[0] / "model.safetensors", 1_000_000)
    config = (models[1] / "config.json").read_text().replace("2048", '"2k"')
    (models[1] / "config.json").write_text(config)
    running = [Running("--model", str(model)) for model in models]
    cut, none = [refused(each) for each in running]
    assert re.fullmatch(f"cannot load {models[0]}: .*file not fully covered", cut)
    assert re.fullmatch(f"cannot load {models[1]}: .*vocab_size.*2k.*", none)


# -- an end before the end ---------------------------------------------------------------------


def test_control_c_while_it_writes_ends_all_quietly():
    with Running("--max-new-tokens", "200") as running:
        running.text(3)
        mapped = Path(f"/proc/{running.process.pid}/maps").read_text()
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.end() == (130, "")
    assert "tokens a second" not in running.said
    assert running.said.endswith("\n")
    assert "torch" not in mapped  # only its workers have it


def test_a_rank_that_is_killed_while_it_writes_is_told_in_one_sentence():
    with Running("--max-new-tokens", "200") as running:
        running.text(3)
        rank = int(re.search(r"rank=0 pid=(\d+)", running.said)[1])
        # Stopped, so that it owes the answer to a call as soon as its driver waits for one.
        os.kill(rank, signal.SIGSTOP)
        until(lambda: state(rank) == "T")
        until(running.calls)
        os.kill(rank, signal.SIGKILL)
        status, errors = running.end()
    assert status == 1
    told = rf"rank 0 \(pid {rank}\) was killed by SIGKILL in next_token\(\) \(call \d+\)"
    assert re.fullmatch(rf"generate\.py: shard: {told}.*\n", errors), errors
    assert running.said.endswith("\n")  # the sentence has a line of its own
    assert "tokens a second" not in running.said
