"""Tiny models of many architectures, with random weights: nothing is downloaded.

>>> model, inputs = build("llama", torch.float32)
>>> model(**inputs).logits.shape
torch.Size([2, 16, 96])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SEED = 1234
BATCH, LENGTH, VOCABULARY = 2, 16, 96
HIDDEN, HEADS, LAYERS, FEED_FORWARD = 64, 4, 2, 128
IMAGE, PATCH = 32, 8

Inputs = dict[str, Tensor]


class Architecture(NamedTuple):
    model: str
    """A class of transformers."""
    config: dict[str, Any]
    """What its config is made of; the rest is as that class has it."""
    inputs: Callable[[], Inputs]


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """The model in eval mode and its keyword arguments, the same at every call."""
    import transformers

    architecture = ARCHITECTURES[name]
    torch.manual_seed(SEED)
    kind = getattr(transformers, architecture.model)
    model = kind(kind.config_class(**architecture.config))
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # else all biases are zero and all norms one, and could be taken for another
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    inputs = architecture.inputs()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return model.eval().to(dtype), inputs


def tokens() -> Inputs:
    return {"input_ids": torch.randint(5, VOCABULARY, (BATCH, LENGTH))}


def few_tokens() -> Inputs:
    """For models that loop over the sequence in Python, each round of which is compiled."""
    return {"input_ids": torch.randint(5, VOCABULARY, (BATCH, 6))}


def padded_tokens() -> Inputs:
    """The second row is shorter than the first."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, LENGTH // 2 :] = 0
    return {**tokens(), "attention_mask": mask}


