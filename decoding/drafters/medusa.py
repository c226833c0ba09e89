"""Medusa (2401.10774): heads on the target's last hidden state guess each of the next tokens by itself.

They cost no pass of a model and keep no K/V. All that they read is what the target made of the token before the root,
which the last step's verification left behind. Guesses are coupled to the target's draw by the noise of their depth.
A depth's candidates are the same under every parent, so the tree is a product: see product_tree.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.drafters.base import DrafterContext, Needs
from decoding.drafters.features import FeatureStore
from decoding.drafters.product_tree import Candidates, FixedTrees, ProbableTrees, TreeShape
from decoding.drafters.rows import may_draft, spread
from decoding.drafters.static_tree import CHOICES_FILE, MAX_RANKS, read_choices
from decoding.errors import ConfigError, ModelError
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import RaggedBatch
from models.heads.feature_model import FeatureSource
from models.heads.medusa import MedusaConfig, MedusaHeads, load_medusa, open_medusa
from models.loader import CheckpointError, resolve
from models.target import ForwardOutput
from models.tree import Trees

PROBABILITY, CALIBRATED = "probability", "calibrated"


@dataclass(frozen=True)
class MedusaOptions:
    path: str = ""  # default: within the target's own checkpoint (Medusa-2)
    tree: str = PROBABILITY  # the most probable nodes; "calibrated": medusa_choices.json beside the heads; or a file
    top_k: int = 10  # candidates of a head, for the tree by probability
    tau: float = 1.0  # confidence = softmax(z / tau)


def load_medusa_drafter(options: MedusaOptions, context: DrafterContext) -> MedusaDrafter:
    """Load the heads and the tree, and check that they fit the target.

    Raises:
        ModelError: no heads, broken ones, or heads of another target.
        ConfigError: an option out of range, a tree file that cannot be used.
    """
    if not 1 <= options.top_k <= MAX_RANKS:
        raise ConfigError(f"medusa: top_k must be in 1 .. {MAX_RANKS}, not {options.top_k}")
    if not options.tau > 0:
        raise ConfigError("medusa: tau must be positive")
    try:
        folder = resolve(options.path) if options.path else context.target_folder
        if folder is None:
            raise ConfigError("medusa: the target has no folder to look for heads in; give theirs: medusa=PATH")
        file = open_medusa(folder)
        check_fit(file.config, context, folder)
        heads = load_medusa(file, context.target.logits, context.device, context.dtype)
    except CheckpointError as error:
        raise ModelError(f"medusa: {error}") from error
    vocab_size, num_heads = min(context.tokenizer.vocab_size, context.target.vocab_size), heads.config.num_heads
    if options.tree == PROBABILITY:
        shape: TreeShape = ProbableTrees(num_heads, min(options.top_k, vocab_size), context.device)
    else:
        path = folder / CHOICES_FILE if options.tree == CALIBRATED else Path(options.tree).expanduser()
        shape = FixedTrees(read_choices(path, num_heads, vocab_size), context.device)
    return MedusaDrafter(options, context, heads, shape)


def check_fit(heads: MedusaConfig, context: DrafterContext, path: Path) -> None:
    """Whether heads were made for this target.

    Raises:
        ModelError: for another hidden size or vocabulary.
    """
    target = context.target
    if heads.hidden_size != target.hidden_size:
        raise ModelError(
            f"medusa: the heads in {path} read hidden states of size {heads.hidden_size}, and the target's are "
            f"{target.hidden_size} wide. Use heads that were trained for this target"
        )
    needed = min(context.tokenizer.vocab_size, target.vocab_size)
    if heads.vocab_size is not None and not needed <= heads.vocab_size <= target.vocab_size:
        raise ModelError(
            f"medusa: the heads in {path} guess among {heads.vocab_size} tokens, and the target has "
            f"{target.vocab_size}. Use heads that were trained for this target"
        )


class MedusaDrafter:
    """The heads of one target, for all rows."""

    def __init__(self, options: MedusaOptions, context: DrafterContext, heads: MedusaHeads, shape: TreeShape) -> None:
        self.name = context.name
        self._target = context.target
        kept = context.target.hidden_size * context.target.dtype.itemsize
        self.needs = Needs(page_bytes=kept, fixed_tree=options.tree != PROBABILITY)
        self._device = context.device
        self._source = 1 << context.bit
        self._tau = options.tau
        self._heads = heads
        self._shape = shape
        self._features = FeatureStore(FeatureSource(), 1, lambda sequence: may_draft(context.name, sequence))

    def attach(self, num_pages: int) -> None:
        self._features.attach(num_pages, self._target)

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        self._features.admit(sequence)

    def forget(self, sequence: SequenceId) -> None:
        self._features.forget(sequence)

    def valid_length(self, sequence: Sequence) -> int:
        return 0

    def scratch_slots(self, depth: int) -> int:
        return 0

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        self._features.observe(plan, batch, nodes, out, verdict)

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        features: list[Tensor] = []
        drafting: list[int] = []
        for index, (row, limit) in enumerate(zip(plan.deciding, quota.rows, strict=True)):
            feature = self._features.last(row.sequence) if limit.nodes and self.name in limit.drafters else None
            if feature is not None:
                features.append(feature)
                drafting.append(index)
        if not drafting:
            return None
        last = [int(plan.deciding[index].sequence.tokens[-1]) for index in drafting]
        roots, row = torch.tensor([last, drafting], device=self._device)
        limits = [quota.rows[index] for index in drafting]
        depth = min(self._shape.depth, max(limit.depth for limit in limits))
        candidates = self._guess(torch.stack(features), roots, row, depth, sampling)
        trees = self._shape.grow(candidates, max(limit.nodes for limit in limits), self._source)
        return spread(trees, row, plan)

    def _guess(self, hidden: Tensor, roots: Tensor, row: Tensor, depth: int, sampling: Sampling) -> Candidates:
        """The candidates of the first ``depth`` heads, from the hidden states [S, H] before the roots.

        What stands between the root and a guess is not known, so penalties count the tokens up to the root.
        """
        logits = self._heads.logits(hidden, depth).flatten(0, 1)  # [S * D, V]
        node_row = row.repeat_interleave(depth)
        above = torch.arange(depth, device=row.device).repeat(len(row))  # the depth of the node that draws the token
        unknown = above.new_full((len(above), 1), -1) if sampling.needs_paths() else None
        x = sampling.process(logits, node_row, above, unknown)
        tokens, confidence = sampling.guess(x, node_row, above, self._shape.ranks, self._tau)
        size = (len(row), depth, tokens.shape[1])
        return Candidates(roots, tokens.view(size), confidence.view(size))
