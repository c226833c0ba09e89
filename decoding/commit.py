"""The end of a step: the verdict reaches the host, tokens are appended, sequences end, events go out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from decoding.batcher import Nodes
from decoding.cache import SequenceCache
from decoding.drafters.team import DrafterTeam
from decoding.grammar.compiler import Compiled
from decoding.logprobs import by_row, node_logprobs, prompt_logprobs, wishes_of
from decoding.messages import FinishReason, StepTrace, TokenEvent, TokenLogprobs
from decoding.plan import Plan, PlannedRow
from decoding.planner import Planner
from decoding.sampler import Sampler
from decoding.sampling_ops import NOT_A_TOKEN
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence, SpeculationCounter
from decoding.step_counts import StepCounts
from decoding.trace import UNTRACED, TracedTrees, is_traced, wanted_of
from decoding.verify import Verdict
from models.target import CausalModel, ForwardOutput
from models.transfer import fetch, upload
from models.tree import GUESSED, PINS
from models.tree_ops import ChosenTrees

logger = logging.getLogger("saccade.engine")

TOO_COMPLEX = "At this point of the text its grammar became too complex to follow; simplify the grammar."
BROKEN = "The model broke down on this text: its logits are no numbers. The log of the server says more."
WORTH_IT = 64  # tokens that a new matcher must have brought a sequence further before it gets another one


@dataclass
class Totals:
    """Counters over the life of an engine."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_prompt_tokens: int = 0
    requests_finished: int = 0
    speculation: SpeculationCounter = field(default_factory=SpeculationCounter)
    counts: StepCounts = field(default_factory=StepCounts)


class Results(NamedTuple):  # as is the next one: made in every step, in a third of the time that a frozen class takes
    """A step's results on their way to the host."""

    wishes: dict[int, int]  # deciding rows that asked for logprobs
    with_nodes: bool  # there are drafted nodes: paths and sources are fetched
    traced: bool  # the trees are fetched, too
    fetched: Callable[[], list[np.ndarray]]  # waits for all of it

    def read(self) -> HostResults:
        """Wait for them."""
        tokens, *rest = self.fetched()
        path: list[list[int]] = [[]] * len(tokens)
        source = [[0]] * len(tokens)
        if self.with_nodes:
            path, source, rest = rest[0].tolist(), rest[1].tolist(), rest[2:]
        trees = UNTRACED
        if self.traced:
            trees, rest = TracedTrees(*rest[:3]), rest[3:]
        logprobs = by_row(self.wishes, rest) if self.wishes else {}
        return HostResults(tokens.tolist(), path, source, trees, logprobs)


class HostResults(NamedTuple):
    """A step's results, by deciding row."""

    tokens: list[list[int]]  # accepted tokens and the bonus, padded with -1
    path: list[list[int]]  # columns of the accepted nodes, padded with -1
    source: list[list[int]]  # of the tree's nodes
    trees: TracedTrees
    logprobs: dict[int, list[TokenLogprobs]]  # of rows that asked


