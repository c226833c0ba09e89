"""A small model of the same vocabulary drafts a tree (2211.17192; the tree by path probability: 2406.16858).

Each ``propose`` begins with one ragged catch-up pass over the tokens committed since the last one; nothing that was
written while drafting is ever kept, so there is no special case for what was accepted or proposed by another drafter,
nor for a prompt: it is caught up with when the model is first asked to draft behind it, and not while somebody waits
for its first token.
Then the tree grows by one pass per depth, see expansion.py.
Guesses are coupled to the target's draw: the ``top_k`` largest entries of x + T * g, with the request's own noise g.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from decoding.batcher import Chain, Nodes, build
from decoding.drafters.base import DrafterContext, Needs
from decoding.drafters.expansion import Expansion, TreeOptions
from decoding.drafters.rows import spread
from decoding.errors import ModelError
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.text import Tokenizer
from decoding.verify import Verdict
from models.batch import RaggedBatch
from models.graphed_model import GraphedModel
from models.kv_cache import KVCache
from models.loader import CheckpointError, load_model, resolve
from models.target import CausalModel, ForwardOutput
from models.transfer import upload
from models.tree import Trees, root_masks, roots_only


@dataclass(frozen=True)
class DraftModelOptions(TreeOptions):
    """See TreeOptions."""


def load_draft_model(options: DraftModelOptions, context: DrafterContext) -> DraftModelDrafter:
    """Load the checkpoint and check that its vocabulary is the target's.

    Raises:
        ModelError: unknown or broken checkpoint, another vocabulary.
        ConfigError: an option out of range.
    """
    options.check("draft")
    try:
        folder = resolve(options.path)
        load = load_model if context.driver is None else context.driver.load
        model = load(
            folder,
            dtype=str(context.dtype).removeprefix("torch."),
            device=context.device,
            attention=context.attention,
            max_model_len=None,
            quantization=context.quantization,
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


class DraftModelDrafter:
    """One draft model for all rows. Its K/V lies on the sequences' pages, in tensors of its own."""

    def __init__(self, options: DraftModelOptions, context: DrafterContext, model: CausalModel) -> None:
        self.name = context.name
        self.needs = Needs(kv=model.kv_spec)
        self.max_depth = options.depth
        self._options = options
        self._model = model if context.capture is None else GraphedModel(model, context.capture)
        self._max_step_tokens = context.max_step_tokens
        self._last_position = model.max_model_len - 1
        self._expansion = Expansion(options, 1 << context.bit, self._last_position, self._forward, model.logits)
        self._drafted: dict[SequenceId, int] = {}  # tokens whose K/V is committed in this drafter's cache
        self._cache: KVCache

    def attach(self, num_pages: int, target_kv: KVCache) -> None:
        self._cache = self._model.new_cache(num_pages)

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        self._drafted[sequence.id] = cached_tokens

    def forget(self, sequence: SequenceId) -> None:
        self._drafted.pop(sequence, None)

    def close(self) -> None:
        """Nothing to keep."""

    def valid_length(self, sequence: Sequence) -> int:
        return self._drafted.get(sequence.id, 0)

    def ready(self, sequence: Sequence) -> bool:
        return sequence.length <= self._last_position  # a shorter context than the target's: no more

    def backlog(self, sequence: Sequence) -> int:
        return sequence.length - self._drafted.get(sequence.id, 0)

    def scratch_slots(self, depth: int) -> int:
        return self._options.scratch_slots(depth)

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """What was accepted reaches this drafter as tokens, in the next catch-up pass."""

    def read_prompts(self) -> list[Sequence]:
        return []  # prompts, too

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        active = [i for i, row in enumerate(quota.rows) if row.nodes and self.name in row.drafters]
        chains, drafting = self._catch_up(plan, active)
        if not chains:
            return None
        last = [int(plan.deciding[i].sequence.tokens[-1]) for i in drafting]
        [roots] = upload(self._model.device, np.array(last, dtype=np.int64))
        trees = roots_only(roots)
        batch, _ = build(chains, trees, root_masks(len(drafting), roots.device), [1] * len(drafting))
        hidden = self._model.forward(batch, self._cache).hidden
        if not drafting:
            return None
        [row] = upload(self._model.device, np.array(drafting))
        guide = quota.guide(self.name)
        limits = [self._options.depth, max(quota.rows[i].depth for i in drafting)]
        depth = min(limits if guide.depth is None else [*limits, guide.depth])
        drafted = self._expansion.grow(trees, batch, batch.at_wanted(hidden), None, row, depth, sampling, guide)
        return spread(drafted, row, plan)

    def _catch_up(self, plan: Plan, active: list[int]) -> tuple[list[Chain], list[int]]:
        """Chains that bring the drafter up to date with these rows, those first that can draft then; and which do."""
        budget = self._max_step_tokens
        ready: list[Chain] = []
        behind: list[Chain] = []
        drafting: list[int] = []
        for index in active:
            row = plan.deciding[index]
            start = self._drafted[row.sequence.id]
            end = min(row.end, start + budget, self._last_position + 1)  # a shorter context than the target's: no more
            if end <= start:
                continue
            budget -= end - start
            self._drafted[row.sequence.id] = end
            chain = Chain(row.sequence.tokens[start:end], start, row.sequence.pages)
            if end == row.end:
                ready.append(chain)
                drafting.append(index)
            else:
                behind.append(chain)
        return ready + behind, drafting

    def _forward(self, batch: RaggedBatch, carry: Tensor | None, depth: int) -> tuple[Tensor, None]:
        return self._model.forward(batch, self._cache).hidden, None