def source_and_target() -> Inputs:
    return {**padded_tokens(), "decoder_input_ids": torch.randint(5, VOCABULARY, (BATCH, LENGTH // 2))}


def image() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE)}


def image_and_text() -> Inputs:
    return {**image(), **padded_tokens()}


def waveform() -> Inputs:
    return {"input_values": torch.randn(BATCH, 800)}


def spectrogram_and_target() -> Inputs:
    return {
        "input_features": torch.randn(BATCH, 16, 2 * LENGTH),
        "decoder_input_ids": torch.randint(5, VOCABULARY, (BATCH, LENGTH // 2)),
    }


_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_TRANSFORMER = _BLOCKS | {"intermediate_size": FEED_FORWARD}
_POSITIONS = {"max_position_embeddings": 4 * LENGTH}

_DECODER = _TEXT | _TRANSFORMER | _POSITIONS
_GROUPED = _DECODER | {"num_key_value_heads": HEADS // 2}
_HEAD = {"head_dim": HIDDEN // HEADS}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_ENCODER = _TEXT | _TRANSFORMER | _POSITIONS
_VISION = _TRANSFORMER | {"image_size": IMAGE, "patch_size": PATCH}
_SPEECH = {
    **_TRANSFORMER,
    "vocab_size": VOCABULARY,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_STATES = _TEXT | {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8}

ARCHITECTURES = {
    # Decoders
    "llama": Architecture("LlamaForCausalLM", _GROUPED, tokens),
    "qwen2": Architecture("Qwen2ForCausalLM", _GROUPED, padded_tokens),
    "qwen3": Architecture("Qwen3ForCausalLM", _GROUPED | _HEAD, tokens),
    "mistral": Architecture("MistralForCausalLM", _GROUPED | {"sliding_window": 8}, tokens),
    "gemma2": Architecture("Gemma2ForCausalLM", _GROUPED | _HEAD | {"sliding_window": 8}, tokens),
    "gemma3_text": Architecture("Gemma3ForCausalLM", _GROUPED | _HEAD | {"sliding_window": 8}, tokens),
    "gpt2": Architecture(
        "GPT2LMHeadModel", _TEXT | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}, tokens
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        _TEXT | _BLOCKS | _POSITIONS | {"ffn_dim": FEED_FORWARD, "word_embed_proj_dim": HIDDEN},
        padded_tokens,
    ),
    "phi3": Architecture("Phi3ForCausalLM", _GROUPED, tokens),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", _DECODER, tokens),
    "gptj": Architecture(
        "GPTJForCausalLM",
        _TEXT | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "rotary_dim": 8},
        tokens,
    ),
    "bloom": Architecture(
        "BloomForCausalLM", _TEXT | {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}, tokens
    ),
    "falcon": Architecture("FalconForCausalLM", _TEXT | _BLOCKS, tokens),
    "olmo2": Architecture("Olmo2ForCausalLM", _GROUPED, tokens),
    "starcoder2": Architecture("Starcoder2ForCausalLM", _GROUPED, tokens),
    "cohere": Architecture("CohereForCausalLM", _GROUPED, tokens),
    "stablelm": Architecture("StableLmForCausalLM", _GROUPED, tokens),
    # Encoders
    "bert": Architecture("BertForMaskedLM", _ENCODER, padded_tokens),
    "roberta": Architecture("RobertaForSequenceClassification", _ENCODER, padded_tokens),
    "albert": Architecture("AlbertModel", _ENCODER | {"embedding_size": HIDDEN // 2}, padded_tokens),
    "deberta_v2": Architecture(
        "DebertaV2Model",
        _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        padded_tokens,
    ),
    "electra": Architecture("ElectraForPreTraining", _ENCODER | {"embedding_size": HIDDEN // 2}, padded_tokens),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        _POSITIONS
        | {"vocab_size": VOCABULARY, "pad_token_id": 0, "dim": HIDDEN, "n_layers": LAYERS}
        | {"n_heads": HEADS, "hidden_dim": FEED_FORWARD},
        padded_tokens,
    ),
    "modernbert": Architecture("ModernBertModel", _ENCODER | {"cls_token_id": 1, "sep_token_id": 2}, padded_tokens),
    "longformer": Architecture(
        "LongformerModel", _ENCODER | {"attention_window": 8}, padded_tokens
    ),  # has graph breaks
    "xlm": Architecture(  # has a graph break
        "XLMModel", {"vocab_size": VOCABULARY, "emb_dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS}, padded_tokens
    ),
    # Encoders with decoders
    "t5": Architecture(
        "T5ForConditionalGeneration",
        _TEXT
        | {"d_model": HIDDEN, "d_kv": 16, "d_ff": FEED_FORWARD, "num_layers": LAYERS, "num_heads": HEADS}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        source_and_target,
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        _TEXT
        | _POSITIONS
        | {"d_model": HIDDEN, "decoder_start_token_id": 2, "forced_eos_token_id": None}
        | {
            f"{side}_{size}": value
            for side in ("encoder", "decoder")
            for size, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", FEED_FORWARD))
        },
        source_and_target,
    ),
    # Mixtures of experts
    "mixtral": Architecture("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}, tokens),
    "mixtral_loop": Architecture(  # one expert after the other: a graph break in each round
        "MixtralForCausalLM", _GROUPED | {"num_local_experts": 4, "experts_implementation": "eager"}, tokens
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        _GROUPED | _EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        tokens,
    ),
    "olmoe": Architecture("OlmoeForCausalLM", _GROUPED | _EXPERTS, tokens),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        _DECODER
        | {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
        | {"topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": HEADS},
        tokens,
    ),
    # State spaces
    "mamba": Architecture("MambaForCausalLM", _STATES | {"time_step_rank": 4}, few_tokens),
    "mamba2": Architecture(
        "Mamba2ForCausalLM", _STATES | {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}, tokens
    ),
    "falcon_mamba": Architecture("FalconMambaForCausalLM", _STATES | {"time_step_rank": 4}, few_tokens),
    # Vision
    "vit": Architecture("ViTForImageClassification", _VISION, image),
    "dinov2": Architecture("Dinov2Model", _VISION, image),
    "swin": Architecture(
        "SwinModel",
        {
            "image_size": IMAGE,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        image,
    ),
    "convnext": Architecture("ConvNextModel", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, image),
    "resnet": Architecture(
        "ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, image
    ),
    "clip_vision": Architecture("CLIPVisionModel", _VISION, image),
    "clip": Architecture(
        "CLIPModel", {"text_config": _ENCODER, "vision_config": _VISION, "projection_dim": 32}, image_and_text
    ),
    # Audio
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        _TEXT
        | {"d_model": HIDDEN, "num_mel_bins": 16, "max_source_positions": LENGTH, "max_target_positions": 64}
        | {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
        | {
            f"{side}_{size}": value
            for side in ("encoder", "decoder")
            for size, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", FEED_FORWARD))
        },
        spectrogram_and_target,
    ),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", _SPEECH, waveform),
    "hubert": Architecture("HubertModel", _SPEECH, waveform),
}
"""By name."""
