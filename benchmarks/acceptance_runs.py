"""The measurements of an acceptance report: texts made with one set of drafters or another, and texts replayed."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from benchmarks.rates import Counts, Estimate, tokens_per_step
from benchmarks.replay import LISTED, Dictation, OracleTeam, ReplayTeam
from benchmarks.texts import Prompt, Script
from decoding.acceptance import Acceptance
from decoding.assemble import LoadedModel, build_drafters, build_stepper
from decoding.cache import pages_for
from decoding.config import EngineConfig
from decoding.drafters.base import Drafter
from decoding.engine import Engine
from decoding.messages import TokenEvent
from decoding.plan_choice import FixedPlan
from decoding.planner import StaticPlanner
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.step import Stepper
from models.batch import MAX_TREE
from models.tree_ops import load_tree_ops

RANKS = (1, 2, 4, LISTED)  # k of the top-k accuracies
REPLAY = "replay"  # the kind of text that is real


@dataclass(frozen=True)
class Variant:
    """How tokens are drawn and drafts judged."""

    temperature: float
    coupled: bool = True  # drafters guess with the request's noise; nothing else to do at temperature 0
    rule: Literal["exact", "typical"] = "exact"
    pruned: bool = False  # nodes that are less probable than the engine's default are left out

    @property
    def label(self) -> str:
        """As in tables: T=1, T=1 uncoupled, T=1 typical, T=1 pruned."""
        word = self.rule if self.rule != "exact" else "pruned" if self.pruned else "" if self.coupled else "uncoupled"
        return f"T={self.temperature:g} {word}".strip()


@dataclass(frozen=True)
class Measured:
    """Acceptance of one set of drafters on one kind of text."""

    drafters: str  # "draft+ngram"
    text: str  # the variant's label, or REPLAY
    variant: Variant
    counts: tuple[Counts, ...]  # of each text
    nodes: float  # drafted nodes per step
    tokens: tuple[tuple[int, ...], ...] = ()  # what was made, of each prompt; () for replays

    def digests(self) -> list[str]:
        """Of each text made."""
        return [hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16] for ids in self.tokens]


@dataclass(frozen=True)
class Oracle:
    """How good one drafter's guesses are at each depth, given that the path so far was right."""

    drafter: str
    text: str
    positions: int
    top: dict[int, list[float]]  # k -> [D] share of positions whose right token is among the k best guesses
    reached: Estimate | None  # tokens per step of the drafter's own trees at the same positions
    tree: float  # tokens per step of the best static tree of the report's size, chosen with hindsight
    full: float  # tokens per step of a tree without end in which every node has LISTED children


