"""What grammars allow, applied to the logits of a step's nodes.

A mask is filled on the host, 32 ids a word; only then it becomes a tensor. On CUDA that happens while the target's pass
runs, see ``verify.masks_ahead``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decoding.grammar.matcher import Matcher, Path, words_of
from models.transfer import fetch, upload
from models.tree import GUESSED, NO_PARENT, PINS, Trees, is_node


class GrammarMasks:
    """Of the sequences of a step.

    Args:
        matchers: [S], None for sequences without a grammar.
        contested: something else bans tokens too, and a grammar wins where the two leave none.
    """

    def __init__(
        self, matchers: list[Matcher | None], vocab_size: int, device: torch.device, *, contested: bool = False
    ) -> None:
        self._contested = contested
        self._matchers = matchers
        self._vocab_size = vocab_size
        self._device = device

    def fill(self, row: np.ndarray, depth: np.ndarray, paths: np.ndarray) -> Tensor:
        """What may follow each of W nodes: [W, words] int32 on the device, the bit of an id set where it may.

        All bits are set at nodes of sequences without a grammar, at those whose path is not known (a drafter may know
        the depth alone), and where no text gets.

        Args:
            row: [W] the sequence of each node.
            depth: [W] tokens on the path from the root (excluded) to the node.
            paths: [W, D] those tokens; -1 where they are not known.
        """
        filled = np.full((len(row), words_of(self._vocab_size)), -1, dtype=np.int32)
        nodes: dict[int, list[tuple[int, Path]]] = {}
        for number, (sequence, level) in enumerate(zip(row.tolist(), depth.tolist(), strict=True)):
            path = tuple(paths[number, :level].tolist())
            if self._matchers[sequence] is not None and len(path) == level and -1 not in path:
                nodes.setdefault(sequence, []).append((number, path))
        for sequence, places in nodes.items():
            matcher = self._matchers[sequence]
            assert matcher is not None  # only those were gathered
            for (number, _), words in zip(places, matcher.masks([path for _, path in places]), strict=True):
                if words is not None:
                    filled[number] = words
        return upload(self._device, filled)[0]

    def apply(self, x: Tensor, filled: Tensor, ids: Tensor | None = None, raw: Tensor | None = None) -> Tensor:
        """The logits [W, V] with -inf where a mask [W, words] is not set.

        Args:
            raw: [W, >= V] the logits before anything was banned, for nodes at which nothing would be left.
            ids: [V] the id of each column; None: columns are ids.
        """
        unpacked = unpacked_by_host if filled.device.type == "cpu" else unpacked_anywhere
        allowed = unpacked(filled, self._vocab_size)
        if ids is None:
            masked = x.masked_fill(~allowed, -torch.inf)
            if not self._contested or raw is None:
                return masked
            otherwise = raw[:, : self._vocab_size].masked_fill(~allowed, -torch.inf)
        else:
            masked = x.masked_fill(~allowed[:, ids], -torch.inf)
            otherwise = x  # a draft vocabulary may have nothing that is allowed: any guess will do, it is dropped later
        return torch.where(masked.amax(dim=1, keepdim=True) == -torch.inf, otherwise, masked)

    def permitted(self, trees: Trees) -> Trees:
        """A drafter's trees [S, N] without the nodes that their grammars refuse: they would be bought for nothing.

        Pinned nodes stay, but are no longer guesses.
        """
        if trees.width == 1:
            return trees
        tokens, parents = (part.tolist() for part in fetch(trees.tokens, trees.parents)())
        refused = np.zeros(trees.tokens.shape, dtype=bool)
        for sequence, matcher in enumerate(self._matchers):
            if matcher is not None:
                refused[sequence] = _refused(matcher, tokens[sequence], parents[sequence])
        if not refused.any():
            return trees
        drop = upload(trees.tokens.device, refused)[0] & is_node(trees)
        gone = drop & (trees.source >> PINS == 0)
        return Trees(
            trees.tokens.masked_fill(gone, -1),
            trees.parents.masked_fill(gone, NO_PARENT),
            trees.confidence.masked_fill(drop, 0.0),
            torch.where(drop, torch.where(gone, 0, trees.source & ~GUESSED), trees.source),
        )


def _refused(matcher: Matcher, tokens: list[int], parents: list[int]) -> list[bool]:
    """[N] which nodes of a tree the grammar refuses, and all below them."""
    if matcher.is_slow:
        return [True] * len(tokens)
    paths: list[Path] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token) if parent != NO_PARENT else ())
    kept: dict[Path, bool] = {(): True}
    for path in sorted(set(paths[1:])):  # depth first, so that what is above is known
        if path:
            kept[path] = kept[path[:-1]] and matcher.allows(path)
    return [not kept[path] for path in paths]


def unpacked_by_host(filled: Tensor, vocab_size: int) -> Tensor:
    """[W, V] bool, the bits of masks [W, words] on the host."""
    bits = np.unpackbits(filled.numpy().view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def unpacked_anywhere(filled: Tensor, vocab_size: int) -> Tensor:
    """The same on any device."""
    shifts = torch.arange(32, dtype=torch.int32, device=filled.device)
    return (filled[:, :, None] >> shifts & 1).flatten(1)[:, :vocab_size].bool()
