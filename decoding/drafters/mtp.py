"""Multi-token prediction that a target was trained with, or modules trained for it later, as a drafter.

Sequential modules (DeepSeek-V3, MiMo; models/heads/mtp.py) or parallel heads (Meta; models/heads/parallel_heads.py):
the folder tells. Without a path they are those in the target's own checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding.drafters.base import DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.drafters.product_tree import ProbableTrees, guess_depths
from decoding.errors import ConfigError, ModelError, nearest
from decoding.plan import UNGUIDED, Guide
from decoding.sampling import Sampling
from models.attention import load_backend
from models.batch import MAX_TREE, RaggedBatch
from models.heads.mtp_files import NORMS, load_mtp
from models.heads.parallel_heads import ParallelHeads, load_parallel_heads
from models.layers.ops import load_ops
from models.loader import CheckpointError, resolve
from models.meta_checkpoint import is_meta
from models.tree import Trees


@dataclass(frozen=True)
class MTPOptions(TreeOptions):
    path: str = ""  # default: the target's own checkpoint
    norm: str = ""  # hidden states after ("post") or before ("pre", "post-pre", "pre-post") norms; default: as trained


def load_mtp_drafter(options: MTPOptions, context: DrafterContext) -> FeatureDrafter:
    """Load the modules or heads and check that they fit the target.

    Raises:
        ModelError: none there, broken ones, those of another target or of an architecture that is not served.
        ConfigError: an option out of range.
    """
    options.check(context.name)
    if options.norm and options.norm not in NORMS:
        raise ConfigError(f"mtp: unknown norm {options.norm!r}: {nearest(options.norm, NORMS)}")
    try:
        folder = resolve(options.path) if options.path else context.target_folder
        if folder is None:
            raise ConfigError("mtp: the target has no folder to look for modules in; give theirs: mtp=PATH")
        ops = load_ops(context.device, context.dtype)
        attention = load_backend(context.attention, context.device, context.dtype)
        if is_meta(folder):
            heads = load_parallel_heads(folder, context.target, ops, attention, context.packing)
            return parallel_drafter(options, context, heads)
        modules = load_mtp(folder, context.target, ops, attention, options.norm, context.packing)
        return FeatureDrafter(options, context, modules)
    except CheckpointError as error:
        raise ModelError(f"mtp: {error}") from error


def parallel_drafter(options: MTPOptions, context: DrafterContext, heads: ParallelHeads) -> FeatureDrafter:
    """A drafter of parallel heads: no deeper than there are heads, and no pass over drafted nodes."""
    limited = replace(options, depth=min(options.depth, heads.num_heads), beam=1)
    return FeatureDrafter(limited, context, heads, ParallelGrowth(limited, context, heads))


class ParallelGrowth:
    """The most probable trees of heads that have guessed all depths at the root."""

    def __init__(self, options: MTPOptions, context: DrafterContext, heads: ParallelHeads) -> None:
        self._heads = heads
        self._tau = options.tau
        self._source = 1 << context.bit
        ranks = min(options.top_k, context.tokenizer.vocab_size, context.target.vocab_size)
        self._shape = ProbableTrees(options.depth, ranks, context.device)

    def grow(
        self,
        roots: Trees,
        batch: RaggedBatch,
        hidden: Tensor,
        carry: Tensor | None,
        row: Tensor,
        depth: int,
        sampling: Sampling,
        guide: Guide = UNGUIDED,
    ) -> Trees:
        """See ``Growth.grow``."""
        assert carry is not None  # the outputs of all heads
        states = torch.stack([self._heads.of_depth(carry, 1 + level) for level in range(depth)], dim=1)  # [S, D, H]
        logits = self._heads.logits(states.flatten(0, 1)).view(len(states), depth, -1)
        candidates = guess_depths(logits, roots.tokens[:, 0], row, self._shape.ranks, self._tau, sampling, guide)
        return self._shape.grow(candidates, MAX_TREE - 1, self._source)
