"""Medusa (2401.10774): heads on the target's last hidden state guess each of the next tokens by itself.

They cost no pass of a model and keep no K/V. All that they read is what the target made of the token before the root,
which the last step's verification left behind. Guesses are coupled to the target's draw by the noise of their depth.
A depth's candidates are the same under every parent, so the tree is a product: see product_tree.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.drafters.base import DrafterContext, Needs
from decoding.drafters.features import FeatureStore
from decoding.drafters.product_tree import FixedTrees, ProbableTrees, TreeShape, guess_depths
from decoding.drafters.rows import may_draft, spread
from decoding.drafters.static_tree import CHOICES_FILE, MAX_RANKS, read_choices
from decoding.errors import ConfigError, ModelError
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.verify import Verdict
from models.batch import RaggedBatch
from models.heads.feature_model import FeatureSource
from models.heads.medusa import MedusaHeads, load_medusa, open_medusa
from models.kv_cache import KVCache
from models.layers.linear import Packing
from models.loader import CheckpointError, resolve
from models.target import CausalModel, ForwardOutput
from models.transfer import upload
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
    folder = heads_folder(options.path, context.target_folder)
    vocab_size = min(context.tokenizer.vocab_size, context.target.vocab_size)
    heads = load_heads(folder, context.target, vocab_size, context.packing)
    num_heads = heads.config.num_heads
    if options.tree == PROBABILITY:
        shape: TreeShape = ProbableTrees(num_heads, min(options.top_k, vocab_size), context.device)
    else:
        path = folder / CHOICES_FILE if options.tree == CALIBRATED else Path(options.tree).expanduser()
        shape = FixedTrees(read_choices(path, num_heads, vocab_size), context.device)
    return MedusaDrafter(options, context, heads, shape)


def heads_folder(path: str, target_folder: Path | None) -> Path:
    """Where the heads are: ``path``, a folder or hub id, or where the target is.

    Raises:
        ModelError: there is no such folder.
        ConfigError: no path, and a target that was not loaded from a folder.
    """
    if not path and target_folder is None:
        raise ConfigError("medusa: the target has no folder to look for heads in; give theirs: medusa=PATH")
    try:
        return resolve(path) if path or target_folder is None else target_folder
    except CheckpointError as error:
        raise ModelError(f"medusa: {error}") from error


def load_heads(folder: Path, target: CausalModel, vocab_size: int, packing: Packing | None = None) -> MedusaHeads:
    """Load heads and check that they were made for this target, whose text has ids below ``vocab_size``.

    Args:
        packing: see ``Linear.pack``.

    Raises:
        ModelError: no heads, broken ones, or another hidden size or vocabulary.
    """
    try:
        file = open_medusa(folder)
        width, rows = file.config.hidden_size, file.config.vocab_size
        wrong = ""
        if width != target.hidden_size:
            wrong = f"read hidden states of size {width}, and the target's are {target.hidden_size} wide"
        elif rows is not None and not vocab_size <= rows <= target.vocab_size:
            wrong = f"guess among {rows} tokens, and the target has {target.vocab_size}"
        if wrong:
            raise ModelError(f"medusa: the heads in {folder} {wrong}. Use heads that were trained for this target")
        return load_medusa(file, target.logits, target.device, target.dtype, packing)
    except CheckpointError as error:
        raise ModelError(f"medusa: {error}") from error


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
        self.max_depth = shape.depth
        self._features = FeatureStore(FeatureSource(), 1, lambda sequence: may_draft(context.name, sequence), self.name)

    def attach(self, num_pages: int, target_kv: KVCache) -> None:
        self._features.attach(num_pages, self._target)

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        self._features.admit(sequence)

    def forget(self, sequence: SequenceId) -> None:
        self._features.forget(sequence)

    def close(self) -> None:
        """Nothing to keep."""

    def valid_length(self, sequence: Sequence) -> int:
        return 0

    def ready(self, sequence: Sequence) -> bool:
        return self._features.last(sequence) is not None

    def backlog(self, sequence: Sequence) -> int:
        return 0

    def scratch_slots(self, depth: int) -> int:
        return 0

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        self._features.observe(plan, batch, nodes, out, verdict)

    def read_prompts(self) -> list[Sequence]:
        return []  # heads have nothing to run before they draft

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
        roots, row = upload(self._device, np.array([last, drafting]))[0]
        limits = [quota.rows[index] for index in drafting]
        guide = quota.guide(self.name)
        depth = min(self._shape.depth, max(limit.depth for limit in limits), guide.depth or self._shape.depth)
        logits = self._heads.logits(torch.stack(features), depth)
        candidates = guess_depths(logits, roots, row, self._shape.ranks, self._tau, sampling, guide)
        trees = self._shape.grow(candidates, max(limit.nodes for limit in limits), self._source)
        return spread(trees, row, plan)
