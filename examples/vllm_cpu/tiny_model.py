"""Make a tiny random causal language model with a tokenizer of its own, with no network.

    python tiny_model.py OUT [qwen2|llama|opt]

Two layers, hidden size 128, 512 tokens, float32, always the same weights: small enough that vLLM on a CPU answers at
once, and built of the same modules as the real ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

TEXT = [
    "Explain gravity in one sentence.",
    "The quick brown fox jumps over the lazy dog.",
    "Intermediate tensors are captured during model execution.",
]
SHARED = {
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,  # head size 32: vLLM's attention on the CPU wants a multiple of it
}
GATED = SHARED | {"intermediate_size": 256, "num_key_value_heads": 2, "tie_word_embeddings": False}


def make_config(architecture: str) -> PretrainedConfig:
    """The configuration of a tiny model of `architecture`: "qwen2", "llama" or "opt"."""
    if architecture == "qwen2":
        return Qwen2Config(**GATED)
    if architecture == "llama":
        return LlamaConfig(**GATED)
    if architecture == "opt":
        return OPTConfig(ffn_dim=256, word_embed_proj_dim=128, **SHARED)
    raise ValueError(f'architecture is "qwen2", "llama" or "opt", not "{architecture}"')


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows every string, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHARED["vocab_size"],
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def make_model(out: Path, architecture: str = "qwen2") -> Path:
    """Write model and tokenizer into the folder `out`, and return it."""
    logging.disable_progress_bar()
    config = make_config(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write it into")
    parser.add_argument("architecture", nargs="?", choices=["qwen2", "llama", "opt"], default="qwen2")
    options = parser.parse_args()
    make_model(options.out, options.architecture)
