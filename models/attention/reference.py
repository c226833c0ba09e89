"""Paged tree attention in plain PyTorch, on any device and dtype: the definition of correct for the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention import AttentionSpec
from models.batch import MAX_TREE, PAGE_SIZE, RaggedBatch


def attend(
    query: Tensor,  # [T, Hq, D]
    keys: Tensor,  # [S, Hkv, D]
    values: Tensor,  # [S, Hkv, Dv]
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Tensor | None = None,  # [Hq]
) -> Tensor:  # [T, Hq, Dv]
    """Softmax attention of every query token over the keys that it sees; scores and softmax in at least float32."""
    rows, longest = batch.num_rows, batch.max_query
    groups = spec.num_heads // spec.num_kv_heads
    row_of, compute = batch.row_of.long(), torch.promote_types(query.dtype, torch.float32)
    # queries padded to one rectangle of R x Q; the row of a padding query sees nothing and its result is dropped
    place = row_of * longest + (torch.arange(batch.num_tokens, device=query.device) - batch.row_starts.long()[row_of])

    def rectangle(packed: Tensor) -> Tensor:
        padded = packed.new_zeros((rows * longest, *packed.shape[1:]))
        padded[place] = packed
        return padded.view(rows, longest, *packed.shape[1:])

    q = rectangle(query.to(compute)).view(rows, longest, spec.num_kv_heads, groups, spec.key_dim)
    seen, distance = visibility(rectangle(batch.visible), rectangle(batch.tree_mask), rectangle(batch.positions), batch)
    if spec.window is not None:
        seen &= distance < spec.window
    if spec.first_key:
        seen[..., : spec.first_key] = False

    slot = key_slots(batch)  # [R, K]
    k, v = keys[slot].to(compute), values[slot].to(compute)  # [R, K, Hkv, D]
    scores = torch.einsum("rqhgd,rkhd->rhgqk", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(compute).view(1, spec.num_kv_heads, groups, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    probs = scores.softmax(dim=-1)
    probs = torch.where(seen.any(-1)[:, None, None, :, None], probs, 0.0)  # a padding query has no key at all
    v = v.masked_fill(~seen.any(1)[:, :, None, None], 0.0)  # slots that nobody sees may hold anything, NaN included
    out = torch.einsum("rhgqk,rkhd->rqhgd", probs[..., : k.shape[1]], v)
    return out.reshape(rows * longest, spec.num_heads, spec.value_dim)[place].to(query.dtype)


def key_slots(batch: RaggedBatch) -> Tensor:
    """Slot of every logical key of every row, [R, K] with K = batch.max_keys."""
    key = torch.arange(batch.max_keys, device=batch.page_table.device)
    return batch.page_table.long()[:, key // PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE


def visibility(visible: Tensor, tree_mask: Tensor, positions: Tensor, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Which keys each query sees, and how far back they lie.

    Args: visible, tree_mask and positions as rectangles [R, Q].
    Returns: seen [R, Q, K] bool, and position of the query minus position of the key [R, Q, K].
    """
    device = tree_mask.device
    key = torch.arange(batch.max_keys, device=device)
    node = key - batch.tree_base.long()[:, None]  # [R, K] number of the key among the tree's nodes
    in_tree = (node >= 0) & (node < MAX_TREE)
    bit = torch.ones((), dtype=torch.int64, device=device) << node.clamp(0, MAX_TREE - 1)  # [R, K]
    ancestor = ((tree_mask[:, :, None] & bit[:, None]) != 0) & in_tree[:, None]
    seen = (key < visible[:, :, None]) | ancestor
    # depth of an ancestor = number of ancestors above it = set bits of the mask below its own
    depths = torch.cumsum(ancestor.long(), dim=-1) - 1
    key_position = torch.where(ancestor, batch.tree_base.long()[:, None, None] + depths, key)
    return seen, positions[:, :, None] - key_position
