"""Model families of the native decoder: how a Hugging Face config reads as flags, and what the weights are called.

A family is one function and one line in ``NATIVE_FAMILIES``. What a config asks for and the decoder does not have
raises ``UnsupportedConfig``; such a model is run through transformers instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.config import ModelConfig
from models.layers.rope import ROPE_KINDS, RopeConfig, supported_len

HFConfig = Mapping[str, Any]  # the parsed config.json


class UnsupportedConfig(ValueError):
    """The native decoder lacks something that the config asks for; the message says what."""


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is read."""

    configure: Callable[[HFConfig], ModelConfig]
    names: Mapping[str, str]  # our prefix -> the checkpoint's; {} stands for the layer's number
    # weights that checkpoints carry and the target does not need; the heads of Medusa-2 are a drafter's
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$", r"^medusa_head\.")

    def checkpoint_name(self, ours: str) -> str:
        """The checkpoint's name of a weight named as in ``Decoder.weights``."""
        prefix, _, kind = ours.rpartition(".")
        layer = re.match(r"layers\.(\d+)\.(\w+)$", prefix)
        if layer is None:
            return f"{self.names[prefix]}.{kind}"
        return f"{self.names['layers.{}.' + layer[2]].format(layer[1])}.{kind}"

    def ignores(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)

    def trunk_of(self, hf: HFConfig) -> Family:
        """The family without the modules for multi-token prediction that a config announces: drafters load those.

        MiMo stores them as model.mtp_layers.0, DeepSeek's layout as layers after the last one, Meta as extra_heads.0.
        """
        first, count = int(hf["num_hidden_layers"]), int(hf.get("num_nextn_predict_layers") or 0)
        layers = "|".join(str(first + module) for module in range(count))
        announced = (rf"^model\.layers\.({layers})\.",) if count else ()
        return replace(self, ignored=(*self.ignored, r"^model\.mtp_layers\.", r"^extra_heads\.", *announced))


LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layers.{}.input_norm": "model.layers.{}.input_layernorm",
    "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj",
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.down": "model.layers.{}.mlp.down_proj",
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _llama(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    config = _common(hf, trained_len=2048, kv_heads=None)
    return replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


def _mistral(hf: HFConfig) -> ModelConfig:
    if "layer_types" in hf:
        raise UnsupportedConfig("mistral with layer_types")
    config = _common(hf, trained_len=4096 * 32, kv_heads=8)
    window = hf.get("sliding_window", 4096)  # absent is not null here
    return replace(config, windows=(window,) * config.num_layers)


def _qwen2(hf: HFConfig) -> ModelConfig:
    config = _common(hf, trained_len=32768, kv_heads=32)
    return replace(config, qkv_bias=True, windows=_qwen_windows(hf))


def _qwen3(hf: HFConfig) -> ModelConfig:
    config = _common({"head_dim": 128, **hf}, trained_len=32768, kv_heads=32)
    bias = bool(hf.get("attention_bias", False))
    return replace(config, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=_qwen_windows(hf))


NATIVE_FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, LLAMA_NAMES),
    "mistral": Family(_mistral, LLAMA_NAMES),
    "qwen2": Family(_qwen2, LLAMA_NAMES),
    "qwen3": Family(_qwen3, LLAMA_NAMES),
    "mimo": Family(_qwen2, LLAMA_NAMES),  # MiMo-7B: Qwen2 with modules for multi-token prediction beside the trunk
}


def supports_natively(hf: HFConfig) -> bool:
    """Whether the native decoder runs this config; it fits no other model than those of ``NATIVE_FAMILIES``."""
    family = NATIVE_FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        return False
    try:
        family.configure(hf)
    except UnsupportedConfig:
        return False
    return True


def describe(config: ModelConfig) -> dict[str, Any]:
    """The config.json that reads as ``config``: the inverse of ``Family.configure``, for writing checkpoints.

    Raises:
        ValueError: no family has such a model.
    """
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.o_bias else "llama"
    rope, default = config.rope, RopeConfig(config.rope.dim)
    scaling = {name: getattr(rope, name) for name in _ROPE_OPTIONS if getattr(rope, name) != getattr(default, name)}
    hf: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": rope.trained_len,
        "rope_theta": rope.theta,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
    if rope.kind != "default":
        hf["rope_scaling"] = {"rope_type": rope.kind, **scaling, "original_max_position_embeddings": rope.original_len}
    read = NATIVE_FAMILIES[kind].configure(hf)
    if replace(read, max_len=config.max_len, windows=config.windows) != config or any(config.windows):
        raise ValueError(f"no model family has a decoder with {config}")
    return hf


def _common(hf: HFConfig, trained_len: int, kv_heads: int | None) -> ModelConfig:
    """What all families share. ``trained_len`` and ``kv_heads`` are transformers' defaults of absent keys.

    Raises:
        UnsupportedConfig: for what the decoder does not have.
        KeyError: naming a key that is missing.
    """
    if hf.get("quantization_config"):
        raise UnsupportedConfig("quantized weights")
    activation = str(hf.get("hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise UnsupportedConfig(f"hidden_act {activation!r}")
    heads = int(hf["num_attention_heads"])
    head_dim = int(hf.get("head_dim") or hf["hidden_size"] // heads)
    stated = hf.get("num_key_value_heads", kv_heads)  # null and Llama's default: as many as query heads
    rope = _rope(hf, head_dim, int(hf.get("max_position_embeddings", trained_len)))
    return ModelConfig(
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        num_layers=int(hf["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(stated or heads),
        head_dim=head_dim,
        mlp_size=int(hf["intermediate_size"]),
        rope=rope,
        max_len=supported_len(rope),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATIONS[activation],
        tied=bool(hf.get("tie_word_embeddings", False)),
    )


def _rope(hf: HFConfig, head_dim: int, trained_len: int) -> RopeConfig:
    """Both spellings: rope_parameters of transformers 5, and rope_scaling beside rope_theta before it."""
    stated = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = str(stated.get("rope_type") or stated.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise UnsupportedConfig(f"rope scaling of type {kind!r}")
    if any(isinstance(value, dict) for value in stated.values()):
        raise UnsupportedConfig("rope parameters by layer type")
    partial = stated.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise UnsupportedConfig("partial rotary embedding in a family that has none")
    original = hf.get("original_max_position_embeddings") or stated.get("original_max_position_embeddings")
    options = {name: stated[name] for name in _ROPE_OPTIONS if stated.get(name) is not None}
    for name in ("short_factor", "long_factor"):
        options[name] = tuple(options.get(name, ()))
        if kind == "longrope" and len(options[name]) != head_dim // 2:
            raise ValueError(f"rope scaling of type 'longrope' needs {head_dim // 2} values in {name}")
    if kind in ("linear", "dynamic", "llama3") and "factor" not in options:
        raise KeyError("factor (of rope scaling)")
    return RopeConfig(
        dim=head_dim,
        theta=float(stated.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
        kind=kind,
        trained_len=trained_len,
        original_len=int(original or trained_len),
        **options,
    )


_ROPE_OPTIONS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
)


def _qwen_windows(hf: HFConfig) -> tuple[int | None, ...]:
    """Sliding layers: those that layer_types says, or all from max_window_layers on."""
    layers = int(hf["num_hidden_layers"])
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first = int(hf.get("max_window_layers", 28))
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    types = list(hf.get("layer_types") or default)
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise UnsupportedConfig(f"layer_types {types}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
