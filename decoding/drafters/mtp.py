"""Multi-token prediction that a target was trained with, or modules trained for it later, as a drafter.

Sequential modules (DeepSeek-V3, MiMo; models/heads/mtp.py) or parallel heads (Meta; models/heads/parallel_heads.py):
the folder tells. Without a path they are those in the target's own checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from decoding.drafters.base import DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.errors import ConfigError, ModelError, nearest
from models.attention import load_backend
from models.heads.mtp_files import NORMS, load_mtp
from models.heads.parallel_heads import load_parallel_heads
from models.layers.ops import load_ops
from models.loader import CheckpointError, resolve
from models.meta_checkpoint import is_meta


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
            heads = load_parallel_heads(folder, context.target, ops, attention)
            return FeatureDrafter(replace(options, depth=min(options.depth, heads.num_heads)), context, heads)
        return FeatureDrafter(options, context, load_mtp(folder, context.target, ops, attention, options.norm))
    except CheckpointError as error:
        raise ModelError(f"mtp: {error}") from error
