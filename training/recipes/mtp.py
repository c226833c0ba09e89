"""A module for multi-token prediction beside a finished target, recursed as FastMTP does (arXiv 2509.18362).

The module drafts for itself in training, with the positions and the attention of serving (training/modules/rollout.py),
and learns the target's distributions. Step k has weight beta^k; the paper has beta 0.6 and three steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from models.decoder import Decoder
from models.heads.mtp import MTPConfig
from models.heads.mtp_files import write_mtp
from models.loader import DTYPES
from training.capture import FrozenTarget
from training.errors import TrainError
from training.modules.mtp import MTPModule
from training.modules.start import start_small
from training.recipe import Losses, TrainContext, Windows
from training.recipes.rollout import Rollouts, check_dtype, last_layer, like_target, rope_for

RECYCLED = ("post", "pre")


@dataclass(frozen=True)
class MTPOptions:
    unroll: int = 4  # drafted tokens that training unrolls
    beta: float = 0.7  # weight of a step's loss, relative to the step before it
    keep: float = 0.7  # share of the positions that draft on after each step; 1: all
    mlp: int = 0  # width of the MLP; 0: the target's
    recycle: str = "post"  # the output that a further step takes: after the last norm, or before ("pre")
    dtype: str = "bfloat16"  # of the written weights

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if not 0 < self.beta <= 1 or self.mlp < 0:
            raise TrainError("--beta must be over 0 and at most 1, --mlp not negative")
        if self.recycle not in RECYCLED:
            raise TrainError(f"--recycle must be one of {', '.join(RECYCLED)}, not {self.recycle!r}")
        check_dtype(self.dtype)


class MTPRecipe:
    """Trains one module for a frozen target, whose embedding and head it shares."""

    def __init__(self, options: MTPOptions, context: TrainContext, target: FrozenTarget) -> None:
        self._options, self._target = options, target
        layer = like_target(target)
        layer = replace(layer, mlp_size=options.mlp or layer.mlp_size)
        self.config = MTPConfig(layer, recycle="pre" if options.recycle == "pre" else "post")
        module = MTPModule(self.config, rope_for(layer, context))
        start_small(module)
        _start_from_target(module, target)
        self.module: nn.Module = module.to(context.device)
        head = target.head()
        powers = [options.beta**step for step in range(options.unroll)]
        self._rollouts = Rollouts(
            target, module, lambda: head, context, weights=[power / sum(powers) for power in powers], keep=options.keep
        )

    def loss(self, windows: Windows) -> Losses:
        """See ``Recipe.loss``: loss@d and accuracy@d are of unrolled step d - 1, against the target's distribution."""
        run = self._rollouts.run(windows)
        return self._rollouts.losses(run)

    def save(self, folder: Path) -> None:
        """See ``Recipe.save``."""
        dtype = DTYPES[self._options.dtype]
        tensors = {f"mtp_layers.0.{name}": weight.to(dtype) for name, weight in self.module.state_dict().items()}
        write_mtp(folder, self.config, tensors, target=self._target.folder.name, steps=self._options.unroll)


def build_mtp(options: MTPOptions, context: TrainContext) -> MTPRecipe:
    """A module for ``context.target``.

    Raises:
        TrainError: options that cannot work, or a target that cannot be loaded or shared.
    """
    assert context.target is not None
    dtype = context.autocast or torch.float32
    return MTPRecipe(options, context, FrozenTarget.load(context.target, device=context.device, dtype=dtype))


@torch.no_grad()
def _start_from_target(module: MTPModule, target: FrozenTarget) -> None:
    """The norms begin as those of the target's end: the head reads what it is used to."""
    named = dict(module.named_parameters())
    for name, weight in last_layer(target).items():
        if "norm" in name:
            named[name].copy_(weight)
    if isinstance(target.model, Decoder):
        module.final_layernorm.weight.copy_(target.model.final_norm)
