"""DeepSeek-V3's module for multi-token prediction (arXiv 2412.19437, section 2.2) with autograd, for dense trunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.heads.mtp import MTPConfig
from training.modules.layers import DecoderLayer, RMSNorm
from training.modules.rollout import Past


class MTPModule(DecoderLayer):
    """A ``RolloutModule`` that shares embedding and head with the target: one module, recursed (2509.18362).

    Parameters are called as in speculators' files.

    Args:
        rope: [positions, 2, rot / 2].
    """

    def __init__(self, config: MTPConfig, rope: Tensor) -> None:
        super().__init__(config.layer)
        hidden, eps = config.layer.hidden_size, config.layer.norm_eps
        self._recycle = config.recycle
        self.register_buffer("_rope", rope, persistent=False)
        self._rope: Tensor
        self.token_layernorm = RMSNorm(hidden, eps)
        self.hidden_layernorm = RMSNorm(hidden, eps)
        self.input_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.final_layernorm = RMSNorm(hidden, eps)

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
        joined = torch.cat([self.token_layernorm(embedded), self.hidden_layernorm(carry)], dim=-1)
        stream, kept = self(self.input_proj(joined), self._rope[positions], past[0] if past else None, anchors)
        normed = self.final_layernorm(stream)
        return normed, normed if self._recycle == "post" else stream, [kept]
