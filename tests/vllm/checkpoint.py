"""Make a small Llama that knows one text by heart: what the tests and the benchmark run.

    python tests/vllm/checkpoint.py FOLDER      (nothing is done where it is there already)

4 layers x 256, 8 heads (4 of keys), bf16. The sums of a step differ in their last bits with the
number of ranks. With random weights the largest logit hangs on these; with a text known by heart it
stands out, and only if attention is right, in every layer and on every rank. It takes a minute.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

LAYERS = 4
HIDDEN = 256
VOCABULARY = 512
STEPS = 600
ENOUGH = 0.02  # mean loss: the next token has a probability of 98 %


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
    tokens = torch.tensor([[0, *tokenizer.encode(TEXT).ids, 1]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        # From anywhere in the text: what is learnt is what comes next, not what comes where.
        begin = int(torch.randint(0, tokens.shape[1] // 2, ()))
        loss = model(input_ids=tokens[:, begin:], labels=tokens[:, begin:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < ENOUGH:
            break
    else:
        raise RuntimeError(f"after {STEPS} steps the mean loss is {loss.item():.3f}, not {ENOUGH}")
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "ready").touch()
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
