"""Parts of a step without an engine: packed trees, and the sampling of sequences."""

from __future__ import annotations

from functools import cache

import torch

from decoding.batcher import Nodes
from decoding.noise import NoiseBank
from decoding.sampling import Sampling, count, make_table
from decoding.sampling_ops import SAMPLING_OPS, SamplingOps
from decoding.sequence import Sequence
from models.tree import NO_PARENT, Trees, ancestor_masks, depths

CPU = torch.device("cpu")
ON_CPU = [name for name in SAMPLING_OPS if name != "triton"]
Tree = list[tuple[int, int]]  # (parent, token) of each column after the root


@cache
def ops_of(name: str) -> SamplingOps:
    return SAMPLING_OPS[name]()


def sampling_of(
    sequences: list[Sequence], depth: int = 8, *, vocab: int, eos: tuple[int, ...] = (), ops: str = "torch"
) -> Sampling:
    """Everything for one step in which these sequences decide. Their request ids may repeat, so ids are made unique."""
    for number, sequence in enumerate(sequences):
        sequence.id = (f"r{number}", sequence.choice)
    bank = NoiseBank(vocab, depth + 2, CPU, ops_of(ops).fill_noise)
    bank.fill(sequences, depth)
    table = make_table(sequences, bank.first_rows(sequences), vocab, eos, CPU)
    next_position = torch.tensor([s.length for s in sequences])
    return Sampling(table, count(sequences, table, vocab, CPU), bank, next_position, vocab, ops_of(ops))


def pack(batch: list[Tree]) -> tuple[Trees, Nodes]:
    """Trees with token 0 at their roots and padding on the right, and their nodes row after row."""
    counts = [1 + len(tree) for tree in batch]
    size = (len(batch), max(counts))
    tokens, parents = torch.full(size, -1), torch.full(size, NO_PARENT)
    tokens[:, 0] = 0
    for r, tree in enumerate(batch):
        for column, (parent, token) in enumerate(tree, start=1):
            parents[r, column], tokens[r, column] = parent, token
    trees = Trees(tokens, parents, torch.ones(size), torch.zeros_like(parents))
    trees.validate()
    columns = torch.tensor([column for count in counts for column in range(count)])
    row = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
    first = torch.tensor([0, *counts[:-1]]).cumsum(0)
    return trees, Nodes(row, columns, depths(parents)[row, columns], first, ancestor_masks(parents))
