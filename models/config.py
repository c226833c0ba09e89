"""What distinguishes one dense decoder from another."""

from __future__ import annotations

from dataclasses import dataclass

from models.layers.rope import RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of ``models/decoder.py`` by flags; ``models/families.py`` makes one of a checkpoint's config."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope: RopeConfig
    max_len: int  # the longest text served: RoPE's table is made for it
    norm_eps: float = 1e-6
    activation: str = "silu"  # see models/layers/ops.py
    tied: bool = False  # the LM head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of every query and key, before the rotation
    windows: tuple[int | None, ...] = ()  # sliding window of each layer; () is none anywhere
    attention_scale: float | None = None  # default: head_dim ** -0.5
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no model has."""
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_size",
            "max_len",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} K/V heads evenly")

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None
