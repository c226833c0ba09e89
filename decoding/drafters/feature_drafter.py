"""A small model that continues from the target's own hidden states drafts a tree: EAGLE (2401.15077, 2503.01840), MTP.

Its entry t pairs the target's feature of token t - 1 with token t, and its K/V lies at slot t (see
models/heads/feature_model.py), so a page of it depends on no token after its end and is shared like the target's.
Chunks of prompts are caught up with when the target has run them and its tokens are out; the tokens of later steps at
the start of ``propose``, m + 1 of them at the price of one pass. Then the tree grows, see expansion.py.

A row may have a *gap*: pages found in the prefix cache without this drafter's K/V, or features that were dropped since
the row did not draft for long. The model then sees the text with the gap cut out, from page to page: in its page table
as in its positions. Pages behind a gap are never offered to others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.batcher import Chain, Nodes, build
from decoding.cache import pages_for
from decoding.drafters.base import DrafterContext, Needs
from decoding.drafters.expansion import Expansion, Growth, TreeOptions
from decoding.drafters.features import FeatureStore
from decoding.drafters.rows import may_draft, spread
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import PAGE_SIZE, RaggedBatch
from models.graphed_model import GraphedFeatureModel
from models.heads.feature_model import Drafted, FeatureModel
from models.kv_cache import KVCache
from models.target import ForwardOutput
from models.transfer import upload
from models.tree import Trees, root_masks, roots_only

PENDING = 128  # tokens that a row may commit without drafting before it loses what came before; they cost memory


@dataclass
class Progress:
    """How far a sequence's entries reach."""

    end: int  # entries of tokens before this one are written, but for those in the gap
    kept: int = 0  # pages before the gap that the model sees; the gap reaches from there ...
    base: int = 0  # ... to this page; 0: no gap
    whole: int = 0  # if there is one: up to where the entries from the text's beginning reach
    carry: Tensor | None = None  # [C] of entry end - 1, for models that continue from it


@dataclass(frozen=True)
class Run:
    """Entries start .. end - 1 of a sequence, to be written in one pass."""

    sequence: Sequence
    start: int
    end: int
    kept: int
    base: int

    def chain(self) -> Chain:
        """What the model sees: the text without the pages from ``kept`` to ``base``."""
        pages, tokens = self.sequence.pages, self.sequence.tokens[self.start : self.end]
        gone = (self.base - self.kept) * PAGE_SIZE
        return Chain(tokens, self.start - gone, [*pages[: self.kept], *pages[self.base :]] if gone else pages)


