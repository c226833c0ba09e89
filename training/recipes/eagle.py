"""EAGLE-1 (arXiv 2401.15077, section 4.2): regression on the target's next feature, cross-entropy on its token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.eagle import EagleConfig, write_eagle
from models.loader import DTYPES
from training.capture import FrozenTarget
from training.errors import TrainError
from training.modules.eagle import EagleModule
from training.modules.start import start_small
from training.recipe import Losses, TrainContext, Windows
from training.recipes.rollout import Rollouts, check_dtype, like_target, rope_for


@dataclass(frozen=True)
class EagleOptions:
    """The defaults are the paper's, but for ``unroll``."""

    unroll: int = 1  # drafted tokens that training unrolls; the paper: 1, and noise instead of more
    step_decay: float = 0.8  # weight of a step's loss, relative to the step before it
    keep: float = 0.7  # share of the positions that draft on after each step
    noise: float = 0.1  # uniform on the features, from -noise to noise
    token_weight: float = 0.1  # of the cross-entropy beside the regression
    mlp: int = 0  # width of the MLP; 0: the target's
    dtype: str = "bfloat16"  # of the written weights

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if not 0 < self.step_decay <= 1 or self.noise < 0 or self.token_weight < 0 or self.mlp < 0:
            raise TrainError("--step-decay must be in (0, 1]; --noise, --token-weight and --mlp not negative")
        check_dtype(self.dtype)


class EagleRecipe:
    """Trains the drafter of a frozen target, whose embedding and head it shares."""

    def __init__(self, options: EagleOptions, context: TrainContext, target: FrozenTarget) -> None:
        self._options, self._target = options, target
        layer = like_target(target)
        self.config = EagleConfig(replace(layer, mlp_size=options.mlp or layer.mlp_size))
        module = EagleModule(self.config.layer, rope_for(layer, context), bias=self.config.bias)
        start_small(module)
        self.module: nn.Module = module.to(context.device)
        head = target.head()
        self._weights = [options.step_decay**step for step in range(options.unroll)]
        self._rollouts = Rollouts(
            target,
            module,
            lambda: head,
            context,
            weights=[options.token_weight * weight for weight in self._weights],
            keep=options.keep,
            noise=options.noise,
        )

    def loss(self, windows: Windows) -> Losses:
        """See ``Recipe.loss``: loss@d and accuracy@d are of unrolled step d - 1, against the target's distribution."""
        run = self._rollouts.run(windows)
        losses = self._rollouts.losses(run)
        regression = torch.zeros_like(losses.total)
        for step, (weight, each) in enumerate(zip(self._weights, run.passes, strict=True)):
            wanted = run.labels.hidden.index_select(1, each.anchors + step)
            counts = run.labels.counts.index_select(1, each.anchors + step)
            regression = regression + weight * smooth_l1(each.hidden, wanted, counts)
        return Losses(losses.total + regression, losses.metrics | {"regression": regression.detach()})

    def save(self, folder: Path) -> None:
        """See ``Recipe.save``."""
        dtype = DTYPES[self._options.dtype]
        write_eagle(folder, self.config, {name: w.to(dtype) for name, w in self.module.state_dict().items()})


def build_eagle(options: EagleOptions, context: TrainContext) -> EagleRecipe:
    """A drafter for ``context.target``.

    Raises:
        TrainError: options that cannot work, or a target that cannot be loaded or shared.
    """
    assert context.target is not None
    dtype = context.autocast or torch.float32
    return EagleRecipe(options, context, FrozenTarget.load(context.target, device=context.device, dtype=dtype))


def smooth_l1(guess: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Mean over the labels that count; guess and wanted [B, A, H], counts [B, A] bool."""
    wide = torch.promote_types(guess.dtype, torch.float32)
    each = F.smooth_l1_loss(guess.to(wide), wanted.to(wide), reduction="none").mean(dim=-1)
    return (each * counts).sum() / counts.sum().clamp(min=1)
