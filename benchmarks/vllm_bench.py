"""vLLM on rankwise beside vLLM's own MultiprocExecutor, in one run: a table, and its figures.

    run(case) > python vllm_bench.py --child CASE > one LLM of two ranks > RESULT {json}
    rounds: every case once, then in reverse order, so that what drifts meets all alike

`make bench-vllm` runs it on a small Llama (4 layers x 256, bf16, eager) that knows a text by heart,
with two ranks. Per case: seconds until LLM(...) is ready; time a token and tokens a second with 1,
8 and 32 requests of 100 tokens (median of REPEATS, the first left out); CPU seconds of each kind of
process in the second after the last token; and how long after a rank was killed in a step, by
SIGKILL, the caller heard of it, and with how many lines of log. With `nobind` a token may take a
fifth of a second: FEW tokens are timed there, after as many, and the time of 100 is made of these.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "vllm"))

OURS = "rankwise.vllm.RankwiseExecutor"
CASES = {  # name: executor, VLLM_CPU_OMP_THREADS_BIND, what is measured of it
    "vLLM, bound by hand": ("mp", "0|1", "all"),
    "rankwise, bound by hand": (OURS, "0|1", "all"),
    "rankwise, default": (OURS, "auto", "all"),
    "vLLM, default": ("mp", "auto", "start"),
    "rankwise, nobind": (OURS, "nobind", "one"),
    "vLLM, nobind": ("mp", "nobind", "one"),
}
REQUESTS = (1, 8, 32)
TOKENS = 100
FEW = 20
REPEATS = 5
LIMIT = 120  # seconds for one case


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, help="folder for vllm.json")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--only", help="the cases whose name has this pattern")
    arguments.add_argument("--child", nargs=2, metavar=("CASE", "CHECKPOINT"))
    given = arguments.parse_args()
    if given.child:
        child(*given.child)
        return
    from checkpoint import make

    checkpoint = make(Path(sys.prefix) / "checkpoints" / "zen")
    cases = [case for case in CASES if not given.only or re.search(given.only, case)]
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(given.rounds):
        for case in cases if number % 2 == 0 else cases[::-1]:
            if number and CASES[case][2] != "all":
                continue
            print(f"round {number + 1}: {case}", file=sys.stderr, flush=True)
            found[case].append(run(case, checkpoint))
    figures = {case: merge(results) for case, results in found.items()}
    print(table(figures))
    if given.out:
        text = json.dumps({"machine": machine(), "figures": figures}, indent=1)
        (given.out / "vllm.json").write_text(text + "\n")


def run(case: str, checkpoint: Path) -> dict[str, Any]:
    """One LLM, in a process of its own."""
    bind = CASES[case][1]
    env = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--child", case, str(checkpoint)]
    log = _output(command, env)
    result: dict[str, Any] = {}
    for line in log.splitlines():
        if line.startswith("RESULT "):
            result |= json.loads(line[7:])
    if "ready" not in result:
        reasons = [line for line in log.splitlines() if "Error: " in line]
        result["refused"] = reasons[0].partition("Error: ")[2][:120] if reasons else log[-400:]
    died = re.search(r"DIES at ([\d.]+)", log)
    if died and "heard" in result:
        result["heard"] -= float(died[1])
        after = log[died.end() :]
        result["lines"] = after.count("\n")
        result["tracebacks"] = after.count("Traceback (most recent call last)")
        named = re.search(r"rank 1 \(pid \d+\) was killed by SIGKILL in \w+\(\)", log)
        result["names"] = named[0] if named else ""
    return result


def _output(command: list[str], env: dict[str, str]) -> str:
    """What it has printed, also where it was ended because it took too long."""
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            return process.communicate(timeout=LIMIT)[0]
        except subprocess.TimeoutExpired:
            import psutil

            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
            process.kill()
            return process.communicate()[0]


# -- one LLM ---------------------------------------------------------------------------------------


def child(case: str, checkpoint: str) -> None:
    from drivers import PROMPTS, arm, engine_options
    from vllm import LLM, SamplingParams

    executor, _, what = CASES[case]
    began = time.monotonic()
    llm = LLM(
        **engine_options(
            checkpoint,
            tensor_parallel_size=2,
            distributed_executor_backend=executor,
            disable_log_stats=True,
        )
    )
    tell(ready=time.monotonic() - began)
    if what == "start":
        return
    tokens = TOKENS if what == "all" else FEW
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def generate(count: int) -> float:
        """Seconds for TOKENS tokens of each of `count` requests."""
        prompts = [PROMPTS[at % len(PROMPTS)] for at in range(count)]
        began = time.monotonic()
        llm.generate(prompts, sampling, use_tqdm=False)
        return (time.monotonic() - began) * TOKENS / tokens

    tell(first=generate(1), tokens=tokens)
    for count in REQUESTS if what == "all" else (1,):
        generate(count)
        took = [generate(count) for _ in range(REPEATS if what == "all" else 3)]
        tell(**{f"seconds_{count}": statistics.median(took), f"all_{count}": took})
    generate(1)
    tell(**idle())
    if what != "all":
        return
    llm.collective_rpc(arm, args=(40,))
    try:
        llm.generate(PROMPTS, SamplingParams(max_tokens=400, ignore_eos=True), use_tqdm=False)
    except Exception as error:
        tell(heard=time.time(), told=f"{type(error).__name__}: {error}")


def tell(**result: Any) -> None:
    print("RESULT " + json.dumps(result), flush=True)


def idle() -> dict[str, float]:
    """CPU seconds, by kind of process, in the second from now on."""
    import psutil

    def look() -> dict[int, float]:
        return {pid: time.clock_gettime((~pid << 3) | 2) for pid in kinds}

    kinds: dict[int, str] = {}
    below = psutil.Process().children(recursive=True)
    for one in below:
        title = " ".join(one.cmdline())
        engine = "EngineCore" in title or "EngineCore" in one.name()
        kinds[one.pid] = "engine" if engine else "workers"
    before = look()
    time.sleep(1.0)
    after = look()
    used = {"idle_engine": 0.0, "idle_workers": 0.0}
    for pid, kind in kinds.items():
        used[f"idle_{kind}"] += after[pid] - before[pid]
    return used


# -- what is told ----------------------------------------------------------------------------------


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the rounds; of what is no figure, the last."""
    merged: dict[str, Any] = {}
    for key in {key: None for result in results for key in result}:
        values = [result[key] for result in results if key in result]
        numbers = all(isinstance(value, (int, float)) for value in values)
        merged[key] = round(statistics.median(values), 4) if numbers else values[-1]
    merged["rounds"] = len(results)
    return merged


