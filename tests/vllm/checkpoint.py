"""Make a small Llama of random weights, with a tokenizer: what the tests and the benchmark run.

    python tests/vllm/checkpoint.py FOLDER      (nothing is done where it is there already)

4 layers x 256, 8 heads (4 of keys), bf16. Greedy sampling must not hang on the last bit of a sum,
which differs with the number of ranks: so the weights are such that one logit stands out.
"""

from __future__ import annotations

import sys
from pathlib import Path

LAYERS = 4
HIDDEN = 256
VOCABULARY = 512


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
    here = Path(__file__).read_text()
    tokenizer.train_from_iterator([here], trainer)
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
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "ready").touch()
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
