"""A small model of the same vocabulary drafts a tree (2211.17192; the tree by path probability: 2406.16858).

Each ``propose`` begins with one ragged catch-up pass over the tokens committed since the last one; nothing that was
written while drafting is ever kept, so there is no special case for what was accepted or proposed by another drafter.
Then one pass per depth over the ``beam`` most probable nodes of each row, written to scratch slots behind the chain.
Guesses are coupled to the target's draw: the ``top_k`` largest entries of x + T * g, with the request's own noise g.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decoding.batcher import Chain, Nodes, build
from decoding.cache import scratch_slots
from decoding.drafters.base import DrafterContext, Needs
from decoding.errors import ConfigError, ModelError
from decoding.plan import Plan, PlannedRow, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.text import Tokenizer
from decoding.verify import Verdict
from models.batch import MAX_TREE, PAGE_SIZE, RaggedBatch
from models.kv_cache import KVCache
from models.loader import CheckpointError, load_model, resolve
from models.target import CausalModel, ForwardOutput
from models.tree import NO_PARENT, Trees, roots_only


@dataclass(frozen=True)
class DraftModelOptions:
    path: str
    depth: int = 4  # passes of the draft model a step, the catch-up pass included
    top_k: int = 4  # children of an expanded node
    beam: int = 2  # nodes expanded per depth
    tau: float = 1.0  # confidence = softmax(z / tau)
    min_confidence: float = 0.3  # drafting ends where no path is more probable


def load_draft_model(options: DraftModelOptions, context: DrafterContext) -> DraftModelDrafter:
    """Load the checkpoint and check that its vocabulary is the target's.

    Raises:
        ModelError: unknown or broken checkpoint, another vocabulary.
        ConfigError: an option out of range.
    """
    if min(options.depth, options.top_k, options.beam) < 1 or options.beam * (options.depth - 1) >= MAX_TREE:
        raise ConfigError("draft: depth, top_k and beam must be at least 1, and beam * (depth - 1) under 64")
    if not options.tau > 0:
        raise ConfigError("draft: tau must be positive")
    try:
        folder = resolve(options.path)
        model = load_model(
            folder,
            dtype=str(context.dtype).removeprefix("torch."),
            device=context.device,
            attention=context.attention,
            max_model_len=None,
        )
    except CheckpointError as error:
        raise ModelError(f"draft model: {error}") from error
    check_vocabulary(Tokenizer.load(folder), context.tokenizer, options.path)
    needed = min(context.tokenizer.vocab_size, context.target.vocab_size)
    if model.vocab_size < needed:
        raise ModelError(
            f"the draft model {options.path} has embeddings of {model.vocab_size} tokens, and the target's text may "
            f"have token ids up to {needed - 1}. Use a draft model with the target's vocabulary."
        )
    return DraftModelDrafter(options, context, model)


def check_vocabulary(draft: Tokenizer, target: Tokenizer, path: str | Path) -> None:
    """Every token of the target must have the same id in the draft; ids beyond the tokens (padding) do not matter.

    Raises:
        ModelError: naming a token that differs.
    """
    ours, theirs = target.vocab(), draft.vocab()
    wrong = [token for token, number in ours.items() if theirs.get(token) != number]
    if wrong:
        token = wrong[0]
        raise ModelError(
            f"the draft model {path} has another vocabulary than the target: {len(wrong)} of {len(ours)} tokens "
            f"differ, for example {token!r} (id {ours[token]} in the target, {theirs.get(token, 'absent')} in the "
            "draft). Use a draft model with the target's tokenizer."
        )


@dataclass(frozen=True)
class Beam:
    """The B nodes of each drafting row that are expanded next."""

    columns: Tensor  # [S, B] int64, their columns in the tree of candidates
    tokens: Tensor  # [S, B] int64
    masks: Tensor  # [S, B] int64, ancestors-or-self among the scratch nodes
    chance: Tensor  # [S, B] float32, path probability
    paths: Tensor | None  # [S, B, d] int64, tokens from depth 1 on; None unless penalties ask for them


class DraftModelDrafter:
    """One draft model for all rows. Its K/V lies on the sequences' pages, in tensors of its own."""

    def __init__(self, options: DraftModelOptions, context: DrafterContext, model: CausalModel) -> None:
        self.name = context.name
        self.needs = Needs(kv=model.kv_spec)
        self._options = options
        self._model = model
        self._source = 1 << context.bit
        self._max_step_tokens = context.max_step_tokens
        self._last_position = model.max_model_len - 1
        self._drafted: dict[SequenceId, int] = {}  # tokens whose K/V is committed in this drafter's cache
        self._cache: KVCache

    def attach(self, num_pages: int) -> None:
        self._cache = KVCache(self._model.kv_spec, num_pages, self._model.dtype, self._model.device)

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        self._drafted[sequence.id] = cached_tokens

    def forget(self, sequence: SequenceId) -> None:
        self._drafted.pop(sequence, None)

    def valid_length(self, sequence: Sequence) -> int:
        return self._drafted.get(sequence.id, 0)

    def scratch_slots(self, depth: int) -> int:
        return self._options.beam * (min(depth, self._options.depth) - 1)

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """What was accepted reaches this drafter as tokens, in the next catch-up pass."""

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        active = [i for i, row in enumerate(quota.rows) if row.nodes and self.name in row.drafters]
        chains, drafting = self._catch_up(plan, active)
        if not chains:
            return None
        last = [int(plan.deciding[i].sequence.tokens[-1]) for i in drafting]
        roots = torch.tensor(last, dtype=torch.int64, device=self._model.device)
        trees = roots_only(roots)
        batch, _ = build(chains, trees, torch.ones_like(trees.parents), [1] * len(drafting))
        hidden = self._model.forward(batch, self._cache).hidden
        if not drafting:
            return None
        row = torch.tensor(drafting, device=self._model.device)
        depth = min(self._options.depth, max(quota.rows[i].depth for i in drafting))
        drafted = self._expand(trees, batch, hidden[batch.wanted], row, depth, sampling)
        return drafted if len(drafting) == len(plan.deciding) else _spread(drafted, row, plan)

    def _catch_up(self, plan: Plan, active: list[int]) -> tuple[list[Chain], list[int]]:
        """Chains that bring the drafter up to date, those of rows that can draft first; and which rows these are."""
        budget = self._max_step_tokens
        ready: list[Chain] = []
        behind: list[Chain] = []
        drafting: list[int] = []
        rows: list[tuple[int, PlannedRow]] = [(i, plan.deciding[i]) for i in active]
        rows += [(-1, row) for row in plan.rows if not row.decides and self._serves(row.sequence)]
        for index, row in rows:
            start = self._drafted[row.sequence.id]
            end = min(row.end, start + budget, self._last_position + 1)  # a shorter context than the target's: no more
            if end <= start:
                continue
            budget -= end - start
            self._drafted[row.sequence.id] = end
            chain = Chain(row.sequence.tokens[start:end], start, row.sequence.pages)
            if index >= 0 and end == row.end:
                ready.append(chain)
                drafting.append(index)
            else:
                behind.append(chain)
        return ready + behind, drafting

    def _serves(self, sequence: Sequence) -> bool:
        wish = sequence.speculation
        allowed = wish.enabled and wish.max_nodes != 0 and wish.max_depth != 0
        return allowed and (wish.drafters is None or self.name in wish.drafters)

    def _expand(
        self, roots: Trees, batch: RaggedBatch, hidden: Tensor, row: Tensor, depth: int, sampling: Sampling
    ) -> Trees:
        """Grow the tree of candidates from the roots' hidden states [S, H]."""
        rows, device = len(row), row.device
        zeros = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        paths = zeros.new_zeros(rows, 1, 0) if sampling.needs_paths() else None
        beam = Beam(zeros, roots.tokens, zeros + 1, roots.confidence, paths)
        columns = [(roots.tokens, roots.parents, roots.confidence)]
        width, scratch = 1, 0
        for level in range(depth):
            tokens, confidence = self._guess(hidden, row, level, beam, sampling)  # [S, B, K]
            parents = beam.columns[:, :, None].expand_as(tokens)
            columns.append((tokens.flatten(1), parents.flatten(1), confidence.flatten(1)))
            chance = (beam.chance[:, :, None] * confidence).flatten(1)
            if level + 1 == depth or (device.type == "cpu" and float(chance.max()) < self._options.min_confidence):
                break
            beam = self._choose(beam, tokens.flatten(1), chance, width, scratch)
            hidden = self._forward(batch, rows, beam, level + 1, scratch)
            width += chance.shape[1]
            scratch += beam.tokens.shape[1]
        all_tokens, all_parents, all_confidence = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
        source = torch.where(all_parents == NO_PARENT, 0, self._source)
        return Trees(all_tokens, all_parents, all_confidence, source)

    def _choose(self, beam: Beam, tokens: Tensor, chance: Tensor, first: int, scratch: int) -> Beam:
        """The most probable of the candidates [S, B * K] that the last level added from column ``first`` on."""
        size = min(self._options.beam, tokens.shape[1])
        best = chance.topk(size, dim=1)
        pick, parent = best.indices, best.indices // (tokens.shape[1] // beam.tokens.shape[1])
        picked = tokens.gather(1, pick)
        # the root is scratch node 0 and lies in the chain; node i lies i - 1 slots behind it
        bits = torch.ones_like(pick) << (1 + scratch + torch.arange(size, device=pick.device))
        paths = None
        if beam.paths is not None:
            before = beam.paths.gather(1, parent[:, :, None].expand(-1, -1, beam.paths.shape[2]))
            paths = torch.cat([before, picked[:, :, None]], dim=2)
        return Beam(first + pick, picked, beam.masks.gather(1, parent) | bits, best.values, paths)

    def _forward(self, batch: RaggedBatch, rows: int, beam: Beam, level: int, scratch: int) -> Tensor:
        """Hidden states [S * B, H] of the beam's nodes, whose K/V goes to scratch slots behind the chains."""
        size, device = beam.tokens.shape[1], beam.tokens.device
        base = batch.tree_base[:rows].long()
        logical = base[:, None] + 1 + scratch + torch.arange(size, device=device)
        table = batch.page_table[:rows]
        step = RaggedBatch(
            token_ids=beam.tokens.flatten(),
            positions=(base + level).clamp(max=self._last_position).repeat_interleave(size),
            slots=scratch_slots(table, logical).flatten(),
            visible=(batch.tree_base[:rows] + 1).repeat_interleave(size),
            tree_mask=beam.masks.flatten(),
            row_of=torch.arange(rows, dtype=torch.int32, device=device).repeat_interleave(size),
            row_starts=torch.arange(0, rows * size + 1, size, dtype=torch.int32, device=device),
            tree_base=batch.tree_base[:rows],
            page_table=table,
            wanted=torch.arange(rows * size, device=device),
            max_query=size,
            max_keys=min(batch.max_keys + scratch + size, table.shape[1] * PAGE_SIZE),
        )
        return self._model.forward(step, self._cache).hidden

    def _guess(self, hidden: Tensor, row: Tensor, level: int, beam: Beam, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """(tokens, confidence) [S, B, K]: the drafter's most probable next tokens after each node of the beam."""
        size = beam.tokens.shape[1]
        node_row = row.repeat_interleave(size)
        depth = torch.full_like(node_row, level)
        logits = self._model.logits(hidden)
        paths = beam.paths.flatten(0, 1) if beam.paths is not None else None
        x = sampling.process(logits, node_row, depth, paths)
        tokens, confidence = sampling.guess(x, node_row, depth, self._options.top_k, self._options.tau)
        return tokens.view(-1, size, tokens.shape[1]), confidence.view(-1, size, tokens.shape[1])


def _spread(drafted: Trees, row: Tensor, plan: Plan) -> Trees:
    """The drafting rows' trees among all deciding rows."""
    roots = torch.tensor([int(r.sequence.tokens[-1]) for r in plan.deciding], device=row.device)
    size = (len(plan.deciding), drafted.width)
    tokens = drafted.tokens.new_full(size, -1)
    tokens[:, 0] = roots
    tokens[row] = drafted.tokens
    parents = drafted.parents.new_full(size, NO_PARENT)
    parents[row] = drafted.parents
    confidence = drafted.confidence.new_zeros(size)
    confidence[:, 0] = 1.0
    confidence[row] = drafted.confidence
    source = drafted.source.new_zeros(size)
    source[row] = drafted.source
    return Trees(tokens, parents, confidence, source)