class FeatureDrafter:
    """One feature model for all rows. Its K/V lies on the sequences' pages, in tensors of its own.

    Args:
        growth: how its trees grow; default: by the model's passes over their nodes.
    """

    def __init__(
        self, options: TreeOptions, context: DrafterContext, model: FeatureModel, growth: Growth | None = None
    ) -> None:
        self.name = context.name
        width = model.feature_size + (model.carry_size if model.continues else 0)
        self.needs = Needs(kv=model.kv_spec, taps=model.source.taps, page_bytes=width * model.dtype.itemsize)
        self.max_depth = options.depth
        self._options = options
        self._model = model if context.capture is None else GraphedFeatureModel(model, context.capture)
        self._target = context.target
        self._max_step_tokens = context.max_step_tokens
        self._growth = growth or Expansion(
            options, 1 << context.bit, model.max_positions - 1, self._extend, model.logits, model.token_ids
        )
        self._features = FeatureStore(model.source, PENDING, self._may_draft, self.name)
        self._progress: dict[SequenceId, Progress] = {}
        self._unread: dict[SequenceId, tuple[Sequence, int]] = {}  # prompts, and up to where the last step ran them
        self._cache: KVCache
        self._page_carry: Tensor  # [num_pages, C] of each full page's last entry; no columns if nothing is continued

    def attach(self, num_pages: int, target_kv: KVCache) -> None:
        model = self._model
        self._cache = KVCache(model.kv_spec, num_pages, model.dtype, model.device)
        self._features.attach(num_pages, self._target)
        size = (num_pages, model.carry_size if model.continues else 0)
        self._page_carry = torch.empty(size, dtype=model.dtype, device=model.device)  # read only where it was written

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        progress = self._progress[sequence.id] = Progress(cached_tokens)
        if cached_tokens and self._model.continues:
            progress.carry = self._page_carry[sequence.pages[cached_tokens // PAGE_SIZE - 1]]
        self._features.admit(sequence)

    def forget(self, sequence: SequenceId) -> None:
        self._progress.pop(sequence, None)
        self._unread.pop(sequence, None)
        self._features.forget(sequence)

    def close(self) -> None:
        """Nothing to keep."""

    def valid_length(self, sequence: Sequence) -> int:
        progress = self._progress.get(sequence.id, Progress(0))
        return progress.whole if progress.base else progress.end

    def ready(self, sequence: Sequence) -> bool:
        return self._features.first(sequence.id) is not None and sequence.cached == sequence.length - 1

    def backlog(self, sequence: Sequence) -> int:
        first = self._features.first(sequence.id)  # nothing before it will ever be run
        return 0 if first is None else sequence.length - max(first, self._progress[sequence.id].end)

    def scratch_slots(self, depth: int) -> int:
        return self._options.scratch_slots(depth)

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """Keep the step's features."""
        self._features.observe(plan, batch, nodes, out, verdict)
        rows = [row for row in plan.rows if (row.length > 1 or not row.decides) and self._may_draft(row.sequence)]
        self._unread.update({row.sequence.id: (row.sequence, row.end) for row in rows})
        if any(row.sequence.limit == row.end + 1 for row in rows):  # its only token ends it: there is no later for it
            self.read_prompts()

    def read_prompts(self) -> list[Sequence]:
        """Catch up with the chunks of prompts of the last step, so that their pages can be shared at once."""
        if not self._unread:
            return []
        unread, self._unread = self._unread, {}
        runs = self._runs(list(unread.values()))
        if runs:
            self._catch_up(runs, 0)
        return [run.sequence for run in runs]

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        asked = {
            row.sequence.id: number
            for number, (row, limit) in enumerate(zip(plan.deciding, quota.rows, strict=True))
            # the end of a prompt that is run now has no features yet, and so no root to draft from
            if limit.nodes and self.name in limit.drafters and row.length == 1
        }
        runs = self._runs([(plan.deciding[number].sequence, plan.deciding[number].end) for number in asked.values()])
        if not runs:
            return None
        runs.sort(key=lambda run: run.end < run.sequence.length)  # those that reach their root come first
        drafting = [asked[run.sequence.id] for run in runs if run.end == run.sequence.length]
        batch, trees, drafted = self._catch_up(runs, len(drafting))
        if not drafting:
            return None
        [row] = upload(self._model.device, np.array(drafting))
        guide = quota.guide(self.name)
        limits = [self._options.depth, max(quota.rows[number].depth for number in drafting)]
        depth = min(limits if guide.depth is None else [*limits, guide.depth])
        hidden = batch.at_wanted(drafted.hidden)
        carry = hidden if drafted.carry is drafted.hidden else batch.at_wanted(drafted.carry)
        return spread(self._growth.grow(trees, batch, hidden, carry, row, depth, sampling, guide), row, plan)

    def _may_draft(self, sequence: Sequence) -> bool:
        return may_draft(self.name, sequence)

    def _runs(self, rows: list[tuple[Sequence, int]]) -> list[Run]:
        """What brings these sequences nearest to the given ends, within the tokens of one pass."""
        budget, runs = self._max_step_tokens, []
        for sequence, end in rows:
            progress, known = self._progress[sequence.id], self._features.first(sequence.id)
            if known is None:
                continue
            start, kept, base = max(progress.end, 1), progress.kept, progress.base
            if start - 1 < known:  # a gap: go on at the first page all of whose entries can be written
                kept = kept if base else progress.end // PAGE_SIZE
                first = 0 if kept else 1  # the model's slot 0 has no entry
                base = pages_for(known + 1 - first)
                start = base * PAGE_SIZE + first
            end = min(end, start + budget, self._model.max_positions + 1)
            if start < end:
                budget -= end - start
                runs.append(Run(sequence, start, end, kept, base))
        return runs

    def _catch_up(self, runs: list[Run], count: int) -> tuple[RaggedBatch, Trees, Drafted]:
        """Write the runs' entries. The first ``count`` of them end in roots, whose results are wanted."""
        device = self._model.device
        last = [int(run.sequence.tokens[-1]) for run in runs[:count]]
        trees = roots_only(upload(device, np.array(last, dtype=np.int64))[0])
        batch, _ = build([run.chain() for run in runs], trees, root_masks(count, device), [1] * count, shift=-1)
        features = [part for run in runs for part in self._features.take(run.sequence.id, run.start - 1, run.end - 1)]
        joined = features[0] if len(features) == 1 else torch.cat(features)
        drafted = self._model.catch_up(batch, joined, self._before(runs), self._cache)
        for run in runs:
            progress = self._progress[run.sequence.id]
            if run.base != progress.base:
                progress.whole = progress.whole if progress.base else progress.end
                progress.kept, progress.base = run.kept, run.base
            progress.end = run.end
            self._features.drop(run.sequence.id, run.end - 1)
        if self._model.continues:
            self._keep_carry(runs, batch, drafted.carry)
        return batch, trees, drafted

    def _before(self, runs: list[Run]) -> Tensor | None:
        """[R, C] the carry of the entry before each run's first; zeros at the beginning and after a gap."""
        if not self._model.continues:
            return None
        zero = self._page_carry.new_zeros(self._model.carry_size)
        known = [self._progress[run.sequence.id] for run in runs]
        same = [p.base == run.base for p, run in zip(known, runs, strict=True)]
        carries = [p.carry if ok and p.carry is not None else zero for p, ok in zip(known, same, strict=True)]
        return torch.stack(carries)

    def _keep_carry(self, runs: list[Run], batch: RaggedBatch, carry: Tensor) -> None:
        """Remember the carry of each run's last entry, and of the last entry of each page."""
        source, target, first = [], [], 0
        ends = carry[batch.row_starts[1:].long() - 1].unbind(0)
        for run, end in zip(runs, ends, strict=True):
            self._progress[run.sequence.id].carry = end
            for last in range(run.start | (PAGE_SIZE - 1), run.end, PAGE_SIZE):
                source.append(first + last - run.start)
                target.append(run.sequence.pages[last // PAGE_SIZE])
            first += run.end - run.start
        if source:
            [where] = upload(carry.device, np.array([source, target]))
            self._page_carry.index_copy_(0, where[1], carry.index_select(0, where[0]))

    def _extend(self, batch: RaggedBatch, carry: Tensor | None, depth: int) -> tuple[Tensor, Tensor]:
        assert carry is not None  # the catch-up pass gave one
        drafted = self._model.extend(batch, carry, depth, self._cache)
        return drafted.hidden, drafted.carry
