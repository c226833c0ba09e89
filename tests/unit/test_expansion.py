"""Growing a tree: what each node's pass is given, and what its children are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from decoding.batcher import Chain, build
from decoding.drafters.expansion import Expansion, TreeOptions
from decoding.errors import ConfigError
from decoding.plan import Guide
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models import kernels
from models.batch import PAGE_SIZE, RaggedBatch
from models.tree import NO_PARENT, Trees, root_masks, roots_only
from tests.steps import sampling_of

VOCAB = 12
LAST_POSITION = 40
PAGES = [[7 * n + page for page in range(6)] for n in range(3)]
LENGTHS = (5, 39, 18)  # of the rows' texts; the second one's nodes lie beyond the last position
HEAD = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def after(above: Tensor, token: Tensor) -> Tensor:
    """What a node is, [..., VOCAB]: a function of its path alone."""
    return torch.tanh(above @ MIX + torch.nn.functional.one_hot(token, VOCAB))


def logits(hidden: Tensor) -> Tensor:
    return 3 * hidden @ HEAD


class Passes:
    """A model whose hidden states are paths; it checks the batches that it is given.

    Args:
        root: [S, VOCAB] hidden states of the roots.
    """

    def __init__(self, root: Tensor) -> None:
        self.depths: list[int] = []
        self.slots: list[int] = []
        self._root = root
        self._tokens = torch.empty(len(root), 0, dtype=torch.int64)  # of the scratch nodes so far

    def __call__(self, batch: RaggedBatch, carry: Tensor | None, depth: int) -> tuple[Tensor, Tensor]:
        batch.validate()
        assert carry is not None
        text = torch.tensor(LENGTHS)[batch.row_of.long()]
        assert batch.positions.tolist() == (text - 1 + depth).clamp(max=LAST_POSITION).tolist()
        assert torch.equal(batch.visible.long(), text)
        self.depths.append(depth)
        self.slots += batch.slots.tolist()
        self._tokens = torch.cat([self._tokens, batch.token_ids.view(len(LENGTHS), -1)], dim=1)
        hidden = after(carry, batch.token_ids)
        for row, mask, made in zip(batch.row_of.tolist(), batch.tree_mask.tolist(), hidden, strict=True):
            path = [token for node, token in enumerate(self._tokens[row]) if mask >> 1 + node & 1]
            state = self._root[row]
            for token in path:
                state = after(state, token)
            assert mask & 1
            assert len(path) == depth
            torch.testing.assert_close(made, state)
        return hidden, hidden


def rooted(temperature: float) -> tuple[list[Sequence], Trees, RaggedBatch]:
    """Rows, their roots, and the pass over the two tokens of each that end in its root."""
    rows = [
        Sequence(GenerateRequest(f"r{n}", (1,) * (length - 1) + (n,), SamplingParams(temperature=temperature)), 0, n)
        for n, length in enumerate(LENGTHS)
    ]
    trees = roots_only(torch.tensor([int(row.tokens[-1]) for row in rows]))
    chains = [Chain(np.array(row.tokens[-2:]), row.length - 2, own) for row, own in zip(rows, PAGES, strict=True)]
    batch, _ = build(chains, trees, root_masks(len(rows), trees.tokens.device), [1] * len(rows))
    return rows, trees, batch


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize(("top_k", "beam", "depth"), [(1, 1, 5), (3, 3, 5), (4, 2, 3), (2, 7, 4), (5, 4, 1)])
def test_every_node_comes_from_its_own_path(top_k: int, beam: int, depth: int, carried: bool) -> None:
    rows, trees, batch = rooted(0.0)
    roots = trees.tokens[:, 0]
    options = TreeOptions("", depth=depth, top_k=top_k, beam=beam, tau=1.3, min_confidence=0.0)
    above = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    root = after(above, roots)

    passes = Passes(root)
    expansion = Expansion(options, 4, LAST_POSITION, passes, logits)
    if not carried:  # a model that takes nothing of a node's parent: a node is its token
        expansion = Expansion(options, 4, LAST_POSITION, alone, logits)
    number = torch.arange(len(rows))
    sampling = sampling_of(rows, depth, vocab=VOCAB)
    grown = expansion.grow(trees, batch, root, root if carried else None, number, depth, sampling)
    grown.validate()

    states = torch.empty(*grown.tokens.shape, VOCAB, dtype=torch.float64)
    states[:, 0] = root
    for column in range(1, grown.width):
        parent = grown.parents[:, column]
        mine, token = states[number, parent], grown.tokens[:, column]
        chance = torch.softmax(logits(mine) / options.tau, dim=1)[number, token]
        torch.testing.assert_close(grown.confidence[:, column], chance.float())
        assert (chance.unsqueeze(1) <= torch.softmax(logits(mine) / options.tau, dim=1)).sum(1).max() <= top_k
        states[:, column] = after(mine if carried else torch.zeros_like(mine), token)
    assert (grown.source[:, 1:] == 4).all()
    assert (grown.source[:, 0] == 0).all()
    if carried:
        assert passes.depths == list(range(1, depth))
        assert len(set(passes.slots)) == len(passes.slots), "no scratch slot is written twice"
        written = {slot // PAGE_SIZE for slot in passes.slots}
        assert written <= {page for own in PAGES for page in own}
        assert len(passes.slots) <= len(rows) * options.scratch_slots(depth)
    assert (grown.parents[:, 1:] != NO_PARENT).all()


def alone(batch: RaggedBatch, carry: Tensor | None, depth: int) -> tuple[Tensor, None]:
    assert carry is None
    return after(torch.zeros(len(batch.token_ids), VOCAB, dtype=torch.float64), batch.token_ids), None


@pytest.mark.skipif(not kernels.load(), reason="the kernels are not built")
@pytest.mark.parametrize("least", [None, 0.0, 1.2])
@pytest.mark.parametrize(("top_k", "beam", "depth"), [(1, 1, 5), (3, 3, 5), (4, 2, 3), (2, 7, 4), (12, 4, 2)])
def test_the_fused_way_is_the_plain_one(top_k: int, beam: int, depth: int, least: float | None) -> None:
    """The same passes over the same batches, and the same trees, also where drafting ends early."""
    rows, trees, batch = rooted(0.8)
    options = TreeOptions("", depth=depth, top_k=top_k, beam=beam, min_confidence=0.2)
    root = after(torch.randn(len(rows), VOCAB, dtype=torch.float64), trees.tokens[:, 0])
    number, guide = torch.tensor([2, 0, 1]), Guide(taus=(1.0, 0.7), least_gain=least)
    sampling = sampling_of([rows[1], rows[2], rows[0]], depth, vocab=VOCAB, ops="cpu")
    seen: list[list[RaggedBatch]] = []

    def grown(grow: Callable[..., Trees]) -> Trees:
        seen.append([])
        return grow(trees, batch, root, root, number, depth, sampling, guide)

    def forward(step: RaggedBatch, carry: Tensor | None, level: int) -> tuple[Tensor, Tensor]:
        assert carry is not None
        seen[-1].append(step)
        hidden = after(carry, step.token_ids)
        return hidden, hidden

    expansion = Expansion(options, 4, LAST_POSITION, forward, logits)
    fused, plain = grown(expansion.grow), grown(expansion.grow_anywhere)
    for ours, theirs in [(fused, plain), *zip(*seen, strict=True)]:
        for field in dataclasses.fields(ours):
            mine, other = getattr(ours, field.name), getattr(theirs, field.name)
            assert torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other, field.name
            assert not isinstance(mine, Tensor) or mine.dtype == other.dtype, field.name


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"top_k": 0}, {"beam": 0}, {"beam": 32, "depth": 3}, {"tau": 0.0}])
def test_options_that_cannot_work(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="eagle9: "):
        TreeOptions("", **wrong).check("eagle9")  # type: ignore[arg-type]
