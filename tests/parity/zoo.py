"""Tiny random models of transformers' families, for tests: two layers, 256 tokens, float32, saved as checkpoints.

Weights are drawn wide, so that attention and position matter to every logit, and from a seed for which the two best
logits of every greedy step of the parity tests lie at least ``MARGIN`` apart: then equal text is not a matter of luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

VOCAB = 256
MARGIN = 1e-3
WINDOW = 40  # shorter than the longest prompts, and no multiple of the page size
LONG = 768  # positions: 300 of the prompt, 200 of the text, and room

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LONG,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}


def _gpt2() -> PretrainedConfig:
    return GPT2Config(
        vocab_size=VOCAB, n_positions=LONG, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip


def _phi3(**scaling: Any) -> PretrainedConfig:
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **(scaling or {"rope_type": "default"})}
    original = {"original_max_position_embeddings": scaling.get("original_max_position_embeddings", LONG)}
    return Phi3Config(**_GROUPED, **original, sliding_window=WINDOW, rope_parameters=rope)


def _longrope(original: int) -> Callable[[], PretrainedConfig]:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + 0.7 * i for i in range(6)]}
    return lambda: _phi3(
        rope_type="longrope", original_max_position_embeddings=original, attention_factor=1.1, **factors
    )


def _gemma2() -> PretrainedConfig:
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0, "query_pre_attn_scalar": 20}
    return Gemma2Config(**_GROUPED, **caps, head_dim=16, sliding_window=WINDOW, tie_word_embeddings=False)


def _experts() -> dict[str, Any]:
    return _GROUPED | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Tiny:
    """A family's configuration and the seed of its weights."""

    configure: Callable[[], PretrainedConfig]
    seed: int = 0


FAMILIES = {
    "gpt2": Tiny(_gpt2, 3),
    "gpt_neox": Tiny(lambda: GPTNeoXConfig(**_COMMON), 10),
    "phi3": Tiny(_phi3, 24),
    "phi3_longrope_short": Tiny(_longrope(LONG), 0),  # the longest text fits the original length
    "phi3_longrope_long": Tiny(_longrope(1), 6),  # it does not, nor does any: transformers, too, takes the long factors
    "gemma2": Tiny(_gemma2, 0),
    "olmo2": Tiny(lambda: Olmo2Config(**_GROUPED), 1),
    "mixtral": Tiny(lambda: MixtralConfig(**_experts(), sliding_window=WINDOW), 4),
    "qwen3_moe": Tiny(lambda: Qwen3MoeConfig(**_experts(), head_dim=16, decoder_sparse_step=2), 6),
}

_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip

# model types with something that the families above lack, and their options
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere2": _MIXED | {"logit_scale": 0.25},  # scaled logits, RoPE in the windowed layers only
    "deepseek_v3": _experts() | _LATENT,  # key dims other than value dims
    "exaone4": _MIXED,
    "gemma3_text": _MIXED | {"query_pre_attn_scalar": 20, "head_dim": 16},  # RoPE by layer type
    "gpt_bigcode": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": LONG, "n_inner": 64},  # one K/V head
    "gpt_oss": _experts() | _MIXED | {"head_dim": 16},  # attention sinks
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "olmo3": _MIXED,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},  # a decoder two modules deep, positions offset by 2
    "phi": {},  # parallel residual, partial RoPE
    "starcoder2": {"sliding_window": WINDOW},
}


def make(name: str) -> PreTrainedModel:
    """The tiny model of a family, always the same one, with transformers' eager attention."""
    tiny = FAMILIES[name]
    return random_model(tiny.configure(), tiny.seed)


def special(model_type: str) -> PreTrainedModel:
    """The tiny model of a type in ``SPECIAL``."""
    return random_model(AutoConfig.for_model(model_type, **_GROUPED | SPECIAL[model_type]))


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal LM with random weights; biases and norms, which start as constants, are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a checkpoint: config.json and model.safetensors."""
    model.save_pretrained(folder)
    return folder
