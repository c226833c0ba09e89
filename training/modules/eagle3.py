"""EAGLE-3 (arXiv 2503.01840) with autograd; see models/heads/eagle3.py for the module as served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from training.modules.layers import MLP, Attention, DecoderLayer, RMSNorm
from training.modules.rollout import Past


class FirstLayer(nn.Module):
    """The layer that reads embedding and feature side by side."""

    def __init__(self, config: ModelConfig, norm_before_residual: bool) -> None:
        super().__init__()
        self._norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, embedded: Tensor, carry: Tensor, rope: Tensor, past: Past | None, anchors: Tensor | None
    ) -> tuple[Tensor, Past]:
        """embedded and carry [B, A, H] -> [B, A, H]; see ``Attention.forward``."""
        normed = self.hidden_norm(carry)
        residual = normed if self._norm_before_residual else carry
        both = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        attended, past = self.self_attn(both, rope, past, anchors)
        stream = residual + attended
        return stream + self.mlp(self.post_attention_layernorm(stream)), past


class Eagle3Module(nn.Module):
    """A ``RolloutModule`` over the target's taps, concatenated from the lowest layer to the highest.

    Args:
        taps: how many.
        target_size: width of one.
        norm_output: the carry is the normed output (EAGLE-3.1); else the output itself.
        fc_norm: an RMSNorm on every tap before ``fc``.
        norm_before_fc: one RMSNorm on all taps together before ``fc``.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Tensor,  # [positions, 2, rot / 2]
        draft_vocab: int,
        *,
        taps: int,
        target_size: int,
        norm_before_residual: bool = False,
        norm_output: bool = False,
    ) -> None:
        super().__init__()
        self._norm_output = norm_output
        self.register_buffer("_rope", rope, persistent=False)
        self._rope: Tensor
        self.fc = nn.Linear(taps * target_size, config.hidden_size, bias=False)
        first = FirstLayer(config, norm_before_residual)
        self.layers = nn.ModuleList([first, *(DecoderLayer(config) for _ in range(config.num_layers - 1))])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, draft_vocab, bias=False)

    def enter(self, features: Tensor) -> Tensor:
        """[B, E, taps * target size] -> [B, E, H]."""
        entered: Tensor = self.fc(features)
        return entered

    def run(
        self,
        embedded: Tensor,
        carry: Tensor,
        positions: Tensor,
        past: Sequence[Past] | None,
        anchors: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Past]]:
        """See ``RolloutModule``."""
        rope = self._rope[positions]
        stream, first = self.layers[0](embedded, carry, rope, past[0] if past else None, anchors)
        kept = [first]
        for index, layer in enumerate(self.layers[1:], start=1):
            stream, own = layer(stream, rope, past[index] if past else None, anchors)
            kept.append(own)
        normed = self.norm(stream)
        return normed, normed if self._norm_output else stream, kept
