"""Make a small Llama that knows one text by heart: what the tests and the benchmark run.

    python tests/vllm/checkpoint.py FOLDER      (nothing is done where it is there already)

4 layers x 256, 8 heads (4 of keys), bf16. The sums of a step differ in their last bits with the
number of ranks. With random weights the largest logit hangs on these; with a text known by heart it
stands out, and only if attention is right, in every layer and on every rank. Within a minute, once;
on one thread, so that it is the same one each time.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

LAYERS = 4
HIDDEN = 256
VOCABULARY = 512
STEPS = 600
MARGIN = 1.5  # logits: twelve steps of bf16 at their size
CHECKED = 100  # tokens after each prompt
BATCH, WINDOW = 4, 128  # pieces of the text a step; tokens of each: a prompt and what is checked

PROMPTS = [
    "Beautiful is better than",
    "Explicit is better than",
    "Errors should never pass",
    "In the face of ambiguity",
    "Now is better than never",
    "Special cases aren't special",
    "If the implementation is hard",
    "There should be one",
]


def text() -> str:
    """The Zen of Python, which every Python has."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return "".join(this.d.get(char, char) for char in this.s)


TEXT = text()


def make(folder: Path) -> Path:
    """The checkpoint in `folder`, made if it is not there."""
    if (folder / "ready").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    ids = tokenizer.encode(TEXT).ids
    twice = torch.tensor(ids * 2)  # after its end it begins again
    goes_on = [_places(ids, tokenizer.encode(prompt).ids) for prompt in PROMPTS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, STEPS + 1):
        # From anywhere in the text: what is learnt is what comes next, not what comes where.
        begins = torch.randint(0, len(ids), (BATCH, 1))
        part = twice[begins + torch.arange(WINDOW)]
        loss = model(input_ids=part, labels=part).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            least = _margin(model, twice, goes_on)
            print(f"step {step}: loss {loss.item():.4f}, margin {least:.2f}", file=sys.stderr)
            if least > MARGIN:
                break
    else:
        raise RuntimeError(f"after {STEPS} steps the model does not know its text by heart")
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "ready").touch()
    return folder


def _places(ids: list[int], prompt: list[int]) -> tuple[int, int]:
    """Where `prompt` begins in the text, and its length."""
    (begin,) = [at for at in range(len(ids)) if ids[at : at + len(prompt)] == prompt]
    return begin, len(prompt)


def _margin(model: Any, twice: Any, goes_on: list[tuple[int, int]]) -> float:
    """By how much the logit of the text's next token stands out, at least, after the prompts.

    Where it is the largest at each place, greedy decoding says the text: one pass tells."""
    import copy

    import torch

    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    margins = []
    for begin, length in goes_on:
        part = twice[begin : begin + length + CHECKED]
        with torch.no_grad():
            logits = rounded(input_ids=part[None]).logits[0, length - 1 : -1].float()
        right = part[length:, None]
        other = logits.scatter(1, right, float("-inf")).max(1).values
        margins.append(float((logits.gather(1, right)[:, 0] - other).min()))
    return min(margins)


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
