"""How it ends: a rank is killed in a step, the engine is killed, the server is told to stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import time

import pytest
from conftest import START, gone, kill

pytestmark = pytest.mark.limit(900)


def test_a_rank_that_dies_in_a_step_is_heard_of_at_once(names_left, drive):
    vllm = drive("dies_in_step", 40)
    vllm.event("armed")
    everything = vllm.processes()[1:]
    vllm.go_on()
    when, kind, text = vllm.event("heard")[1]
    assert kind == "EngineDeadError", text
    vllm.event("over")
    vllm.wait()
    assert gone(everything, 2) == []
    died = float(re.search(r"DIES at ([\d.]+)", vllm.log())[1])
    assert when - died < 0.3, f"heard after {when - died:.2f} s"
    after = vllm.log().partition("DIES at")[2]
    told = [
        line
        for line in after.splitlines()
        if re.search(r"vllm: rank 1 \(pid \d+\) was killed by SIGKILL in execute_model\(\)", line)
        and " ERROR " in line
        and "_vllm" not in line
        and "WorkerDied" not in line
    ]
    assert len(told) == 1, "\n".join(told)
    # vLLM's own log of it, and multiprocessing's print of the same as the engine process ends.
    tracebacks = [line for line in after.splitlines() if "Traceback (most recent" in line]
    assert len(tracebacks) <= 2, "\n".join(tracebacks)
    assert not [line for line in tracebacks if "(vllm rank=" in line], "no rank has one"


def test_an_idle_rank_that_dies_is_heard_of(names_left, drive):
    vllm = drive("idles")
    vllm.event("idle")
    everything = vllm.processes()[1:]
    (rank,) = vllm.named("Worker_TP1")
    killed = time.time()
    kill(rank)
    when, kind = vllm.event("heard")[1]
    assert kind == "EngineDeadError"
    assert when - killed < 1.0, f"heard after {when - killed:.2f} s"
    assert re.search(rf"rank 1 \(pid {rank.pid}\) was killed by SIGKILL", vllm.log())
    vllm.event("over")
    vllm.wait()
    assert gone(everything, 2) == []


def test_a_killed_engine_leaves_nothing(names_left, drive):
    vllm = drive("waits")
    vllm.event("running")
    (engine,) = vllm.named("EngineCore")
    below = engine.children(recursive=True)
    assert {*vllm.named("Worker_TP0", "Worker_TP1")} <= {*below}
    kill(engine)
    assert gone([engine, *below], 1.0) == [], "a second later"


# By default vLLM's server kills its engine, and all below it, as soon as it has asked it to end.
@pytest.mark.parametrize("flags", [(), ("--shutdown-timeout", "30")], ids=["at once", "in order"])
def test_the_server_answers_and_stops(serve, names_left, flags):
    from openai import OpenAI

    names = set(os.listdir("/dev/shm"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve(
        port, "--tensor-parallel-size", "2",
        "--distributed-executor-backend", "rankwise.vllm.RankwiseExecutor", *flags,
    )  # fmt: skip
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    _until_ready(server, client)
    done = client.completions.create(
        model="zen", prompt="Beautiful is better than", max_tokens=12, temperature=0
    )
    assert "ugly" in done.choices[0].text
    chunks = client.chat.completions.create(
        model="zen",
        messages=[{"role": "user", "content": "Explicit is better than"}],
        max_tokens=12,
        temperature=0,
        stream=True,
    )
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len([part for part in parts if part]) > 3
    everything = server.processes()
    assert {*server.named("Worker_TP0", "Worker_TP1")} <= {*everything}
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    server.wait(60)
    assert gone(everything, 5) == [], f"{time.monotonic() - began:.1f} s after SIGTERM"
    if flags:
        assert "force killing" not in server.log()
        assert set(os.listdir("/dev/shm")) - names == set()


def _until_ready(server, client):
    from openai import APIConnectionError

    until = time.monotonic() + START
    while True:
        assert server.process.poll() is None, server.log()[-8000:]
        assert time.monotonic() < until, server.log()[-8000:]
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(0.2)  # there is nothing to wait on: a port that is not open yet
