"""Typical acceptance against its definition, candidate by candidate, in plain Python; and what it does to requests."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from decoding.acceptance import Acceptance
from decoding.engine import Engine
from decoding.noise import as_int64, gumbel
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sequence import Sequence
from decoding.verify import Rule, Verdict, rule_by_request
from decoding.verify.typical import typical
from models.tree_ops import TREE_OPS, load_tree_ops
from tests.doubles import GarbageDrafter
from tests.engines import ALL_NODES, EOS, VOCAB, make_engine, run, tiny_decoder
from tests.steps import CPU, Tree, pack, sampling_of

WORDS = 8  # few, so that children are likely tokens and equal paths occur
PROMPT = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """One row: a tree, the logits at its nodes [N, V], and what was asked for."""

    tree: Tree
    logits: np.ndarray
    params: SamplingParams
    acceptance: Acceptance

    def sequence(self) -> Sequence:
        speculation = SpeculationParams(acceptance=self.acceptance)
        return Sequence(GenerateRequest("r", PROMPT, self.params, speculation), 0, self.params.seed or 0)


@dataclass(frozen=True)
class Judged:
    path: list[int]
    bonus: int
    margin: float  # how far the nearest decision was from going the other way
    tied: bool  # more than one path was as long and as likely


def rounded(value: float) -> float:
    """Parameters are kept in float32."""
    return float(np.float32(value))


def by_definition(case: Case) -> Judged:
    """Medusa's procedure: each path to a leaf is a candidate; how much of it is accepted, and how likely is that?"""
    wish, temperature = case.acceptance, rounded(case.params.temperature)
    nodes: dict[int, tuple[int, int]] = {0: (-1, -1), **dict(enumerate(case.tree, start=1))}
    probs = np.exp(case.logits / temperature - (case.logits / temperature).max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    margins = [1.0]

    def passes(column: int) -> bool:
        parent, token = nodes[column]
        entropy = -sum(p * math.log(p + 1e-5) for p in probs[parent])
        threshold = min(rounded(wish.epsilon), rounded(wish.delta) * math.exp(-entropy))
        margins.append(abs(probs[parent][token] - threshold))
        return bool(probs[parent][token] > threshold)

    accepted: dict[tuple[int, ...], float] = {}  # accepted part of each candidate, in their order -> sum of log p
    inner = {parent for parent, _ in case.tree}
    for leaf in (column for column in nodes if column not in inner or not case.tree):
        path: list[int] = []
        while leaf > 0:
            path.insert(0, leaf)
            leaf = nodes[leaf][0]
        kept = next((i for i, column in enumerate(path) if not passes(column)), len(path))
        accepted[tuple(path[:kept])] = math.fsum(math.log(probs[nodes[c][0]][nodes[c][1]]) for c in path[:kept])
    longest = max(len(path) for path in accepted)
    sums = {path: total for path, total in accepted.items() if len(path) == longest}
    best = max(sums.values())
    equal = [path for path, total in sums.items() if best - total < 1e-9]
    margins += [best - total for total in sums.values() if best - total >= 1e-9]
    best_path = min(equal, key=lambda each: each[-1:])
    last = best_path[-1] if best_path else 0
    return Judged(list(best_path), bonus_of(case, last, longest), min(margins), len(equal) > 1)


def bonus_of(case: Case, last: int, depth: int) -> int:
    logits = case.logits[last]
    if case.acceptance.bonus == "argmax":
        return int(logits.argmax())
    noise, position = torch.empty(1, WORDS), torch.tensor([len(PROMPT) + depth])
    gumbel(noise, torch.tensor([as_int64(case.params.seed or 0)]), position, torch.tensor([0]))
    return int((logits / rounded(case.params.temperature) + noise[0].numpy()).argmax())


def a_case(random: np.random.Generator, *, equal_paths: bool) -> Case:
    size = int(random.choice([0, 3, 12, 40, 63]))
    tree: Tree = []
    for _ in range(size):
        node = (int(random.integers(len(tree) + 1)), int(random.integers(WORDS)))
        if random.random() < 0.5:  # deeper
            node = (len(tree), node[1])
        if node not in tree:
            tree.append(node)
    if equal_paths:  # few different values, and few different rows, so that many paths are as likely as each other
        logits = random.integers(0, 2, (1 + len(tree), WORDS)).astype(float)
        logits[1:] = np.sort(logits[1:], axis=1)
    else:
        logits = random.normal(0, random.choice([0.5, 1.5, 4.0]), (1 + len(tree), WORDS))
    temperature = float(random.choice([0.3, 0.7, 1.0, 1.6]))
    wish = Acceptance(
        "typical",
        epsilon=float(random.choice([0.05, 0.09, 0.3, 1.0])),
        delta=float(random.choice([0.1, 0.3, 0.8])),
        bonus=str(random.choice(["keyed", "argmax"])),
    )
    return Case(tree, logits, SamplingParams(temperature=temperature, seed=int(random.integers(2**62))), wish)


def judge(batch: list[Case], dtype: torch.dtype = torch.float64, rule: Rule = typical) -> Verdict:
    trees, nodes = pack([case.tree for case in batch])
    x = torch.from_numpy(np.concatenate([case.logits for case in batch])).to(dtype)
    deepest = int(nodes.depth.max())
    sampling = sampling_of([case.sequence() for case in batch], depth=deepest, vocab=WORDS)
    return rule(trees, nodes, x, sampling, deepest)


@pytest.mark.parametrize(
    ("dtype", "equal_paths", "near"),
    [(torch.float64, False, 1e-12), (torch.float64, True, 1e-12), (torch.float32, False, 1e-5)],
)
def test_typical_is_medusas_rule(dtype: torch.dtype, equal_paths: bool, near: float) -> None:
    random = np.random.default_rng(7)
    compared = ties = accepted = 0
    for _ in range(200):
        batch = [a_case(random, equal_paths=equal_paths) for _ in range(5)]
        verdict = judge(batch, dtype)
        for row, case in enumerate(batch):
            expected = by_definition(case)
            if expected.margin < near:
                continue  # rounding decides
            count = len(expected.path)
            tokens = [case.tree[column - 1][1] for column in expected.path] + [expected.bonus]
            assert verdict.path[row, :count].tolist() == expected.path
            assert verdict.path[row, count:].tolist() == [-1] * (verdict.path.shape[1] - count)
            assert int(verdict.accepted[row]) == count
            assert verdict.tokens[row].tolist() == tokens + [-1] * (verdict.path.shape[1] - count)
            assert int(verdict.bonus[row]) == expected.bonus
            compared, ties, accepted = compared + 1, ties + expected.tied, accepted + count
    assert compared > 990
    assert accepted > 1000
    assert ties > 50 if equal_paths else ties == 0


@pytest.mark.parametrize("ops", TREE_OPS)
def test_each_row_of_a_batch_is_judged_by_its_own_rule(ops: str) -> None:
    random = np.random.default_rng(11)
    rule = rule_by_request(load_tree_ops(CPU, ops))
    seen: set[tuple[int, bool]] = set()
    for _ in range(40):
        batch = [a_case(random, equal_paths=False) for _ in range(4)]
        batch[0] = replace(batch[0], acceptance=Acceptance())
        batch[1] = replace(batch[1], params=replace(batch[1].params, temperature=0.0))  # judged by the exact rule
        together = judge(batch, rule=rule)
        for row, case in enumerate(batch):
            alone = judge([case], rule=rule)
            wide = alone.path.shape[1]
            assert torch.equal(together.tokens[row, : wide + 1], alone.tokens[0])
            assert torch.equal(together.path[row, :wide], alone.path[0])
            assert (together.path[row, wide:] == -1).all()
            seen.add((row, int(alone.accepted[0]) > 0))
            if row == 1:
                exact = judge([replace(case, acceptance=Acceptance())], rule=rule)
                assert torch.equal(alone.tokens, exact.tokens)
    assert len(seen) == 8


@pytest.mark.parametrize("params", [SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(min_p=0.6)])
def test_tokens_that_the_filters_drop_are_not_accepted(params: SamplingParams) -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1] + [1e-9] * 4]))
    for token, kept in enumerate([True, True, False, False]):
        case = Case([(0, token)], np.repeat(logits, 2, axis=0), params, Acceptance("typical", delta=0.1))
        assert int(judge([case]).accepted[0]) == kept
        strict = replace(case, acceptance=Acceptance("typical", 1.0, 1.0))
        assert int(judge([strict]).accepted[0]) == (token < 2)  # exp(-H) = 0.28
        unfiltered = replace(case, params=SamplingParams())
        assert int(judge([unfiltered]).accepted[0]) == 1


