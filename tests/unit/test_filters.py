"""Top-k, top-p and min-p against transformers' warpers, and exactly-k on ties against a sort in Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decoding.filters import Filters, kept, kept_everywhere

VOCAB = 97
OFF = VOCAB  # top_k


def filters(*nodes: tuple[int, float, float]) -> Filters:
    top_k, top_p, min_p = zip(*nodes, strict=True)
    return Filters(
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
        widest=max((k for k in top_k if k < VOCAB), default=0),
    )


def by_transformers(logits: Tensor, temperature: float, node: tuple[int, float, float]) -> Tensor:
    """[V] bool: what transformers' generate leaves, in its order."""
    top_k, top_p, min_p = node
    ids, scores = torch.zeros(1, 1, dtype=torch.int64), logits[None].clone()
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k < VOCAB:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return scores[0] > -torch.inf


def by_sorting(logits: list[float], node: tuple[int, float, float]) -> list[bool]:
    """The definition: rank by logit descending and id ascending; the best one is always kept."""
    top_k, top_p, min_p = node
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = {i: math.exp(logits[i] - logits[order[0]]) for i in order}
    inside = math.fsum(weights[i] for i in order[:top_k])
    keep, above = [False] * len(logits), 0.0
    for rank, i in enumerate(order[:top_k]):
        keep[i] = rank == 0 or (above < top_p * inside and weights[i] >= min_p)
        above += weights[i]
    return keep


def both_ways(scaled: Tensor, parameters: Filters) -> Tensor:
    """[W, V] what the filters keep; tested one by one and by sorting, which must agree."""
    everywhere = kept_everywhere(scaled, parameters)
    everyone = torch.arange(scaled.shape[1]).expand(scaled.shape)
    assert torch.equal(kept(scaled, parameters, everyone), everywhere)
    backwards = everyone.flip(1)
    assert torch.equal(kept(scaled, parameters, backwards), everywhere.flip(1))
    return everywhere


NODES = [
    (top_k, top_p, min_p) for top_k in (1, 2, 7, 40, OFF) for top_p in (0.01, 0.4, 0.9, 1.0) for min_p in (0.0, 0.1, 1)
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_transformers(temperature: float, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(len(NODES), VOCAB, generator=torch.Generator().manual_seed(1), dtype=dtype)
    ours = both_ways(logits / temperature, filters(*NODES))
    for row, node in enumerate(NODES):
        assert torch.equal(ours[row], by_transformers(logits[row], temperature, node)), node


logit = st.integers(-6, 6).map(lambda value: value / 2)  # many ties
node = st.tuples(st.integers(1, 13), st.sampled_from([0.03, 0.37, 0.61, 0.97, 1.0]), st.sampled_from([0.0, 0.2, 1.0]))


@given(st.integers(1, 4).flatmap(lambda rows: st.lists(st.lists(logit, min_size=12, max_size=12), min_size=rows)), node)
@settings(max_examples=100, deadline=None)
def test_ties_go_to_the_lower_id(rows: list[list[float]], parameters: tuple[int, float, float]) -> None:
    scaled = torch.tensor(rows, dtype=torch.float64)
    ours = both_ways(scaled, filters(*[parameters] * len(rows)))
    assert ours.tolist() == [by_sorting(row, parameters) for row in rows]
    assert (ours.sum(dim=1) <= parameters[0]).all()


def test_exactly_k_on_ties() -> None:
    scaled = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    for k, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])):
        assert both_ways(scaled, filters((k, 1.0, 0.0)))[0].nonzero().flatten().tolist() == expected


def test_top_p_is_taken_within_top_k() -> None:
    scaled = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert both_ways(scaled, filters((OFF, 0.6, 0.0))).tolist() == [[True, True, False, False]]
    assert both_ways(scaled, filters((2, 0.5, 0.0))).tolist() == [[True, False, False, False]]  # 0.4 of 0.7


def test_banned_tokens_count_for_nothing() -> None:
    scaled = torch.tensor([[5.0, 0.0, 1.0, -1.0]])
    scaled[0, 0] = -torch.inf
    assert both_ways(scaled, filters((OFF, 1.0, 0.4))).tolist() == [[False, False, True, False]]
    assert both_ways(scaled, filters((2, 1.0, 0.0))).tolist() == [[False, True, True, False]]
    assert not both_ways(scaled, filters((4, 0.99, 0.0)))[0, 0]


def test_the_best_token_survives_anything() -> None:
    scaled = torch.zeros(1, 5)
    assert both_ways(scaled, filters((1, 1e-9, 1.0))).tolist() == [[True, False, False, False, False]]
    assert both_ways(scaled, filters((OFF, 1e-9, 1.0))).tolist() == [[True, False, False, False, False]]


def test_each_node_has_its_own_parameters() -> None:
    scaled = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(3, 4)
    ours = both_ways(scaled, filters((1, 1.0, 0.0), (OFF, 1.0, 0.0), (3, 1.0, 0.3)))
    assert ours.sum(dim=1).tolist() == [1, 4, 2]
