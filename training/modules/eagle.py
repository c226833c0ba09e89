"""EAGLE-1 (arXiv 2401.15077) with autograd; see models/heads for the module as served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from training.modules.layers import DecoderLayer
from training.modules.rollout import Past


class EagleModule(nn.Module):
    """A ``RolloutModule`` that guesses the target's next feature; embedding and head are the target's.

    Args:
        rope: [positions, 2, rot / 2].
        bias: of ``fc``.
    """

    def __init__(self, config: ModelConfig, rope: Tensor, *, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("_rope", rope, persistent=False)
        self._rope: Tensor
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=bias)
        # the first layer has no norm before its attention
        self.layers = nn.ModuleList(DecoderLayer(config, input_norm=index > 0) for index in range(config.num_layers))

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
        rope, kept = self._rope[positions], []
        stream = self.fc(torch.cat([embedded, carry], dim=-1))
        for index, layer in enumerate(self.layers):
            stream, own = layer(stream, rope, past[index] if past else None, anchors)
            kept.append(own)
        return stream, stream, kept