# requests ------------------------------------------------------------------------------------------------------------

TYPICAL = Acceptance("typical", epsilon=0.05, delta=0.3)


@cache
def engine() -> Engine:
    return make_engine(tiny_decoder(torch.float64), {"garbage": Everything}, max_nodes=60, plan=ALL_NODES)


class Everything(GarbageDrafter):
    """All tokens, so that one is always likely enough, and after some of them the same token again."""

    def nodes(self, sequence: Sequence, limit: object) -> list[tuple[int, int, float]]:
        return [(0, token, 0.9) for token in range(VOCAB)] + [(1 + c, c, 0.9) for c in range(12)]


def ask(acceptance: Acceptance | None, **params: object) -> GenerateRequest:
    given = {"max_tokens": 24, "temperature": 1.0, "seed": 5, "ignore_eos": True, **params}
    return GenerateRequest("r", (3, 1, 4), SamplingParams(**given), SpeculationParams(acceptance=acceptance))  # type: ignore[arg-type]


def test_typical_accepts_more_and_says_so() -> None:
    exact, lossy = (run(engine(), [ask(each)])["r", 0] for each in (None, TYPICAL))
    assert exact.last.speculation is not None
    assert lossy.last.speculation is not None
    assert (exact.last.speculation.acceptance, lossy.last.speculation.acceptance) == ("exact", "typical")
    assert lossy.tokens != exact.tokens
    assert lossy.last.speculation.steps < exact.last.speculation.steps


