"""One step of the engine, in order. Everything else is detail of one of these verbs.

A row is a context whose K/V is cached plus query tokens: a causal chain and, where the chain reaches the last known
token, a token tree that hangs on it. A chunk of a prompt is a chain; plain decoding is a chain of one; verification is
a tree. All mix in one ragged batch and one forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from decoding.batcher import Chain, build
from decoding.cache import SequenceCache
from decoding.commit import Committer
from decoding.drafters.team import DrafterTeam
from decoding.messages import TokenEvent
from decoding.plan import Plan, Quota
from decoding.planner import Planner, StepTimes
from decoding.sampler import Sampler
from decoding.sampling import Sampling
from decoding.scheduler import Scheduler
from decoding.step_counts import Laps
from decoding.verify import Rule, masks_ahead, verify
from models.target import CausalModel
from models.transfer import upload
from models.tree_ops import ChosenTrees

Arrivals = Callable[[], None]
"""Submits the requests that have come by now."""


class Stepper:
    """Holds the collaborators of a step; has no state of its own but a clock."""

    def __init__(
        self,
        target: CausalModel,
        cache: SequenceCache,
        scheduler: Scheduler,
        planner: Planner,
        sampler: Sampler,
        drafters: DrafterTeam,
        rule: Rule,
        committer: Committer,
    ) -> None:
        self.target = target
        self.cache = cache
        self.scheduler = scheduler
        self.planner = planner
        self.sampler = sampler
        self.drafters = drafters
        self.rule = rule
        self.committer = committer
        self.laps = Laps()

    @torch.inference_mode()
    def step(self, arrivals: Arrivals | None = None) -> list[TokenEvent]:
        """Advance every planned row: at least one token for each row that decides, a chunk of prompt for the others.

        Args:
            arrivals: called when models have drafted: who came meanwhile need not wait for the next step.
        """
        reading = self._read_prompts()
        lap, started = self.laps.end, self.laps.start()
        plan = self.scheduler.plan()  # which rows, how many chain tokens
        if not plan.rows:
            return []
        lap("schedule")
        drafted = dict(self.drafters.taken)
        limits = self.planner.limits(plan)  # how much each row may speculate at most
        lap("planner")
        sampling = self.sampler.prepare(plan, limits)  # parameters, penalties' counts, the rows' own noise
        lap("prepare")
        guesses = self.drafters.guess(plan, limits, sampling)  # trees of the drafters that run no model
        lap("drafters")
        quota = self.planner.quota(plan, limits, guesses)  # what models shall draft; 0 nodes is plain decoding
        lap("planner")
        proposals = guesses + self.drafters.propose(plan, quota, sampling)  # a tree per drafter, with confidences
        lap("drafters")
        chosen = self.planner.choose(plan, proposals, quota, self.target.device)  # merged, the best nodes
        lap("planner")
        if arrivals is not None and len(proposals) > len(guesses):
            plan, chosen, sampling = self._join(arrivals, plan, chosen, quota, sampling)
            lap("schedule")
        chains = [Chain(r.sequence.tokens[r.start : r.end], r.start, r.sequence.pages) for r in plan.rows]
        batch, nodes = build(chains, chosen.trees, chosen.masks, chosen.counts)
        masks = masks_ahead(chosen.trees, nodes, sampling, chosen.deepest)  # what grammars allow, if there are any
        lap("prepare")

        out = self.target.forward(batch, self.cache.kv, self.drafters.taps(plan))
        logits = self.target.logits(batch.at_wanted(out.hidden))  # at the tree's nodes
        lap("forward")

        draws = self.drafters.want_draws
        verdict = verify(self.rule, chosen.trees, nodes, logits, sampling, chosen.deepest, masks, draws=draws)
        self.cache.commit(batch, nodes, verdict)  # keep the accepted path's K/V
        lap("verify")
        results = self.committer.send(plan, chosen, nodes, verdict, logits)  # to the host, before others keep it busy
        lap("commit")
        out = self.drafters.with_top(out, logits, limits, sampling)  # likeliest tokens, for who learns from them
        self.drafters.observe(plan, batch, nodes, out, verdict)
        lap("drafters")
        events = self.committer.commit(plan, chosen, results, out)  # append, stop, finish, free
        lap("commit")
        taken = time.perf_counter() - started
        by_drafter = {name: seconds - drafted[name] for name, seconds in self.drafters.taken.items()}
        times = StepTimes(taken, by_drafter, reading)
        self.planner.learn(plan, chosen, sum(len(event.token_ids) for event in events), times)
        lap("planner")
        self.committer.totals.counts.step(plan.chain_tokens, sum(chosen.counts) - len(chosen.counts), self.planner.gear)
        return events

    def _read_prompts(self) -> float:
        """Drafters read the prompts of the last step, whose tokens are out by now; the seconds that it takes."""
        started = self.laps.start()
        for sequence in self.drafters.read_prompts():
            self.cache.register(sequence)
        self.laps.end("drafters")
        return time.perf_counter() - started

    def _join(
        self, arrivals: Arrivals, plan: Plan, chosen: ChosenTrees, quota: Quota, sampling: Sampling
    ) -> tuple[Plan, ChosenTrees, Sampling]:
        """The step with those who came while it was prepared: rows without drafts, behind the others."""
        arrivals()
        joined = self.scheduler.join(plan, sum(chosen.counts) - len(chosen.counts))
        if joined is plan:
            return plan, chosen, sampling
        last = [int(row.sequence.tokens[-1]) for row in joined.deciding[len(plan.deciding) :]]
        [roots] = upload(self.target.device, np.array(last, dtype=np.int64))
        return joined, chosen.with_roots(roots), self.sampler.prepare(joined, quota)

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(self.laps.seconds.values())

    def reset_clocks(self) -> None:
        """Begin to count time anew."""
        self.laps = Laps()
        self.drafters.taken = dict.fromkeys(self.drafters.taken, 0.0)
