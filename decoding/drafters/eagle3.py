"""EAGLE-3 (2503.01840): a drafter on three of the target's hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from decoding.drafters.base import DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.errors import ModelError
from models.heads.eagle3_files import load_eagle3
from models.loader import CheckpointError, resolve


@dataclass(frozen=True)
class Eagle3Options(TreeOptions):
    tap_shift: int = 0  # added to the checkpoint's taps, for trainers that count layers otherwise


def load_eagle3_drafter(options: Eagle3Options, context: DrafterContext) -> FeatureDrafter:
    """Load the checkpoint and check that it fits the target.

    Raises:
        ModelError: none there, a broken one, that of another target or of another kind of drafter.
        ConfigError: an option out of range.
    """
    options.check(context.name)
    try:
        model = load_eagle3(
            resolve(options.path),
            context.target,
            attention=context.attention,
            tap_shift=options.tap_shift,
            packing=context.packing,
        )
    except CheckpointError as error:
        raise ModelError(f"eagle3: {error}") from error
    return FeatureDrafter(options, context, model)
