"""Typical acceptance (Medusa, 2401.10774, section 2.3.1, and its code): accept what is likely enough. Lossy.

With p = softmax(x / T) at a node's parent, the node's token is accepted if

    p(token) > min(epsilon, delta * exp(-H)),    H = -sum p * log(p + 1e-5)

A path is accepted if all its nodes are. The longest accepted path wins; among several the one with the largest sum of
log p, then the one that ends in the first column of the tree. Tokens that the request's filters drop are not accepted.
Sequences at temperature 0 never get here: they are judged by the exact rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.sampling import Sampling
from decoding.verify import Verdict
from models.tree import Trees, is_node, mask_depths, path_to, reached

SMALLEST = 1e-5  # keeps the entropy's logarithm finite; Medusa's


def typical(trees: Trees, nodes: Nodes, x: Tensor, sampling: Sampling, deepest: int) -> Verdict:
    """See ``Rule``. The bonus is the request's own draw at the last accepted node, or the likeliest token there."""
    if trees.width == 1:
        return Verdict.plain(_bonus(x, nodes.row, nodes.depth, sampling))
    accepted, logprobs = _judge(trees, nodes, x, sampling)
    last = _best_end(accepted, logprobs, nodes.masks)
    at = nodes.first + last
    bonus = _bonus(x[at], nodes.row[at], nodes.depth[at], sampling)
    return Verdict(*path_to(trees, nodes.masks, last, bonus, deepest))


def _judge(trees: Trees, nodes: Nodes, x: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """[S, N] bool, the node's token is likely enough after its parent; [S, N] log p of those that are, 0 elsewhere."""
    table, row = sampling.table, nodes.row
    scaled = x / table.temperature[row][:, None]
    probs = scaled.softmax(dim=1)  # [W, V]
    entropy = -(probs + SMALLEST).log_().mul_(probs).sum(dim=1)
    threshold = torch.minimum(table.rules.epsilon[row], table.rules.delta[row] * (-entropy).exp())
    parent = nodes.first[row] + trees.parents[row, nodes.column].clamp(min=0)  # [W] where p is; the root: itself
    token = trees.tokens[row, nodes.column]
    prob = probs[parent, token]
    likely = prob > threshold[parent]
    if table.filtered:
        likely = sampling.ops.keeps(scaled, table.filters.at(row), parent, token, likely)
    accepted = torch.zeros_like(trees.tokens, dtype=torch.bool)
    accepted[row, nodes.column] = likely
    logprobs = torch.zeros_like(trees.confidence)
    logprobs[row, nodes.column] = prob.log().float()
    accepted &= is_node(trees)
    return accepted, logprobs.masked_fill(~accepted, 0.0)


def _best_end(accepted: Tensor, logprobs: Tensor, masks: Tensor) -> Tensor:
    """[S] column of the last node of each row's path."""
    columns = torch.arange(masks.shape[1], device=masks.device)
    ends = reached(accepted | (columns == 0), masks)
    depth = mask_depths(masks).masked_fill(~ends, -1)
    ends &= depth == depth.amax(dim=1, keepdim=True)
    on_path = (masks[:, :, None] >> columns) & 1  # [S, N, N]
    # float32 terms add up in float64 without rounding, so that equal paths tie whatever their order
    likelihood = (on_path * logprobs.double()[:, None]).sum(dim=2)
    return likelihood.masked_fill(~ends, -torch.inf).argmax(dim=1)


def _bonus(x: Tensor, row: Tensor, depth: Tensor, sampling: Sampling) -> Tensor:
    drawn = sampling.draw(x, row, depth)
    likeliest = sampling.table.rules.likeliest
    return drawn if likeliest is None else torch.where(likeliest[row] & (drawn >= 0), x.argmax(dim=1), drawn)
