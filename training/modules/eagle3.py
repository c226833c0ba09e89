"""EAGLE-3 (arXiv 2503.01840) with autograd; see models/heads/eagle3.py for the module as served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.heads.eagle3 import Eagle3Config
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
    """A ``RolloutModule`` over the target's taps, side by side; parameters are called as in speculators' files.

    Args:
        rope: [positions, 2, rot / 2].
    """

    def __init__(self, settings: Eagle3Config, rope: Tensor) -> None:
        super().__init__()
        config = settings.layer
        self._norm_output = settings.norm_output
        self.register_buffer("_rope", rope, persistent=False)
        self._rope: Tensor
        self.fc = nn.Linear(settings.feature_size, config.hidden_size, bias=False)
        first = FirstLayer(config, settings.norm_before_residual)
        self.layers = nn.ModuleList([first, *(DecoderLayer(config) for _ in range(config.num_layers - 1))])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, settings.num_drafted, bias=False)

    def enter(self, features: Tensor) -> Tensor:
        """[B, E, F] -> [B, E, H]."""
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
