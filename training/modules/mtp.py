"""DeepSeek-V3's module for multi-token prediction (arXiv 2412.19437, section 2.2) with autograd, for dense trunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from training.modules.layers import DecoderLayer, RMSNorm
from training.modules.rollout import Past


class MTPModule(nn.Module):
    """A ``RolloutModule`` that shares embedding and head with the target; one module, recursed.

    Args:
        rope: [positions, 2, rot / 2].
        recycle_normed: the carry is the output after the last norm, as the target's feature is; else before it.
    """

    def __init__(self, config: ModelConfig, rope: Tensor, *, recycle_normed: bool = True) -> None:
        super().__init__()
        self._recycle_normed = recycle_normed
        self.register_buffer("_rope", rope, persistent=False)
        self._rope: Tensor
        self.enorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DecoderLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def enter(self, features: Tensor) -> Tensor:
        return features

    def run(
        self,
        embedded: Tensor,
        carry: Tensor,
        positions: Tensor,
        past: Sequence[Past] | None,
        anchors: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Past]]:
        """See ``RolloutModule``."""
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(carry)], dim=-1))
        stream, kept = self.layer(joined, self._rope[positions], past[0] if past else None, anchors)
        normed = self.norm(stream)
        return normed, normed if self._recycle_normed else stream, [kept]
