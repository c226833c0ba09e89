"""What a forward pass costs by its number of query tokens: trees of random tokens on one row, the target alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from decoding.batcher import Chain, build
from decoding.cache import pages_for
from models.batch import MAX_TREE, RaggedBatch
from models.kv_cache import KVCache
from models.target import CausalModel
from models.tree import NO_PARENT, Trees, ancestor_masks

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
CONTEXT = 256
DEPTH = 8  # of the trees
SEED = 20


def random_tree(root: int, size: int, vocab_size: int, rng: random.Random) -> Trees:
    """One tree of ``size`` nodes, root included, at most ``DEPTH`` deep; [1, size]."""
    parents, depth = [NO_PARENT], [0]
    while len(parents) < size:
        parent = rng.randrange(len(parents))
        if depth[parent] < DEPTH:
            parents.append(parent)
            depth.append(depth[parent] + 1)
    tokens = [root, *(rng.randrange(vocab_size) for _ in parents[1:])]
    hung = torch.tensor([parents])
    return Trees(torch.tensor([tokens]), hung, torch.full((1, size), 0.5), (hung != NO_PARENT).long())


class ForcedTrees:
    """A row with a context in the cache, and trees of given sizes that hang on it.

    Args:
        sizes: query tokens of each tree, root included, at most 64.
    """

    def __init__(self, target: CausalModel, sizes: Sequence[int] = SIZES, context: int = CONTEXT) -> None:
        rng = random.Random(SEED)
        self.target = target
        pages = list(range(pages_for(context + MAX_TREE)))
        self.kv = KVCache(target.kv_spec, len(pages), target.dtype, target.device)
        tokens = np.array([rng.randrange(target.vocab_size) for _ in range(context)])
        root = Chain(tokens[-1:], context - 1, pages)
        bare = random_tree(int(tokens[-1]), 1, target.vocab_size, rng)
        self._forward(self._batch(Chain(tokens, 0, pages), bare))
        trees = {size: random_tree(int(tokens[-1]), size, target.vocab_size, rng) for size in sizes}
        self.batches = {size: self._batch(root, tree) for size, tree in trees.items()}

    def _batch(self, chain: Chain, tree: Trees) -> RaggedBatch:
        device = self.target.device
        placed = Trees(*(part.to(device) for part in (tree.tokens, tree.parents, tree.confidence, tree.source)))
        return build([chain], placed, ancestor_masks(placed.parents), [placed.width])[0]

    @torch.inference_mode()
    def _forward(self, batch: RaggedBatch) -> None:
        out = self.target.forward(batch, self.kv, ())
        self.target.logits(out.hidden[batch.wanted])
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)

    def seconds(self, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[int, list[float]]:
        """Of a forward pass and its logits, by tree size: one time a round, the sizes in an order that changes."""
        times: dict[int, list[float]] = {size: [] for size in self.batches}
        for number in range(-1, rounds):  # the first round is not counted
            order = random.Random(number).sample(sorted(self.batches), len(self.batches))
            for size in order:
                started = clock()
                self._forward(self.batches[size])
                if number >= 0:
                    times[size].append(clock() - started)
        return times
