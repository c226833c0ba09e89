"""What the recipes of EAGLE and MTP share: features from the target, the unrolled drafting, losses by depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import MAX_TREE
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.decoder import Decoder
from models.families import NATIVE_FAMILIES
from models.layers.rope import RopeConfig, rope_table
from models.loader import DTYPES, read_config
from training.capture import FrozenTarget
from training.errors import TrainError
from training.modules.rollout import Pass, unroll
from training.modules.soft_labels import PassLoss, SoftLabels, soft_cross_entropy
from training.recipe import Losses, TrainContext, Windows


@dataclass(frozen=True)
class Run:
    """Drafting over a batch of windows, and what it ought to have given."""

    passes: list[Pass]
    labels: SoftLabels


class Rollouts:
    """Runs a module over windows as it will be served, and takes its losses.

    Args:
        module: an nn.Module that is a ``RolloutModule``.
        head: [Vd, H] what predicts: the module's own, or the target's.
        weights: of the loss of each unrolled step.
        keep: share of the positions that draft on after each step in training; in validation all do.
        taps: of the target, together the feature; () for the output of its final norm.
        vocabulary: [Vd] int64 the target's ids of a draft vocabulary, ascending.
        noise: size of uniform noise on the features in training.

    Raises:
        TrainError: a share out of range, or more steps than a window has room for.
    """

    def __init__(
        self,
        target: FrozenTarget,
        module: Any,
        head: Callable[[], Tensor],
        context: TrainContext,
        *,
        weights: Sequence[float],
        keep: float,
        taps: tuple[int, ...] = (),
        vocabulary: Tensor | None = None,
        noise: float = 0.0,
    ) -> None:
        if not 0 < keep <= 1:
            raise TrainError(f"--keep is a share of the positions, over 0 and at most 1, not {keep}")
        if not 1 <= len(weights) <= context.window - 2:
            raise TrainError(f"--unroll must be from 1 to {context.window - 2} (--window less 2), not {len(weights)}")
        self._target = target
        self._module = module
        self._head = head
        self._weights = tuple(weights)
        self._keep = keep
        self._taps = taps
        self._vocabulary = vocabulary
        self._noise = noise
        self._checkpointing = context.checkpointing
        self._embedding = target.embedding()

    def run(self, windows: Windows) -> Run:
        """All steps. A window's first token has no entry and its last is a label only: S tokens make S - 2 entries."""
        captured = self._target.capture(windows.tokens, self._taps)
        features = torch.cat([captured.taps[tap] for tap in self._taps], dim=-1) if self._taps else captured.hidden
        exact, training = next(self._module.parameters()).dtype, self._module.training
        drawn = _drawn_by(windows)
        entering = features[:, :-2].to(exact)
        if training and self._noise:
            uniform = torch.rand(entering.shape, generator=drawn).to(entering) * 2 - 1
            entering = entering + self._noise * uniform
        embedded = F.embedding(windows.tokens[:, 1:-1], self._embedding).to(exact)
        keep = self._keep if training else 1.0
        passes = unroll(self._module, entering, embedded, len(self._weights), keep, drawn, self._checkpointing)
        labels = SoftLabels(captured.hidden[:, 1:-1], windows.counts[:, 2:], self._target.logits, self._vocabulary)
        return Run(passes, labels)

    def losses(self, run: Run) -> Losses:
        """Weighted sum over the steps of the cross-entropy with the target's distribution; loss@d and accuracy@d."""
        total, sums = soft_cross_entropy(run.passes, self._head(), run.labels, self._weights)
        return Losses(total, _metrics(sums))


def like_target(target: FrozenTarget, layers: int = 1) -> ModelConfig:
    """The target's kind of decoder layer without sliding windows; Llama's in its sizes if it runs by transformers."""
    model = target.model
    if isinstance(model, Decoder):
        return replace(model.config, num_layers=layers, windows=(), tied=False)
    dim, kv_heads = model.kv_spec.key_dim, model.kv_spec.num_kv_heads
    return ModelConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=layers,
        num_heads=kv_heads * max(1, round(model.hidden_size / (dim * kv_heads))),
        num_kv_heads=kv_heads,
        head_dim=dim,
        mlp_size=-(-model.hidden_size * 8 // 3 // 64) * 64,
        rope=RopeConfig(dim, trained_len=model.max_model_len, original_len=model.max_model_len),
        max_len=model.max_model_len,
    )


def last_layer(target: FrozenTarget) -> dict[str, Tensor]:
    """Weights of a native target's last layer by their Llama names without prefix; none of another target."""
    model = target.model
    if not isinstance(model, Decoder):
        return {}
    family = NATIVE_FAMILIES[str(read_config(target.folder)["model_type"])]
    prefix = f"layers.{model.num_layers - 1}."
    stored = family.checkpoint_name(f"{prefix}input_norm.weight").removesuffix("input_layernorm.weight")
    checkpoint = Checkpoint.open(target.folder)
    names = [name for name in checkpoint.shapes if name.startswith(stored) and not family.ignores(name)]
    return {name.removeprefix(stored): weight for name, weight in checkpoint.read(names)}


def rope_for(config: ModelConfig, context: TrainContext) -> Tensor:
    """cos and sin of the positions that training sees, with the frequencies of serving; float32."""
    return rope_table(config.rope, config.max_len, context.window + MAX_TREE, context.device, torch.float32)


def check_dtype(name: str) -> None:
    """Raise TrainError for a dtype that weights are not written in."""
    if name not in DTYPES:
        raise TrainError(f"--dtype must be one of {', '.join(DTYPES)}, not {name!r}")


def _drawn_by(windows: Windows) -> torch.Generator:
    """Randomness that depends on the batch alone: a run that was interrupted goes on with the same."""
    return torch.Generator().manual_seed(int(windows.tokens.sum()))


def _metrics(sums: list[PassLoss]) -> dict[str, Tensor]:
    """Mean loss over the labels within the vocabulary, and how often the first choice is the target's."""
    metrics: dict[str, Tensor] = {}
    for depth, each in enumerate(sums, start=1):
        metrics[f"loss@{depth}"] = each.cross_entropy / each.covered.clamp(min=1)
        metrics[f"accuracy@{depth}"] = each.right / each.labels.clamp(min=1)
    return metrics
