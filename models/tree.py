"""Token trees as arrays, and everything that follows from them: depths, ancestor masks, paths, merging, the best nodes.

A batch of trees is [R, N]. Column 0 is the root, the row's last known token; a parent always stands in an earlier
column than its children; unused columns are padding, anywhere but in column 0. All functions are pure and stay on the
device of their arguments. What runs along paths is computed by pointer doubling, log2(N) rounds instead of N.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from models.batch import MAX_TREE
from models.transfer import upload

NO_PARENT = -1  # parent of the root and of padding
PINS = 32  # bit PINS + d of a node's source: drafter number d pins it, see Trees
GUESSED = (1 << PINS) - 1  # the bits below
# The most that a node's confidence counts for: below 1 by more than the rounding of a product of 64 float32 factors,
# so that a node's path is always less probable than its parent's.
CERTAIN = 1 - 2.0**-16
IMPOSSIBLE = 1e-30  # path probability; float32 products above it have lost no precision


@dataclass(frozen=True)
class Trees:
    """R trees of up to N nodes, root included. Padding: token -1, parent NO_PARENT, confidence 0, source 0.

    A drafter *pins* a node whose logits it needs whether or not the node is right. The nodes that it pins in a row are
    bought whole or not at all, whatever they promise. It guesses a node by one bit and pins it by another, or both; of
    a node that it guesses, or pins, it guesses, or pins, the ancestors.
    """

    tokens: Tensor  # [R, N] int64
    parents: Tensor  # [R, N] int64, column of the parent
    confidence: Tensor  # [R, N] float32, probability that the node's token is drawn, given that its parent is reached
    source: Tensor  # [R, N] int64, bit d: drafter number d guesses the node; bit PINS + d: it pins it; 0 for the root

    @property
    def num_rows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def width(self) -> int:
        return int(self.tokens.shape[1])

    def to(self, device: torch.device) -> Trees:
        """The same on a device; the host's go there without waiting."""
        if self.tokens.device == device:
            return self
        host = (part.numpy() for part in (self.tokens, self.parents, self.confidence, self.source))
        return Trees(*upload(device, *host))

    def narrow(self, width: int) -> Trees:
        """The first ``width`` columns."""
        return Trees(
            self.tokens[:, :width], self.parents[:, :width], self.confidence[:, :width], self.source[:, :width]
        )

    def validate(self) -> None:
        """Check the invariants (used by tests; it synchronises).

        Raises:
            ValueError: naming the first invariant that does not hold.
        """
        columns = torch.arange(self.width, device=self.tokens.device)
        used = self.parents != NO_PARENT
        if bool(used[:, 0].any()) or bool((self.tokens[:, 0] < 0).any()):
            raise ValueError("column 0 must be the root: a token without parent")
        if bool((used & (self.parents >= columns)).any()):
            raise ValueError("a parent must stand before its children")
        if bool((used & (self.tokens < 0)).any()):
            raise ValueError("a node has no token")
        parent_used = used.gather(1, self.parents.clamp(min=0)) | (self.parents == 0)
        if bool((used & ~parent_used).any()):
            raise ValueError("a node hangs on padding")
        if bool(((self.confidence < 0) | (self.confidence > 1)).any()):
            raise ValueError("confidence must be in [0, 1]")


def roots_only(tokens: Tensor) -> Trees:
    """Trees of the root alone, from its tokens [R]."""
    return Trees(tokens.unsqueeze(1), *_root_columns(tokens.shape[0], tokens.device))


