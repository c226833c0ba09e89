"""Which K/V an accepted path moves: only what must move, or everything at a size that the host knows."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decoding.cache import all_moves, needed_moves
from models import kernels
from models.batch import PAGE_SIZE
from models.kv_cache import KVCache, KVSpec

CPU = torch.device("cpu")
PAGES = 40


def filled() -> KVCache:
    """A cache in which every slot holds its own number."""
    kv = KVCache(KVSpec(2, 1, 1, 1), PAGES, torch.float32, CPU)
    numbers = torch.arange((PAGES + 1) * PAGE_SIZE, dtype=torch.float32)
    kv.keys[:] = numbers[None, :, None, None]
    kv.values[:] = -numbers[None, :, None, None]
    return kv


@st.composite
def verdicts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """(slots [W], first [S], path [S, D]) of rows with up to 9 nodes."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    deepest = max(counts) - 1 + draw(st.integers(0, 2))
    slots = rng.sample(range(PAGES * PAGE_SIZE), sum(counts))
    paths = []
    for count in counts:
        path = sorted(rng.sample(range(1, count), rng.randrange(count)))
        paths.append(path + [-1] * (deepest - len(path)))
    first = [sum(counts[:row]) for row in range(len(counts))]
    return torch.tensor(slots), torch.tensor(first), torch.tensor(paths, dtype=torch.int64).view(len(counts), deepest)


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    assert kernels.load(), "the kernels must work where tests run"


@given(verdicts())
def test_paths_end_up_behind_their_roots(verdict: tuple[Tensor, Tensor, Tensor]) -> None:
    slots, first, path = verdict
    scratch = PAGES * PAGE_SIZE
    few, many = filled(), filled()
    needed = needed_moves(slots, first, path, scratch)
    if needed is not None:
        few.move(*needed)
    source, target = all_moves(slots, first, path, scratch)
    assert source.shape == target.shape == (path.numel(),)
    many.move(source, target)
    for row in range(len(first)):
        for level, column in enumerate(path[row].tolist(), start=1):
            if column >= 0:
                there = int(slots[first[row] + level])
                assert float(many.keys[1, there, 0, 0]) == float(slots[first[row] + column])
    fused = filled()
    wanted = torch.arange(len(slots)).flip(0)  # nodes need not stand in the order of their query tokens
    torch.ops.saccade.keep_paths(fused.keys, fused.values, slots.flip(0), wanted, first, path)
    assert torch.equal(few.keys, many.keys)
    assert torch.equal(few.keys, fused.keys)
    assert torch.equal(few.values, fused.values)
    assert torch.equal(few.values, many.values)


@given(verdicts())
def test_hidden_states_of_paths_are_gathered(verdict: tuple[Tensor, Tensor, Tensor]) -> None:
    slots, first, path = verdict
    tokens = len(slots) + 3
    wanted = torch.arange(tokens).flip(0)[: len(slots)]
    parts = [torch.rand(tokens, width).to(torch.bfloat16) for width in (4, 1, 3)]
    made = torch.ops.saccade.gather_paths(parts, wanted, first, path)
    columns = torch.nn.functional.pad(path, (1, 0)).clamp(min=0)  # the root, and where a path has ended the root again
    expected = torch.cat(parts, dim=1)[wanted[first[:, None] + columns]]
    assert torch.equal(made, expected.flatten(0, 1))
