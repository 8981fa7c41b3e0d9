"""Qwen2s of known sizes, for engines that give them dummy weights."""

from __future__ import annotations

from typing import Any

SHAPES = {"tiny": (128, 256, 2, 2, 1), "0.5b": (896, 4864, 24, 14, 2), "7b": (3584, 18944, 28, 28, 4)}
"""Hidden size, inner size, layers, heads, key-value heads."""


def model_config(size: str) -> dict[str, Any]:
    hidden, inner, layers, heads, groups = SHAPES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": size != "7b",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