class Bench:
    """A target and its drafters; what judges and hears them is exchanged from one run to the next.

    Args:
        config: with the drafters; limits of a step and the pool are set here so that no tree is ever cut for them.
        longest: tokens of the longest text, prompt included.
        rows: texts at once.

    Raises:
        ConfigError: drafters that cannot be loaded, limits out of range.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel, longest: int, rows: int) -> None:
        self.config = replace(
            config,
            plan="fixed:min_probability=0",
            prefix_caching=False,
            max_num_seqs=rows,
            max_num_batched_tokens=rows * (longest + config.max_nodes + 1),
            num_pages=2 * rows * pages_for(longest + MAX_TREE),
        )
        self.loaded = loaded
        self._drafters = build_drafters(self.config, self.loaded)
        self._stepper = build_stepper(self.config, self.loaded, self._drafters)
        self._ops = load_tree_ops(self.loaded.target.device)

    def generate(self, prompts: Sequence[Prompt], drafters: Sequence[str], variant: Variant) -> Measured:
        """Continue every prompt, speculating.

        The prompt's own step and steps that the end of the text cut short do not count.
        """
        engine = self._engine(variant)
        for number, prompt in enumerate(prompts):
            params = SamplingParams(
                max_tokens=prompt.tokens, temperature=variant.temperature, seed=prompt.seed, ignore_eos=True
            )
            engine.submit(GenerateRequest(str(number), prompt.ids, params, speculation(drafters, variant)))
        events = run(engine)
        depth = self.config.max_depth
        counts, drafted, steps = [], 0, 0
        for number, prompt in enumerate(prompts):
            counts.append(Counts.of(accepted_in(events[str(number)], prompt.tokens, depth), depth))
            stats = events[str(number)][-1].speculation
            assert stats is not None  # the last event has them
            drafted, steps = drafted + stats.drafted, steps + stats.steps
        made = tuple(tuple(t for e in events[str(n)] for t in e.token_ids) for n in range(len(prompts)))
        return Measured("+".join(drafters), variant.label, variant, tuple(counts), drafted / steps, made)

    def replay(self, scripts: Sequence[Script], drafters: Sequence[str], variant: Variant) -> Measured:
        """Score the drafters at every position of known texts."""
        team = ReplayTeam(self._members(drafters), self._texts(scripts), self.config.max_depth, self._stepper.planner)
        self._dictate(team, scripts, drafters, variant)
        counts = tuple(Counts.of(team.accepted[str(n)], team.depth) for n in range(len(scripts)))
        nodes = team.drafted / max(1, sum(c.steps for c in counts))
        return Measured("+".join(drafters), REPLAY, variant, counts, nodes)

    def oracle(self, scripts: Sequence[Script], drafter: str, variant: Variant, text: str) -> Oracle | None:
        """How good the drafter's guesses are at every position of known texts; None if it has no ranked guesses.

        Args:
            scripts: texts drawn at the variant's temperature with the scripts' seeds, or any for temperature 0.
            text: what they are called.
        """
        team = OracleTeam(self._members([drafter]), self._texts(scripts), self.config.max_depth)
        self._dictate(team, scripts, [drafter], variant)
        if not team.ranks:
            return None
        reached = tokens_per_step(self.replay(scripts, [drafter], variant).counts)
        return summarise_ranks(team.ranks, drafter, text, self.config.max_nodes, reached)

    def _dictate(self, team: Dictation, scripts: Sequence[Script], drafters: Sequence[str], variant: Variant) -> None:
        step = self._stepper
        parts = (step.target, step.cache, step.scheduler, step.planner, step.sampler)
        engine = Engine(self.config, self.loaded, Stepper(*parts, team, team.dictate, step.committer))
        for number, script in enumerate(scripts):
            params = SamplingParams(
                max_tokens=len(script.ids) - script.given,
                temperature=variant.temperature,
                seed=script.seed,
                ignore_eos=True,
            )
            given = script.ids[: script.given]
            engine.submit(GenerateRequest(str(number), given, params, speculation(drafters, variant)))
        events = run(engine)
        for number, script in enumerate(scripts):
            made = [token for event in events[str(number)] for token in event.token_ids]
            if made != list(script.ids[script.given :]):
                raise RuntimeError(f"the replay of {script.name} made another text than was dictated")

    def _engine(self, variant: Variant) -> Engine:
        step = self._stepper
        if not variant.pruned:
            return Engine(self.config, self.loaded, step)
        planner = StaticPlanner(
            step.cache,
            self._drafters,
            self._ops,
            max_nodes=self.config.max_nodes,
            max_depth=self.config.max_depth,
            max_step_tokens=self.config.max_num_batched_tokens,
            min_probability=FixedPlan.min_probability,
        )
        parts = (step.target, step.cache, step.scheduler, planner, step.sampler, step.drafters, step.rule)
        return Engine(self.config, self.loaded, Stepper(*parts, step.committer))

    def _members(self, names: Sequence[str]) -> list[Drafter]:
        return [drafter for drafter in self._drafters if drafter.name in names]

    def _texts(self, scripts: Sequence[Script]) -> dict[str, torch.Tensor]:
        device = self.loaded.target.device
        return {str(number): torch.tensor(script.ids, device=device) for number, script in enumerate(scripts)}


def speculation(drafters: Sequence[str], variant: Variant) -> SpeculationParams:
    """What a request asks for, to be measured as this variant."""
    acceptance = Acceptance(rule=variant.rule)
    return SpeculationParams(drafters=tuple(drafters), acceptance=acceptance, coupling=variant.coupled)


def run(engine: Engine) -> dict[str, list[TokenEvent]]:
    """Step to the end: the events that have tokens, or end a request, by request id."""
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def accepted_in(events: Sequence[TokenEvent], tokens: int, depth: int) -> list[int]:
    """Drafted tokens accepted in each step that counts: not the prompt's own, and none that the end cut short.

    Args:
        tokens: of the whole text.
        depth: of the trees that are allowed; a step that accepts so many makes one token more.
    """
    accepted, made = [], 0
    for number, event in enumerate(events):
        if number > 0 and tokens - made > depth:
            accepted.append(len(event.token_ids) - 1)
        made += len(event.token_ids)
    return accepted


def scripts_of(prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> list[Script]:
    """The texts that were made, to be replayed with the noise that they were drawn with."""
    return [
        Script(prompt.name, (*prompt.ids, *made), len(prompt.ids), prompt.seed)
        for prompt, made in zip(prompts, tokens, strict=True)
    ]


def summarise_ranks(
    ranks: Sequence[tuple[int, ...]], drafter: str, text: str, max_nodes: int, reached: Estimate | None = None
) -> Oracle:
    """Accuracies by depth, and what trees could make of these guesses at most.

    A node of a static tree is a path of ranks; it is accepted where the right tokens have these ranks. A path is never
    more frequent than its beginning, so the most frequent paths are a tree, and no tree of that size is better on
    these texts.
    """
    depth = max(len(each) for each in ranks)
    top = {k: [float(np.mean([each[d] < k for each in ranks if len(each) > d])) for d in range(depth)] for k in RANKS}
    paths: Counter[tuple[int, ...]] = Counter()
    for each in ranks:
        for d, rank in enumerate(each, start=1):
            if rank == LISTED:
                break
            paths[each[:d]] += 1
    best = sum(count for _, count in paths.most_common(max_nodes))
    return Oracle(drafter, text, len(ranks), top, reached, 1 + best / len(ranks), 1 + paths.total() / len(ranks))
