"""What the engine drafts with MTP modules is what the paper's formulas give for the text so far."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from decoding.drafters.base import DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.plan import Plan, Quota
from decoding.request import GenerateRequest, SamplingParams
from decoding.sampling import Sampling
from models.decoder import Decoder
from models.heads.mtp import MTPConfig, MTPModel
from models.tree import NO_PARENT, Trees
from tests.engines import ALL_NODES, make_engine, run, tiny_decoder
from tests.unit.test_mtp import Dense, features_of, random_tokens, tiny_mtp

TOP = 3


class Compared(FeatureDrafter):
    """Holds every tree that it proposes at temperature 0 against the dense implementation."""

    def __init__(self, context: DrafterContext, model: MTPModel, dense: Dense, target: Decoder) -> None:
        options = TreeOptions("", depth=4, top_k=TOP, beam=2, min_confidence=0.0)
        super().__init__(options, context, model)
        self.dense, self.decoder = dense, target
        self.compared = 0

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = super().propose(plan, quota, sampling)
        for number, row in enumerate(plan.deciding):
            if trees is not None and bool((trees.parents[number] != NO_PARENT).any()):
                self.compare(row.sequence.tokens.tolist(), trees.tokens[number], trees.parents[number])
        return trees

    def compare(self, text: list[int], tokens: torch.Tensor, parents: torch.Tensor) -> None:
        features = features_of(self.decoder, self.dense.config, text)[:-1]
        paths: dict[int, list[int]] = {0: []}
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents.tolist()):
            if parent != NO_PARENT:
                paths[node] = [*paths[parent], int(tokens[node])]
                children.setdefault(parent, []).append(int(tokens[node]))
        for parent, drafted in children.items():
            expected = self.dense.drafted(text, features, paths[parent])[-1]
            assert drafted == expected.topk(TOP).indices.tolist(), (text, paths[parent])
            self.compared += 1


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("step_tokens", [7, 2048])
def test_drafts_are_those_of_the_paper(modules: int, step_tokens: int) -> None:
    """Through chunked prompts, shared prefixes, preemption and whatever was accepted: also what other drafts left."""
    target = tiny_decoder(torch.float64)
    config = replace(MTPConfig.like(target.config, modules), feed="pre")
    model, dense = tiny_mtp(target, config, fused=True)
    drafters: list[Compared] = []

    def build(context: DrafterContext) -> Compared:
        drafters.append(Compared(context, model, dense, target))
        return drafters[0]

    engine = make_engine(
        target,
        {"mtp": build},
        num_pages=9,
        max_num_batched_tokens=step_tokens,
        max_nodes=12,
        plan=ALL_NODES,
    )
    shared = random_tokens(40, 9)
    params = SamplingParams(25, 0.0, ignore_eos=True)
    for turn in range(2):
        prompts = [shared + random_tokens(1 + 3 * number, number) for number in range(3)] + [random_tokens(2, 8)]
        run(engine, [GenerateRequest(f"{turn}.{n}", tuple(p), params) for n, p in enumerate(prompts)])
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.cached_prompt_tokens > 0
    assert drafters[0].compared > 200
