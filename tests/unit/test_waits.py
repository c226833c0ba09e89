"""A step on a device reads once: its results. On CPU tensors, with what CUDA gets in place of what the CPU does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from decoding.acceptance import Acceptance
from decoding.batcher import Chain, build_anywhere
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.engine import Engine
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from models.graphs import EagerCapture
from models.transfer import fetch, upload
from models.tree import Trees, root_masks, roots_only
from tests.engines import BuildDrafter, device_ops, make_engine, tiny_decoder
from tests.feature_doubles import ToyFeatureModel
from tests.waits import watch

target = cache(lambda: tiny_decoder(torch.float64))
CPU = torch.device("cpu")

DRAFTERS: dict[str, BuildDrafter] = {
    "ngram": lambda context: NgramDrafter(NgramOptions(), context),
    "draft": lambda context: DraftModelDrafter(
        DraftModelOptions("", depth=3, top_k=3, beam=2), context, tiny_decoder(torch.float64, blur=0.05)
    ),
    "feature": lambda context: FeatureDrafter(TreeOptions("", depth=3), context, ToyFeatureModel(target())),
}
PARAMS = {
    "greedy": SamplingParams(30, 0.0, ignore_eos=True),
    "sampled": SamplingParams(30, 0.9, seed=1, ignore_eos=True),
    "filtered": SamplingParams(30, 0.9, top_k=20, top_p=0.9, min_p=0.02, seed=1, ignore_eos=True),
    "penalised": SamplingParams(30, 0.9, seed=1, repetition_penalty=1.2, min_tokens=20, logit_bias={3: 1.0}),
    "logprobs": SamplingParams(30, 0.9, seed=1, logprobs=2, ignore_eos=True),
}
# the end of drafting by low confidence, which CUDA is not asked for; whether a draft is broken, which it tells a step
# later; the checks that the double of a model makes
ONLY_HERE = ("decoding/drafters/expansion.py", "decoding/drafters/team.py", "models/batch.py")


def an_engine(names: tuple[str, ...]) -> Engine:
    drafters = {name: DRAFTERS[name] for name in names}
    return make_engine(target(), drafters, ops=device_ops(), capture=EagerCapture(), max_nodes=6, max_depth=3)


@pytest.mark.parametrize("typical", [False, True])
@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("names", [(), ("ngram",), ("draft",), ("feature",), ("draft", "ngram", "feature")])
def test_a_step_reads_its_results_and_nothing_else(names: tuple[str, ...], kind: str, typical: bool) -> None:
    engine = an_engine(names)
    wish = SpeculationParams(acceptance=Acceptance("typical") if typical else None)
    for number in range(3):
        engine.submit(GenerateRequest(f"r{number}", tuple(range(1, 20 + number)), PARAMS[kind], wish))
    steps = tokens = 0
    while engine.has_work and steps < 14:
        with watch() as waits:
            events = engine.step()
        steps += 1
        tokens += sum(len(event.token_ids) for event in events)
        others = [each for each in waits.others if not each.startswith(ONLY_HERE)]
        assert not others
        assert waits.reads == 1
    assert steps > 4
    assert tokens > 3 * (steps - 1), "no draft was accepted" if names else ""


def test_building_a_batch_reads_nothing() -> None:
    rng = np.random.default_rng(1)
    chains = [Chain(rng.integers(0, 9, 5), 3, [4, 7]), Chain(rng.integers(0, 9, 1), 17, [2, 3])]
    roots = roots_only(torch.tensor([3, 4]))
    wide = device_ops().tree.choose([two_trees()], [2, 2], [2, 2], 0.0)
    with watch() as waits:
        build_anywhere(chains, roots, root_masks(2, CPU), [1, 1])
        batch, _ = build_anywhere(chains, wide.trees, wide.masks, wide.counts)
    assert (waits.reads, waits.others) == (0, [])
    batch.validate()


def two_trees() -> Trees:
    """One with a path of two nodes, one without any."""
    tokens, parents = torch.tensor([[3, 5, 6], [4, -1, -1]]), torch.tensor([[-1, 0, 1], [-1, -1, -1]])
    confidence = torch.tensor([[1.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    return Trees(tokens, parents, confidence, (parents >= 0).long())


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x.sum()),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.__setitem__(x > 5, 0),
    "where": lambda x: torch.where(x > 0),
    "upload": lambda x: torch.tensor([1, 2], device=x.device),
    "move": lambda x: x.to(x.device),
    "repeat": lambda x: x.repeat_interleave(x),
    "index": lambda x: [1, 2, 3, 4][x[0]],
    "cpu": lambda x: x.cpu(),
}


@pytest.mark.parametrize("read", READS)
def test_the_watch_sees(read: str) -> None:
    with watch() as waits:
        READS[read](torch.tensor([1, 2, 3]))
    assert waits.others
    assert waits.reads == 0


def test_the_watch_counts_fetches() -> None:
    x = torch.arange(3)
    with watch() as waits:
        upload(CPU, np.arange(3))
        first = fetch(x, x + 1)
        assert waits.reads == 0
        assert [each.tolist() for each in first()] == [[0, 1, 2], [1, 2, 3]]
        fetch(x)()
    assert (waits.reads, waits.others) == (2, [])
