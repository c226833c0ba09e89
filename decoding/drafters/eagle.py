"""EAGLE-1 (2401.15077) and EAGLE-2 (2406.16858): the same weights, drafting the tree of the latter."""

from __future__ import annotations

from dataclasses import dataclass

from decoding.drafters.base import DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.errors import ModelError
from models.heads.eagle import load_eagle
from models.loader import CheckpointError, resolve


@dataclass(frozen=True)
class EagleOptions(TreeOptions):
    """Nothing of its own."""


def load_eagle_drafter(options: EagleOptions, context: DrafterContext) -> FeatureDrafter:
    """Load the checkpoint and check that it fits the target.

    Raises:
        ModelError: none there, a broken one, that of another target or of another kind of drafter.
        ConfigError: an option out of range.
    """
    options.check(context.name)
    try:
        model = load_eagle(resolve(options.path), context.target, attention=context.attention, packing=context.packing)
    except CheckpointError as error:
        raise ModelError(f"eagle: {error}") from error
    return FeatureDrafter(options, context, model)
