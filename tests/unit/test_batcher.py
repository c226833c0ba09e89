"""The batch of a step: the fused builder against the plain one, and both against what a batch must be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.batcher import Chain, build, build_anywhere
from decoding.cache import pages_for
from models import kernels
from models.tree import NO_PARENT, Trees, ancestor_masks


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Chain], Trees, list[int]]:
    rows = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, 20), min_size=0, max_size=rows))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    pages = random.permutation(500).tolist()
    chains = []
    for row in range(rows):
        start, length = draw(st.integers(0, 70)), draw(st.integers(1, 40))
        slots = start + length + (counts[row] - 1 if row < len(counts) else 0)
        owned = [pages.pop() for _ in range(pages_for(slots) + draw(st.integers(0, 2)))]
        chains.append(Chain(random.integers(0, 1000, length), start, owned))
    width = max(counts, default=1)
    tokens, parents = np.full((len(counts), width), -1), np.full((len(counts), width), NO_PARENT)
    for row, count in enumerate(counts):
        tokens[row, 0] = chains[row].tokens[-1]
        for column in range(1, count):
            tokens[row, column], parents[row, column] = random.integers(1000), random.integers(column)
    parts = torch.from_numpy(tokens), torch.from_numpy(parents)
    return chains, Trees(*parts, torch.ones(parts[0].shape), torch.zeros_like(parts[0])), counts


@given(steps(), st.sampled_from([0, 0, -1, 5]))
@settings(max_examples=150, deadline=None)
def test_fused_builder_is_the_plain_one(step: tuple[list[Chain], Trees, list[int]], shift: int) -> None:
    chains, trees, counts = step
    masks = ancestor_masks(trees.parents)
    fused, plain = build(chains, trees, masks, counts, shift), build_anywhere(chains, trees, masks, counts, shift)
    for ours, theirs in zip(fused, plain, strict=True):
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype, field.name
                assert torch.equal(a, b), field.name
            else:
                assert a == b, field.name
    plain[0].validate()


@pytest.mark.skipif(not kernels.load(), reason="the kernels are not built")
def test_fused_builder_refuses_rows_without_room() -> None:
    chain = Chain(np.arange(17), 0, [3])
    roots = torch.tensor([[16]])
    trees = Trees(roots, roots * 0 - 1, torch.ones(1, 1), roots * 0)
    with pytest.raises(RuntimeError, match="no room"):
        build([chain], trees, ancestor_masks(trees.parents), [1])