class Committer:
    """Turns verdicts into events. The only place where sequences grow and end.

    Args:
        vocab_size: ids of the tokenizer; the logits of ids beyond do not count.
    """

    def __init__(
        self,
        target: CausalModel,
        cache: SequenceCache,
        scheduler: Scheduler,
        sampler: Sampler,
        drafters: DrafterTeam,
        planner: Planner,
        vocab_size: int,
        eos_ids: tuple[int, ...],
    ) -> None:
        self._target = target
        self._cache = cache
        self._scheduler = scheduler
        self._sampler = sampler
        self._drafters = drafters
        self._planner = planner
        self._names = drafters.names
        self.sources = drafters.sources  # names by the bits of a node's source
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self.totals = Totals()
        self.set_back: list[tuple[Sequence, Compiled]] = []  # sequences that need a new matcher, and what is used up

    def send(self, plan: Plan, chosen: ChosenTrees, nodes: Nodes, verdict: Verdict, logits: Tensor) -> Results:
        """Send what ``commit`` needs to the host. It is on its way while the device goes on with other things."""
        wishes = wishes_of(plan)
        asked = node_logprobs(wishes, nodes, verdict, logits, self._vocab_size).tensors if wishes else ()
        trees = (verdict.path, chosen.trees.source) if chosen.trees.width > 1 else ()
        traced = wanted_of(plan, chosen.trees)
        return Results(wishes, bool(trees), bool(traced), fetch(verdict.tokens, *trees, *traced, *asked))

    def commit(self, plan: Plan, chosen: ChosenTrees, results: Results, out: ForwardOutput) -> list[TokenEvent]:
        """Apply a step's verdict: here the tokens reach the host."""
        self.totals.steps += 1
        self._prompt_logprobs(plan, chosen, out)
        found = results.read()
        events = []
        for index, row in enumerate(plan.deciding):
            drawn = found.tokens[index]
            while drawn[-1] == -1:  # padding
                drawn.pop()
            if drawn[-1] == NOT_A_TOKEN and chosen.counts[index] > 1:
                self._run_plainly(row.sequence)
            elif (event := self._take(row, index, drawn, found)) is not None:
                events.append(event)
        for row in plan.rows[len(plan.deciding) :]:
            row.sequence.cached = row.end
            self._cache.register(row.sequence)
        return events

    def _take(self, row: PlannedRow, index: int, drawn: list[int], found: HostResults) -> TokenEvent | None:
        """Give a row its tokens; None: there are none, and it goes on."""
        sequence, count = row.sequence, len(drawn) - 1
        kept, reason = self._append(sequence, drawn)
        sequence.cached = min(row.end + count, sequence.length)  # the text may end within the accepted path
        taken = found.path[index][: min(count, kept)]
        self._account(sequence, found.source[index], taken, kept)
        trace: tuple[StepTrace, ...] = ()
        if is_traced(sequence):
            trace = (self._trace(row, index, found, taken, drawn[count] if kept > count else None),)
        failed = self._failure(sequence, drawn[kept:]) if reason == "error" else (None, None)
        event = None
        if kept or reason is not None:
            event = self._event(sequence, drawn[:kept], reason, found.logprobs.get(index), trace, *failed)
        self._settle(sequence, reason, row.end)
        if reason is None and not sequence.is_ready:
            self._set_back(sequence)
        return event

    def end(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, code: str | None = None
    ) -> TokenEvent:
        """End a sequence from outside a step: cancelled, or failed, by its own fault if there is a code for it."""
        event = self._event(sequence, [], reason, None, error=error, code=code)
        self._settle(sequence, reason)
        return event

    def _append(self, sequence: Sequence, tokens: list[int]) -> tuple[int, FinishReason | None]:
        """Append until the sequence ends; (tokens appended, why it ended)."""
        params, ending = sequence.params, None
        ignored = params.ignore_eos
        broken = tokens[-1] == NOT_A_TOKEN
        if broken:
            tokens = tokens[:-1]
        if sequence.matcher is not None:  # the grammar knows where the text ends, and where it cannot go on
            own, ending = sequence.matcher.commit(tokens)
            broken = broken and own == len(tokens)
            tokens, ignored = tokens[:own], True
            if ending == "error" and sequence.length + own >= sequence.set_back_at + WORTH_IT:
                self.set_back.append((sequence, sequence.matcher.compiled))
                ending = sequence.matcher = None
        for kept, token in enumerate(tokens, start=1):
            sequence.append(token)
            if (token in self._eos_ids and not ignored) or token in params.stop_token_ids:
                return kept, "stop"
            if sequence.length == sequence.limit and (kept < len(tokens) or ending != "stop"):
                return kept, "length"
        return len(tokens), ending or ("error" if broken else None)

    def _failure(self, sequence: Sequence, left: list[int]) -> tuple[str | None, str | None]:
        """Why a text cannot go on with what is left of the drawn tokens: a message, and a code if its client can help.

        What the pages of a broken text hold is found by nobody.
        """
        if left != [NOT_A_TOKEN]:
            return TOO_COMPLEX, "grammar_too_complex"
        logger.error(
            "request %s: the logits of the model are no numbers after a text of %d tokens; its weights are broken, or "
            "it computes values that %s cannot hold (--dtype names another)",
            *(sequence.id[0], sequence.length, str(self._target.dtype).removeprefix("torch.")),
        )
        self._cache.disown(sequence)
        return BROKEN, None

    def _set_back(self, sequence: Sequence) -> None:
        """The sequence waits for a new matcher and goes on from where it is; it cannot help what others used up."""
        sequence.set_back_at = sequence.length
        self._sampler.forget(sequence.id)  # which knows the old one
        self._scheduler.set_back(sequence)

    def _run_plainly(self, sequence: Sequence) -> None:
        """Forget a step in which the model broke down, and go on without drafts: the text itself may be sound.

        A drafted node that is no number can spoil its row's other nodes: sums over keys have it, times 0.
        """
        sequence.speculation = replace(sequence.speculation, enabled=False)
        if not sequence.started:
            sequence.prompt_logprobs = None
        self._cache.disown(sequence)
        self._sampler.forget(sequence.id)  # which knows how it was judged
        self._scheduler.set_back(sequence)

    def _is_end(self, sequence: Sequence, token: int) -> bool:
        """Whether the token stands for an end: a grammar may end a text of a model that has no such token."""
        return token in self._eos_ids or token in sequence.params.stop_token_ids

    def _account(self, sequence: Sequence, source: list[int], path: list[int], kept: int) -> None:
        """Count a row's step: the sources of its tree's columns, the columns of those that were accepted."""
        counters = sequence.counter, self.totals.speculation
        for counter in counters:
            counter.steps += 1
        self.totals.generated_tokens += kept
        self.totals.counts.row_tokens[kept] += 1
        if not any(source):  # roots have no source
            return
        self.totals.counts.paths[len(path)] += 1
        taken = [source[column] for column in path]
        # few drafters, so few different sources; the root has none, nor has padding
        for bits in set(source) - {0}:
            drafted, accepted = source.count(bits), taken.count(bits)
            guessed, pinned = bits & GUESSED, bits >> PINS
            if not guessed:
                drafted = accepted  # what is only pinned was not drafted, unless it proved right
            names = [
                (name, drafted if guessed >> bit & 1 else accepted)
                for bit, name in enumerate(self.sources)
                if (guessed | pinned) >> bit & 1
            ]
            for counter in counters:
                counter.drafted += drafted
                counter.accepted += accepted
                for name, own in names:
                    counter.drafted_by[name] += own
                    counter.accepted_by[name] += accepted
        for depth, bits in enumerate(taken):
            self.totals.counts.accept(depth, (bits & GUESSED) | bits >> PINS)

    def _trace(self, row: PlannedRow, index: int, found: HostResults, taken: list[int], bonus: int | None) -> StepTrace:
        root = row.end - 1
        step = found.trees.step(
            index, root, int(row.sequence.tokens[root]), found.source[index], self.sources, taken, bonus
        )
        row.sequence.traced.steps += 1
        row.sequence.traced.nodes += len(step.tokens)
        return step

    def _event(
        self,
        sequence: Sequence,
        new: list[int],
        reason: FinishReason | None,
        logprobs: list[TokenLogprobs] | None,
        trace: tuple[StepTrace, ...] = (),
        error: str | None = None,
        code: str | None = None,
    ) -> TokenEvent:
        first = not sequence.started
        sequence.started = True
        return TokenEvent(
            request_id=sequence.id[0],
            choice=sequence.choice,
            token_ids=tuple(new),
            logprobs=tuple(logprobs[: len(new)]) if logprobs is not None else None,
            finish_reason=reason,
            stop_token=new[-1] if reason == "stop" and self._is_end(sequence, new[-1]) else None,
            error=error,
            error_code=code,
            seed=sequence.seed if first else None,
            cached_tokens=sequence.cached_prompt_tokens if first else 0,
            queued_seconds=sequence.queued_seconds if first else 0.0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
            speculation=sequence.counter.stats(self._names, sequence.acceptance.rule) if reason else None,
            trace=trace,
        )

    def _settle(self, sequence: Sequence, reason: FinishReason | None, before: int | None = None) -> None:
        """Pages after a step: full ones are offered to others, spare ones returned; all of them at the end.

        Args:
            before: tokens of the text before the step.
        """
        if sequence in self._scheduler.running:
            self._cache.register(sequence, None if reason is None else before)
            self._cache.trim(sequence)
        if reason is not None:
            self.totals.requests_finished += 1
            self._scheduler.remove(sequence)
            self._drafters.forget(sequence.id)
            self._planner.forget(sequence)
            self._sampler.forget(sequence.id)

    def _prompt_logprobs(self, plan: Plan, chosen: ChosenTrees, out: ForwardOutput) -> None:
        if all(row.sequence.params.prompt_logprobs is None for row in plan.rows):
            return
        first = 0
        for index, row in enumerate(plan.rows):
            if row.sequence.wants_prompt_logprobs():
                self._extend_prompt_logprobs(row, out.hidden[first : first + row.length])
            first += row.length + (chosen.counts[index] - 1 if index < len(plan.deciding) else 0)

    def _extend_prompt_logprobs(self, row: PlannedRow, hidden: Tensor) -> None:
        sequence = row.sequence
        known: list[TokenLogprobs | None] = [None] if sequence.prompt_logprobs is None else sequence.prompt_logprobs
        # the logits at chain token i tell the logprob of token i + 1
        after = range(max(row.start + 1, len(known)), min(row.end + 1, sequence.prompt_len))
        if after:
            [targets] = upload(hidden.device, sequence.tokens[after.start : after.stop])
            rows = hidden[after.start - 1 - row.start : after.stop - 1 - row.start]
            top = sequence.params.prompt_logprobs or 0
            known.extend(prompt_logprobs(self._target, rows, targets, top, self._vocab_size))
        sequence.prompt_logprobs = known