@functools.lru_cache(maxsize=64)  # plain decoding asks for the same ones in every step
def _root_columns(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, confidence and source of roots, [R, 1] each; never written to."""
    size = (rows, 1)
    return (
        torch.full(size, NO_PARENT, device=device),
        torch.ones(size, device=device),
        torch.zeros(size, dtype=torch.int64, device=device),
    )


@functools.lru_cache(maxsize=64)
def root_masks(rows: int, device: torch.device) -> Tensor:
    """[R, 1] the ancestor masks of ``roots_only``; never written to."""
    return torch.ones(rows, 1, dtype=torch.int64, device=device)


def is_node(trees: Trees) -> Tensor:
    """[R, N] bool: a drafted node, neither root nor padding."""
    return trees.parents != NO_PARENT


def depths(parents: Tensor) -> Tensor:
    """[R, N] number of edges to the root; 0 for root and padding."""
    depth = (parents != NO_PARENT).long()
    pointer = parents.clamp(min=0)
    for _ in range(_rounds(parents.shape[1])):
        depth = depth + depth.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return depth


def ancestor_masks(parents: Tensor) -> Tensor:
    """[R, N] int64: bit i is set if column i is the node itself or one of its ancestors; N <= 64."""
    if parents.shape[1] > MAX_TREE:
        raise ValueError(f"a tree has at most {MAX_TREE} nodes, root included, not {parents.shape[1]}")
    columns = torch.arange(parents.shape[1], device=parents.device)
    mask = (torch.ones_like(columns) << columns).expand(parents.shape)
    pointer = parents.clamp(min=0)
    for _ in range(_rounds(parents.shape[1])):
        mask = mask | mask.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return mask


def mask_depths(masks: Tensor) -> Tensor:
    """Depth of each node from its ancestor mask: set bits less one."""
    bits = torch.arange(MAX_TREE, device=masks.device)
    return ((masks[..., None] >> bits) & 1).sum(-1) - 1


def path_confidence(trees: Trees) -> Tensor:
    """[R, N] probability that a node is reached: the product of confidences along its path. 0 for padding.

    Siblings whose confidences sum to more than 1 (two drafters can both be sure) are divided by the sum. A node's
    probability is below its parent's, whatever the rounding: nothing counts for more than ``CERTAIN``.
    """
    hung = trees.parents.clamp(min=0)
    sums = torch.zeros_like(trees.confidence).scatter_add(1, hung, trees.confidence * is_node(trees))
    share = (trees.confidence / sums.clamp(min=1).gather(1, hung)).clamp(max=CERTAIN)
    prob = torch.where(is_node(trees), share, trees.confidence)
    pointer = hung
    for _ in range(_rounds(trees.width)):
        prob = prob * prob.gather(1, pointer)  # the root's own is 1, so it may be passed any number of times
        pointer = pointer.gather(1, pointer)
    return prob


def merge(trees: list[Trees]) -> Trees:
    """One tree per row with the nodes of all: nodes of the same parent and token become one.

    Its confidence is the maximum of theirs, its source their union. All trees must have the same roots. Duplicates
    become padding, so the result has as many columns as the arguments together (less the repeated roots).
    """
    if len(trees) == 1:
        return trees[0]
    offsets, width = [], 1
    for tree in trees:
        offsets.append(width - 1)
        width += tree.width - 1
    tokens = torch.cat([trees[0].tokens[:, :1], *(t.tokens[:, 1:] for t in trees)], dim=1)
    parents = torch.cat(
        [trees[0].parents[:, :1], *(_shift(t.parents[:, 1:], offset) for t, offset in zip(trees, offsets))], dim=1
    )
    confidence = torch.cat([trees[0].confidence[:, :1], *(t.confidence[:, 1:] for t in trees)], dim=1)
    source = torch.cat([trees[0].source[:, :1], *(t.source[:, 1:] for t in trees)], dim=1)

    used = parents != NO_PARENT
    used[:, 0] = True
    same = _signatures(tokens, parents)
    equal = (same[:, :, None] == same[:, None]) & used[:, :, None] & used[:, None]  # [R, N, N]
    first = equal.to(torch.uint8).argmax(dim=2)  # the first column with the same path
    kept = used & (first == torch.arange(width, device=tokens.device))
    group = torch.where(equal, confidence[:, None], 0.0).amax(dim=2)
    union = torch.zeros_like(source)
    for tree, offset in zip(trees, offsets):  # within one of the trees at most one node has a given path
        own = slice(offset + 1, offset + tree.width)
        if tree.width > 1:
            union |= torch.where(equal[:, :, own], source[:, None, own], 0).amax(dim=2)
    hung = torch.where(parents == NO_PARENT, NO_PARENT, first.gather(1, parents.clamp(min=0)))
    return Trees(
        torch.where(kept, tokens, -1),
        torch.where(kept, hung, NO_PARENT),
        torch.where(kept, group, 0.0),
        torch.where(kept, union, 0),
    )


def pinned_nodes(trees: Trees, max_nodes: Tensor, max_depth: Tensor) -> Tensor:
    """[R, N] bool: the pinned nodes of the rows whose ``max_nodes`` and ``max_depth`` [R] have room for all of them."""
    pinned = is_node(trees) & (trees.source >> PINS != 0)
    shallow = (depths(trees.parents) <= max_depth[:, None]) | ~pinned
    fits = (pinned.sum(dim=1) <= max_nodes) & shallow.all(dim=1)
    return pinned & fits[:, None]


def best_nodes(
    trees: Trees,
    max_nodes: Tensor,
    max_depth: Tensor,
    width: int,
    min_probability: float = 0.0,
    spared: int = 0,
    price: Tensor | None = None,
) -> Trees:
    """The most probable ``max_nodes`` [R] nodes of each row no deeper than ``max_depth`` [R], in tree order.

    A row's pinned nodes come before all others, or not at all: see ``pinned_nodes``. Without them, those of them that
    a drafter guesses are nodes like any others. Of these, nodes whose path is less probable than ``min_probability``,
    or impossible, are left out.

    A parent is more probable than its child, so what is kept is a tree. Padding ends up on the right.

    Args:
        width: columns of the result, root included; at least 1 + max(max_nodes).
        spared: sources (bits) whose nodes are kept although they are less probable. They reach up to the root, as a
            node's ancestors have its source, too.
        price: what nodes cost; of those that are left, the ``worthwhile`` ones are kept.
    """
    score = path_confidence(trees)
    pinned = pinned_nodes(trees, max_nodes, max_depth)
    lowest = torch.where(trees.source & spared != 0, IMPOSSIBLE, max(min_probability, IMPOSSIBLE))
    guessed = is_node(trees) & ((trees.source & GUESSED != 0) | (trees.source >> PINS == 0))
    allowed = pinned | (guessed & (depths(trees.parents) <= max_depth[:, None]) & (score >= lowest))
    merit = torch.where(pinned, 2.0, torch.where(allowed, score, -1.0))
    merit[:, 0] = 3.0
    order = merit.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(trees.width, device=order.device).expand_as(order))
    kept = (allowed & (rank <= max_nodes[:, None])) | (rank == 0)
    if price is not None:
        kept &= rank <= worthwhile(torch.where(kept & (rank > 0), score, -1.0), price, pinned)[:, None]
    # move the kept columns to the left, in their old order
    column = kept.long().cumsum(1) - 1
    target = torch.where(kept, column, width)  # everything else lands in a column that is cut off
    size = (trees.num_rows, width + 1)

    def pack(values: Tensor, padding: float) -> Tensor:
        return values.new_full(size, padding).scatter_(1, target, values)[:, :width]

    hung = torch.where(trees.parents == NO_PARENT, NO_PARENT, column.gather(1, trees.parents.clamp(min=0)))
    return Trees(pack(trees.tokens, -1), pack(hung, NO_PARENT), pack(trees.confidence, 0.0), pack(trees.source, 0))


def worthwhile(probability: Tensor, price: Tensor, pinned: Tensor) -> Tensor:
    """[R] how many nodes of each row are worth their price: the pinned ones, and of the others the k most probable.

    k is such that the expected tokens a second, (R + sum of the path probabilities) / price, are the most.

    Args:
        probability: [R, N] of each node's path; negative for what is not offered.
        price: [K + 1] float64, seconds of the whole step with k nodes, K at least the nodes on offer.
        pinned: [R, N] bool, nodes that are bought whatever they promise.
    """
    rows, width = probability.shape
    order = torch.where(pinned, 2.0, probability).flatten().sort(descending=True, stable=True)
    there = order.values >= 0
    worth = torch.where(there, probability.flatten()[order.indices], 0.0)
    tokens = rows + worth.double().cumsum(0)
    number = torch.arange(1, len(tokens) + 1, device=tokens.device)
    rate = torch.where(there, tokens / price[number.clamp(max=len(price) - 1)], -1.0)
    rates = torch.cat([(rows / price[:1]), rate])
    must = pinned.sum()
    best = torch.where(torch.arange(len(rates), device=tokens.device) >= must, rates, -1.0).argmax()
    row = torch.div(order.indices, width, rounding_mode="floor")
    bought = (number <= best).long()
    return torch.zeros(rows, dtype=torch.int64, device=tokens.device).scatter_add(0, row, bought)


def path_columns(masks: Tensor, longest: int) -> Tensor:
    """Columns along the path of each node, root first: [...] masks -> [..., longest], padded with -1."""
    bits = torch.arange(MAX_TREE, device=masks.device)
    on_path = ((masks[..., None] >> bits) & 1).bool()
    rank = on_path.long().cumsum(-1) - 1
    target = torch.where(on_path & (rank < longest), rank, longest)
    columns = masks.new_full((*masks.shape, longest + 1), -1)
    return columns.scatter_(-1, target, bits.expand(on_path.shape))[..., :longest]


def walk(trees: Trees, masks: Tensor, drawn: Tensor, deepest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Descend from the root while a child carries the token drawn at its parent. Siblings must differ in their tokens.

    Args:
        masks: [R, N] ancestor masks of the trees.
        drawn: [R, N] token drawn at each node (anything at padding).
        deepest: D, at least the depth of the deepest node (host).

    Returns:
        accepted [R], the number of nodes walked below the root; path [R, D], their columns, padded with -1;
        bonus [R], the token drawn at the last one; tokens [R, D + 1], theirs and the bonus, padded with -1.
    """
    columns = torch.arange(trees.width, device=drawn.device)
    follows = trees.tokens == drawn.gather(1, trees.parents.clamp(min=0))  # the parent's draw is this node
    on_walk = reached((follows & is_node(trees)) | (columns == 0), masks)
    # siblings differ in their tokens, so the reached nodes are one path, and its end stands in the last such column
    last = (on_walk.long() * columns).argmax(dim=1)
    return path_to(trees, masks, last, drawn.gather(1, last[:, None]).squeeze(1), deepest)


def reached(passed: Tensor, masks: Tensor) -> Tensor:
    """[R, N] bool: the column and all its ancestors are ``passed`` [R, N]."""
    columns = torch.arange(passed.shape[1], device=passed.device)
    stopped = ((~passed).long() << columns).sum(dim=1, keepdim=True)  # bit i: column i is not passed
    return passed & (masks & stopped == 0)


def path_to(
    trees: Trees, masks: Tensor, last: Tensor, bonus: Tensor, deepest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The path from the root to column ``last`` [R], then the token ``bonus`` [R]: what ``walk`` returns."""
    path = path_columns(masks.gather(1, last[:, None]).squeeze(1), deepest + 1)[:, 1:]  # [R, D]
    accepted = (path >= 0).sum(dim=1)
    tokens = torch.full((len(bonus), deepest + 1), -1, dtype=torch.int64, device=bonus.device)
    tokens[:, :deepest] = torch.where(path >= 0, trees.tokens.gather(1, path.clamp(min=0)), -1)
    tokens.scatter_(1, accepted[:, None], bonus[:, None])
    return accepted, path, bonus, tokens


def _shift(parents: Tensor, offset: int) -> Tensor:
    return torch.where(parents > 0, parents + offset, parents)


def _signatures(tokens: Tensor, parents: Tensor) -> Tensor:
    """[R, N] int64 hash of the path of tokens from the root; two paths that differ get the same one by 2^-64 chance.

    (A collision would merge two nodes and so spoil a proposal, never the text: verification follows the arrays.)
    """
    depth = depths(parents)
    value = _mix(tokens * 0x9E3779B1 + depth * 0x85EBCA77C2B2AE3)
    value = torch.where(parents == NO_PARENT, 0, value)
    pointer = parents.clamp(min=0)
    for _ in range(_rounds(tokens.shape[1])):
        value = value + value.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return value


def _mix(x: Tensor) -> Tensor:
    """A 64-bit finaliser (shift, xor, multiply by odd constants); the arithmetic wraps."""
    x = (x ^ (x >> 31)) * 0x7FB5D329728EA185
    x = (x ^ (x >> 27)) * -0x7E25210B43D22BB3
    return x ^ (x >> 33)


def _rounds(width: int) -> int:
    """Doubling rounds that reach the root from any column of a tree of this width."""
    return max(1, (width - 1).bit_length())