ROWS = (
    ("ready after", "ready", "{:.1f} s"),
    ("100 tokens, 1 request", "seconds_1", "{:.2f} s"),
    ("time a token, 1 request", "token_1", "{:.2f} ms"),
    ("tokens a second, 1 request", "rate_1", "{:.0f}"),
    ("tokens a second, 8 requests", "rate_8", "{:.0f}"),
    ("tokens a second, 32 requests", "rate_32", "{:.0f}"),
    ("CPU in the second after the last token: workers", "idle_workers", "{:.3f} s"),
    ("CPU in that second: the engine process", "idle_engine", "{:.3f} s"),
    ("a rank is killed in a step: heard after", "heard", "{:.2f} s"),
    ("lines of log after that", "lines", "{:.0f}"),
    ("tracebacks among them", "tracebacks", "{:.0f}"),
)


def table(figures: dict[str, dict[str, Any]]) -> str:
    for one in figures.values():
        for count in REQUESTS:
            if f"seconds_{count}" in one:
                one[f"rate_{count}"] = round(TOKENS * count / one[f"seconds_{count}"], 1)
        if "seconds_1" in one:
            one["token_1"] = round(one["seconds_1"] / TOKENS * 1000, 3)
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for title, key, form in ROWS:
        cells = [
            form.format(one[key]) if key in one else ("does not start" if "refused" in one else "")
            for one in figures.values()
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": version("vllm-cpu"),
        "kernel": platform.release(),
    }


if __name__ == "__main__":
    main()
