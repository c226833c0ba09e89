"""A decoder layer with autograd, whose parameters are called as in Llama checkpoints, for rollouts (rollout.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers.ops import ACTIVATIONS, rotate
from training.modules.rollout import Past, attend_committed, attend_drafted


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in at least float32, as ``models/layers/ops.py`` has it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed: Tensor = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self._eps)
        return normed.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention of entries or of drafted nodes; the input may be wider than the residual stream."""

    def __init__(self, config: ModelConfig, inputs: int) -> None:
        super().__init__()
        self.head_dim, self._scale = config.head_dim, config.attention_scale or config.head_dim**-0.5
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(inputs, query, config.qkv_bias)
        self.k_proj = nn.Linear(inputs, kv, config.qkv_bias)
        self.v_proj = nn.Linear(inputs, kv, config.qkv_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Tensor, past: Past | None, anchors: Tensor | None) -> tuple[Tensor, Past]:
        """x [B, A, I] -> [B, A, H], and the K/V with this pass's.

        Args:
            rope: [A, 2, rot / 2] cos and sin of the positions.
            past: None in the pass over committed entries.
            anchors: [A] the entry each drafted node hangs on; None in the pass over committed entries.
        """
        cos, sin = rope.unsqueeze(2).unbind(1)  # [A, 1, rot / 2] each
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is None or anchors is None:
            past = Past(key, value)
            attended = attend_committed(query, past, self._scale)
        else:
            past = past.extended(key, value)
            attended = attend_drafted(query, past, anchors, self._scale)
        return self.o_proj(attended.flatten(2)), past


class MLP(nn.Module):
    """down(activation(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))
        return down


class DecoderLayer(nn.Module):
    """A pre-norm block; without ``input_norm`` the attention reads the stream itself (the first layer of EAGLE-1)."""

    def __init__(self, config: ModelConfig, input_norm: bool = True) -> None:
        super().__init__()
        if input_norm:
            self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self._input_norm = input_norm
        self.self_attn = Attention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor, past: Past | None, anchors: Tensor | None) -> tuple[Tensor, Past]:
        """x [B, A, H] -> [B, A, H]; see ``Attention.forward``."""
        normed = self.input_layernorm(x) if self._input_norm else x
        attended, past = self.self_attn(normed, rope, past, anchors)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), past
