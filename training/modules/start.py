"""How new modules begin. Measured on the demo's target after 40 to 160 steps of 2,048 tokens with Muon; see each."""

from __future__ import annotations

import torch
from torch import nn

from training.modules.layers import MLP, Attention

STD = 0.02


@torch.no_grad()
def start_small(module: nn.Module) -> None:
    """Small random matrices, and blocks that add nothing to the residual stream yet.

    MTP after 60 steps: loss 4.8; 4.9 with random output projections, 5.8 as a copy of the target's last layer.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Attention):
            nn.init.zeros_(part.o_proj.weight)
        elif isinstance(part, MLP):
            nn.init.zeros_(part.down_proj.weight)


@torch.no_grad()
def start_at_own_token(attention: Attention, embedding: int) -> None:
    """Begin with attention to the query's own token, whose embedding then goes into the stream.

    EAGLE-3's first layer gets the embedding by its attention alone, and learns slowly that it has to look there: after
    40 steps the loss is 5.4 with this start and 6.1 without. Queries and keys are the same projection of the embedding:
    the score of a token with itself is about sqrt(head dim), of two different ones about 1.

    Args:
        embedding: the width of the inputs' first part, the embedding's.
    """
    deviation = embedding**-0.5
    key, query = attention.k_proj.weight, attention.q_proj.weight
    nn.init.normal_(key[:, :embedding], std=deviation)
    nn.init.normal_(attention.v_proj.weight[:, :embedding], std=deviation)
    nn.init.normal_(attention.o_proj.weight, std=attention.o_proj.in_features**-0.5)
    heads = key[:, :embedding].view(-1, attention.head_dim, embedding)  # [Hkv, D, H]
    groups = query.shape[0] // key.shape[0]
    query[:, :embedding] = heads.repeat_interleave(groups, dim=0).flatten(0, 1)
