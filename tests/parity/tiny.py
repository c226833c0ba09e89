"""Tiny random checkpoints of the native families, made with transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # logits spread over several units, so that ties are rare and texts lively
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3}

# variant -> (config class, model class, what differs from SHAPE)
VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied-biased": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 20, "head_dim": 32}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-sliding": (Qwen2Config, Qwen2ForCausalLM, SLIDING),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-sliding": (Qwen3Config, Qwen3ForCausalLM, {**SLIDING, "head_dim": 16, "num_key_value_heads": 1}),
}


def save_tiny(variant: str, folder: Path, *, seed: int = 1, max_shard_size: str = "1GB", **config: Any) -> Path:
    """Write a float32 checkpoint of a variant; ``config`` overrides single settings. Returns the folder."""
    config_class, model_class, settings = VARIANTS[variant]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **settings, **config}))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # transformers starts norms at one and biases at zero, which would hide mistakes
            weight.data += 0.2 * torch.randn_like(weight)
        elif "embed_tokens" not in name:
            weight.data *= 1.5  # the layers outweigh the embedding: a tied model would repeat its last token for ever
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def random_prompt(length: int, seed: int = 0, vocab: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, vocab, (length,), generator=generator).tolist()
