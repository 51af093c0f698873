"""Tensor-parallel text generation from a plain script: no torchrun, no ``__main__`` guard.

    python generate.py [--model DIR] [--world-size N] [--prompt TEXT] [--max-new-tokens N]

Each rank of a ``WorkerGroup`` holds its part of every matrix, split by transformers' own tensor
parallelism, and the keys and values of the text so far. The driver never imports torch: it asks
for one token a call, of all ranks at once, and prints the answer of rank 0.

    driver                      rank 0                    rank 1
    prefill(prompt)   ======>   its part  > all-reduce <  its part
              token   <======   argmax                    the same argmax, not sent
    next_token()      ======>   ...

When the text is done, a second group of one rank writes it again: the tokens must be the same.
Needs torch, transformers and accelerate, which transformers asks for when it splits a model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from rankwise import WorkerGroup, WorkerGroupError, worker_info

# transformers reads these when it is imported: errors only, no progress bars, no network.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
}

# Forked from a launcher that has imported these once. transformers is a lazy package, and its
# `modeling_utils` the heavy part of it.
START: dict[str, Any] = {
    "name": "shard",
    "start_method": "forkserver",
    "preload": ("torch", "transformers.modeling_utils"),
}


class Task(NamedTuple):
    """What both groups are to do."""

    model: Path
    text: str
    prompt: list[int]  # `text` as tokens
    limit: int  # so many new ones at most
    stop: list[int]  # those that end a text
    placement: dict[str, Any]


class Shard:
    """One rank's part of the model, and the cache of the text that all ranks are writing."""

    def __init__(self, path: str, began: float) -> None:
        """Load this rank's part of the checkpoint in `path`; ValueError says why it cannot be.

        `began` is when the driver started the group: all processes share the monotonic clock.
        """
        import torch
        import transformers

        import rankwise.torch

        began = report(f"torch {torch.__version__}, transformers {transformers.__version__}", began)
        rankwise.torch.init_process_group()
        report(f"process group, {torch.distributed.get_backend()}", began)
        self.model: Any = load(path)
        self.model.to(rankwise.torch.device())  # one rank alone is loaded on the CPU

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        torch.distributed.destroy_process_group()

    def weights(self) -> tuple[int, int]:
        """How many numbers this rank holds, and the whole model."""
        parts = (p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters())
        return sum(part.numel() for part in parts), self.model.num_parameters()

    def prefill(self, prompt: list[int]) -> int:
        """Forget the last text, read `prompt` and return the token that follows it."""
        self.cache: Any = None
        return self._follow(prompt)

    def next_token(self) -> int:
        """The token after the one returned last."""
        return self._follow([self.last])

    def _follow(self, ids: list[int]) -> int:
        import torch

        # Without gradients, transformers multiplies plain local tensors; with them, every layer
        # goes through DTensor.
        with torch.inference_mode():
            row = torch.tensor([ids], device=self.model.device)
            out = self.model(input_ids=row, cache=self.cache, use_cache=True)
            self.cache = out.cache
            self.last = int(out.logits[0, -1].argmax())
        return self.last


def load(path: str) -> Any:
    """The model, this rank's part of it; whatever is wrong with the files is one ValueError.

    float32, because the order in which parts are added up differs with the number of ranks, and
    rounding in half precision would now and then show as another token.
    """
    import torch
    import transformers
    from transformers.distributed import DistributedConfig

    auto: Any = transformers.AutoModelForCausalLM
    # It fills the parameters that the files lack, before it tells which these are.
    warnings.filterwarnings("ignore", message="DTensor random operators")
    try:
        model, found = auto.from_pretrained(
            path,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are listed in `found`, by name
            output_loading_info=True,
            # The size of the mesh is WORLD_SIZE, its process group the one that we have joined.
            distributed_config=DistributedConfig(tp_plan="auto"),
        )
    except Exception as error:
        raise ValueError(f"cannot load {path}: {first_sentence(error)}") from error
    # A layer that lacks its weights would only be a warning, and nonsense as text.
    for kind in ("mismatched", "missing", "unexpected"):
        if keys := sorted(found[f"{kind}_keys"]):
            name = keys[0] if isinstance(keys[0], str) else keys[0][0]
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise ValueError(f"the weights in {path} do not fit config.json: {kind} {name}{more}")
    return model


def report(phase: str, began: float) -> float:
    """Print on rank 0 how long a phase took; returns the time now."""
    now = time.monotonic()
    if worker_info().rank == 0:
        print(f"{phase:<44} {now - began:6.2f} s", flush=True)
    return now


def give_up(why: str) -> NoReturn:
    """One sentence on stderr, exit status 1."""
    sys.exit(f"generate.py: {why}")