def test_nothing_is_lossy_at_temperature_0_or_without_drafts() -> None:
    for change in ({"temperature": 0.0}, {}):
        plain, lossy = ask(None, **change), ask(TYPICAL, **change)
        if not change:
            lossy = replace(lossy, speculation=replace(lossy.speculation, enabled=False))
        outcomes = [run(engine(), [request])["r", 0] for request in (plain, lossy)]
        assert outcomes[0].tokens == outcomes[1].tokens
        assert outcomes[1].last.speculation is not None
        assert outcomes[1].last.speculation.acceptance == "exact"


def test_the_servers_rule_holds_where_a_request_names_none() -> None:
    server = make_engine(
        tiny_decoder(torch.float64),
        {"garbage": Everything},
        max_nodes=60,
        plan=ALL_NODES,
        acceptance="typical:epsilon=0.05,delta=0.3",
    )
    assert run(server, [ask(None)])["r", 0].tokens == run(engine(), [ask(TYPICAL)])["r", 0].tokens
    assert run(server, [ask(Acceptance())])["r", 0].tokens == run(engine(), [ask(None)])["r", 0].tokens


def test_lossy_text_scores_as_the_prompt_that_it_could_have_been() -> None:
    """K/V, positions and logprobs along accepted paths: the text, given as a prompt, has the same logprobs."""
    request = ask(TYPICAL, logprobs=0, max_tokens=40)
    outcome = run(engine(), [request])["r", 0]
    assert outcome.last.speculation is not None
    assert outcome.last.speculation.accepted > 10
    whole = GenerateRequest(
        "p", (*request.prompt_ids, *outcome.tokens), SamplingParams(max_tokens=1, prompt_logprobs=0)
    )
    scored = run(engine(), [whole])["p", 0].events[0].prompt_logprobs
    assert scored is not None
    expected = [entry.logprob for entry in scored[len(request.prompt_ids) :] if entry]
    np.testing.assert_allclose([entry.logprob for entry in outcome.logprobs], expected, rtol=0, atol=1e-9)


def test_lossy_text_ends_within_an_accepted_path() -> None:
    outcome = run(engine(), [ask(TYPICAL, max_tokens=40)])["r", 0]
    step = next(event for event in outcome.events if len(event.token_ids) > 1)
    stop = step.token_ids[0]
    upto = outcome.tokens.index(stop)
    ended = run(engine(), [ask(TYPICAL, max_tokens=40, stop_token_ids=(stop,))])["r", 0]
    assert ended.tokens == outcome.tokens[: upto + 1]
    assert ended.last.finish_reason == "stop"


def test_bans_hold_along_accepted_paths() -> None:
    outcome = run(engine(), [ask(TYPICAL, max_tokens=40)])["r", 0]
    common = max(set(outcome.tokens), key=outcome.tokens.count)
    banned = run(engine(), [ask(TYPICAL, max_tokens=40, logit_bias={common: -100.0})])["r", 0]
    assert common not in banned.tokens
    kept = run(engine(), [ask(TYPICAL, ignore_eos=False, min_tokens=24)])["r", 0]
    assert EOS not in kept.tokens
    assert len(kept.tokens) == 24


def test_penalties_count_what_stands_above_on_the_path() -> None:
    """A token that is likely until it has been used is accepted once, though the draft repeats it."""
    penalties = {"frequency_penalty": 2.0, "repetition_penalty": 100.0}
    params = {"max_tokens": 20, "temperature": 0.3, "logit_bias": {7: 20.0}, **penalties}
    outcome = run(engine(), [ask(TYPICAL, **params)])["r", 0]
    assert outcome.last.speculation is not None
    assert outcome.last.speculation.accepted > 0
    assert outcome.tokens.count(7) == 1
