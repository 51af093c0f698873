"""Make a small Llama that knows one text by heart: what the tests and the benchmark run.

    python tests/vllm/checkpoint.py FOLDER      (nothing is done where it is there already)

4 layers x 256, 8 heads (4 of keys), bf16. The sums of a step differ in their last bits with the
number of ranks. With random weights the largest logit hangs on these; with a text known by heart it
stands out, and only if attention is right, in every layer and on every rank. Minutes, once.
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
STEPS = 1500
ENOUGH = 0.05  # mean loss
MARGIN = 1.5  # logits: twelve steps of bf16 at their size
CHECKED = 100  # tokens after each prompt

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
    twice = torch.tensor([ids * 2])  # after its end it begins again
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, STEPS + 1):
        # From anywhere in the text: what is learnt is what comes next, not what comes where.
        begin = int(torch.randint(0, len(ids), ()))
        part = twice[:, begin : begin + len(ids)]
        loss = model(input_ids=part, labels=part).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 and loss.item() < ENOUGH:
            least = _margin(model, [tokenizer.encode(prompt).ids for prompt in PROMPTS])
            print(f"step {step}: loss {loss.item():.4f}, margin {least:.2f}", file=sys.stderr)
            if least > MARGIN:
                break
    else:
        raise RuntimeError(f"after {STEPS} steps the model does not know its text by heart")
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "ready").touch()
    return folder


def _margin(model: Any, prompts: list[list[int]]) -> float:
    """By how much the largest logit stands out, at least, in what the prompts go on with."""
    import copy

    import torch

    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    margins = []
    for ids in prompts:
        out = rounded.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=CHECKED,
            min_new_tokens=CHECKED,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=1,
        )
        best = torch.cat(out.logits).float().topk(2).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
    return min(margins)


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