def first_sentence(error: BaseException) -> str:
    """Up to a full stop or the end of the line; a line that ends in a colon goes on in the next."""
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip() or type(error).__name__)
    return re.split(r"(?<=[.!])\s|\n", text)[0]


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` and, over it, `generation_config.json` where there is one."""
    if not directory.is_dir():
        give_up(f"{directory} is not a directory")
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
            settings |= content
        except FileNotFoundError:
            if name == "config.json":
                give_up(f"{directory} has no config.json: not a model directory")
        except (OSError, ValueError, RecursionError) as error:
            give_up(f"cannot read {file}: {first_sentence(error)}")
    return settings


def read_tokenizer(directory: Path) -> Tokenizer:
    """`tokenizer.json`, without the libraries that would import torch."""
    file = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        give_up(f"cannot read {file}: {first_sentence(error)}")


def check(config: dict[str, Any], prompt: list[int], world_size: int, limit: int) -> None:
    """What would fail in the workers, or worse, not fail: told before any of them is started."""
    if world_size < 1 or limit < 1:
        give_up("--world-size and --max-new-tokens must be at least 1")
    numbers = {name: n for name, n in config.items() if isinstance(n, int)}  # and else it fails
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := numbers.get(name, 0)) % world_size:
            give_up(f"{name} is {heads}, which {world_size} ranks cannot share")
    if not prompt:
        give_up("the prompt is empty")
    if max(prompt) >= numbers.get("vocab_size", sys.maxsize):
        give_up("tokenizer.json has more tokens than the vocab_size in config.json")
    room = numbers.get("max_position_embeddings", sys.maxsize)
    if len(prompt) + limit > room:
        give_up(f"{len(prompt)} tokens of prompt and {limit} new ones exceed the model's {room}")


def placement(world_size: int) -> dict[str, Any]:
    """A GPU a rank where there are enough of them, else the CPU for all.

    Hidden, not just unused: transformers binds rank i to GPU i as soon as torch sees any.
    """
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([item for item in visible.split(",") if item.strip()]))
    if gpus >= world_size:
        return {"devices": "shared", "env": QUIET}
    return {"env": QUIET | {"CUDA_VISIBLE_DEVICES": ""}}


def decode(group: WorkerGroup, task: Task) -> Iterator[int]:
    """Greedy tokens, each as soon as rank 0 has it: all ranks run a call, one of them answers."""
    head = group.options(reply_from=0)
    token = head.call(Shard.prefill, task.prompt)
    yield token
    for _ in range(task.limit - 1):
        if token in task.stop:
            return
        token = head.call(Shard.next_token)
        yield token


def write(task: Task, world_size: int, shown_by: Tokenizer | None) -> tuple[list[int], str]:
    """Start so many ranks, show the text as it comes, end them; its tokens and their rate."""
    text = DecodeStream(task.prompt, skip_special_tokens=True)
    tokens: list[int] = []
    times: list[float] = []
    began = time.monotonic()
    print(f"starting {world_size} {'ranks' if world_size > 1 else 'rank'}", flush=True)
    start = START | task.placement | {"args": (str(task.model), began)}
    with WorkerGroup(Shard, world_size, **start) as group:
        part, whole = group[0].call(Shard.weights)
        print(f"ready in {time.monotonic() - began:.2f} s: {part:,} of {whole:,} weights a rank\n")
        for token in decode(group, task):
            times.append(time.monotonic())
            tokens.append(token)
            if shown_by is not None:
                opening = task.text if len(tokens) == 1 else ""
                print(opening + (text.step(shown_by, token) or ""), end="", flush=True)
    if len(times) < 2:
        return tokens, "too few to tell the rate"
    # The first took the whole prompt.
    return tokens, f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens a second"


def run(options: argparse.Namespace) -> None:
    """Check what can be checked at once, write, and write again with one rank."""
    config = read_config(options.model)
    tokenizer = read_tokenizer(options.model)
    prompt = tokenizer.encode(options.prompt).ids
    check(config, prompt, options.world_size, options.max_new_tokens)
    eos = config.get("eos_token_id")
    stop = eos if isinstance(eos, list) else [eos]
    where = placement(options.world_size)
    task = Task(options.model, options.prompt, prompt, options.max_new_tokens, stop, where)
    tokens, rate = write(task, options.world_size, shown_by=tokenizer)
    print(f"\n\n{len(tokens)} tokens, {rate}\n")
    if options.world_size == 1:
        return
    alone, rate = write(task, 1, shown_by=None)
    if alone != tokens:
        same = next(i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b)
        give_up(f"one rank alone writes another token after {same} equal ones")
    print(f"the same {len(tokens)} tokens, {rate}")


parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("--model", type=Path, default=Path(__file__).with_name("checkpoint"))
parser.add_argument("--world-size", type=int, default=2)
parser.add_argument("--prompt", default="Create a new process")
parser.add_argument("--max-new-tokens", type=int, default=96)
try:
    run(parser.parse_args())
except WorkerGroupError as error:  # its cause is what the rank itself raised
    print(flush=True)  # the text may have ended in the middle of a line
    give_up(first_sentence(error.__cause__ or error))
except KeyboardInterrupt:
    print()
    sys.exit(130)
