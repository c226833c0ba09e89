"""The ragged batch: everything a forward pass needs to know about its query tokens, fixed at birth.

A *row* is a committed context (its K/V is in the cache) plus query tokens: a causal chain of any length and a token
tree rooted at the chain's last token. Prefill, plain decoding and verification differ only in those two lengths.

Keys of a row are numbered by *logical index*: the context first, then the chain, then the tree's nodes in tree order.
Query token q of a row sees logical key k if

    k < visible[q]     or     k >= tree_base  and bit (k - tree_base) of tree_mask[q] is set

with ``tree_base`` the logical index of the tree's root (= of the chain's last token). Bit 0 of a mask is the root
itself, so the mask of a node is its set of ancestors-or-self, and an ancestor's depth is the number of set bits below
its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_SIZE = 16  # tokens a page; the CPU kernel's block of keys has the same length
MAX_TREE = 64  # nodes of a tree, root included: ancestors-or-self fit one 64-bit integer


@dataclass(frozen=True)
class RaggedBatch:
    """Packed query tokens of R rows, T in all. Shapes: docs/shapes.md. Index tensors live on the model's device."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, RoPE position: logical index in the chain, tree_base + depth in the tree
    slots: Tensor  # [T] int64, where the token's K/V is written: page * PAGE_SIZE + offset
    visible: Tensor  # [T] int32, every key with a smaller logical index is seen
    tree_mask: Tensor  # [T] int64, ancestors-or-self among the tree's nodes; 0 for chain tokens before the root
    row_of: Tensor  # [T] int32
    row_starts: Tensor  # [R + 1] int32, first query token of each row
    tree_base: Tensor  # [R] int32, logical index of the tree's root
    page_table: Tensor  # [R, P] int32, page of logical keys 16p .. 16p + 15; unused entries are 0
    wanted: Tensor  # [W] int64, query tokens whose logits are asked for
    max_query: int  # host: at least the longest row's number of query tokens (more where batches are padded to a size)
    max_keys: int  # host: at least the longest row's number of keys, query tokens included

    def at_wanted(self, values: Tensor) -> Tensor:
        """[T, ...] -> [W, ...]: the values of the wanted tokens; no copy where these are all."""
        wanted = self.wanted
        return values if wanted.shape[0] == values.shape[0] else values.index_select(0, wanted)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_rows(self) -> int:
        return int(self.tree_base.shape[0])

    def validate(self, scratch_page: int | None = None) -> None:
        """Check every invariant that kernels rely on (used by tests; it synchronises).

        Args:
            scratch_page: a page whose slots several query tokens may write, as nobody reads them.

        Raises:
            ValueError: naming the first invariant that does not hold.
        """
        tokens, rows = self.num_tokens, self.num_rows
        for name in ("positions", "slots", "visible", "tree_mask", "row_of"):
            if getattr(self, name).shape != (tokens,):
                raise ValueError(f"{name} must have shape [{tokens}], not {list(getattr(self, name).shape)}")
        if self.row_starts.shape != (rows + 1,) or self.page_table.shape[0] != rows:
            raise ValueError("row_starts must be [R + 1] and page_table [R, P]")
        starts = self.row_starts.long()
        if int(starts[0]) != 0 or int(starts[-1]) != tokens or bool((starts.diff() <= 0).any()):
            raise ValueError("row_starts must rise from 0 to T, with at least one query token in each row")
        expected_rows = torch.repeat_interleave(torch.arange(rows, device=starts.device), starts.diff())
        if not torch.equal(self.row_of.long(), expected_rows):
            raise ValueError("row_of disagrees with row_starts")
        owned = [slot for slot in self.slots.tolist() if slot // PAGE_SIZE != scratch_page]
        if len(set(owned)) != len(owned):
            raise ValueError("two query tokens would write the same slot")
        base = self.tree_base.long()[self.row_of.long()]
        if bool((self.visible.long() > base + 1).any()):
            raise ValueError("a query token sees past the tree's root without a mask bit")
        in_tree = self.tree_mask != 0
        if bool((self.tree_mask[in_tree] & 1 == 0).any()):
            raise ValueError("a tree mask lacks bit 0, the root")
        if int(starts.diff().max()) > self.max_query:
            raise ValueError("a row is longer than max_query")
        if self.max_keys > self.page_table.shape[1] * PAGE_SIZE:
            raise ValueError("page_table is too short for max_keys")
