"""LayerSkip (2404.16710, section 4.1): the target itself is trained on, so that its first layers can draft for it.

Layer dropout leaves layer l of L out of a text with probability ``dropout`` * D(l), D(l) = exp(l ln 2 / (L - 1)) - 1:
never the first, the last with ``dropout``. The early-exit loss is the cross-entropy of final norm and LM head on what
leaves each layer, weighted among the exits that are on at a step by

    e(l) = e_scale * (0 + 1 + .. + l),   e(L - 1) = L - 1 + e_scale * (0 + 1 + .. + L - 2)

Which are on is the curriculum: every ``interval``-th, one further each step (rotational), or more and more of them from
the last to the first (gradual). The last one always is. What is written is a model like the target, in its format, and
another model than the target: its own text changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import CheckpointError
from models.loader import DTYPES
from models.transformers_checkpoint import load_checkpoint
from training.capture import check_window
from training.errors import TrainError
from training.heads import Depth, depth_losses
from training.recipe import Losses, TrainContext, Windows
from training.recipes.draft import has_plain_head
from training.recipes.lm import save_model

CURRICULA = ("rotational", "gradual")


@dataclass(frozen=True)
class LayerSkipOptions:
    dropout: float = 0.1  # of the last layer; earlier ones are left out less often
    e_scale: float = 0.2  # weight of the early exits' losses beside the last layer's
    curriculum: str = "rotational"  # which exits count in a step: rotational or gradual
    interval: int = 4  # of the rotation: every so manyth exit is on
    gradual_steps: int = 1000  # in whose first half the exits are turned on, for the gradual curriculum
    dtype: str = "bfloat16"  # of the written weights

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if not 0 <= self.dropout < 1:
            raise TrainError(f"--dropout must be at least 0 and less than 1, not {self.dropout}")
        if not self.e_scale >= 0:
            raise TrainError(f"--e-scale must be 0 or more, not {self.e_scale}")
        if self.curriculum not in CURRICULA:
            raise TrainError(f"--curriculum must be one of {', '.join(CURRICULA)}, not {self.curriculum!r}")
        if min(self.interval, self.gradual_steps) < 1:
            raise TrainError("--interval and --gradual-steps must be at least 1")
        if self.dtype not in DTYPES:
            raise TrainError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def exits_on(self, step: int, num_layers: int) -> list[int]:
        """The layers, from 0 on, after which the loss is taken in a step."""
        if self.curriculum == "rotational":
            on = {layer for layer in range(num_layers) if (layer - step) % self.interval == 0}
        else:
            turned_on = min(num_layers, 1 + 2 * num_layers * step // self.gradual_steps)
            on = set(range(num_layers - turned_on, num_layers))
        return sorted(on | {num_layers - 1})


def dropout_rates(num_layers: int, dropout: float) -> list[float]:
    """How often each layer is left out: ``dropout`` * D(l)."""
    last = max(1, num_layers - 1)
    return [dropout * (math.exp(layer * math.log(2) / last) - 1) for layer in range(num_layers)]


def exit_weights(num_layers: int, e_scale: float) -> list[float]:
    """e(l) of every layer, before they are normalised."""
    early = [e_scale * layer * (layer + 1) / 2 for layer in range(num_layers - 1)]
    return [*early, num_layers - 1 + (early[-1] if early else 1.0)]


class LayerSkipModule(nn.Module):
    """A model of transformers and how many batches it has been trained on.

    Raises:
        TrainError: a model whose layers and final norm are not where they are looked for.
    """

    step: Tensor  # []

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        trunk = model.base_model
        layers, norm = getattr(trunk, "layers", None), getattr(trunk, "norm", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
            raise TrainError(
                f"a {model.config.model_type} model has no 'layers' followed by a 'norm', which this recipe needs; "
                "train an adapter with 'saccade train early-exit' instead"
            )
        self.num_layers = len(layers)

    def streams(self, tokens: Tensor, rates: list[float] | None) -> list[Tensor]:
        """The residual stream [B, S, H] after every layer, layers left out at ``rates``; None: with all of them."""
        trunk = self.model.base_model
        with _layers_left_out(trunk.layers, rates) as streams:
            trunk(input_ids=tokens, use_cache=False)
        return streams


@contextmanager
def _layers_left_out(layers: nn.ModuleList, rates: list[float] | None) -> Iterator[list[Tensor]]:
    """Collect what leaves each layer during the ``with`` block; some layers hand texts on as they came."""
    streams: list[Tensor] = []

    def hook(rate: float, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered: Tensor = args[0] if args else kwargs["hidden_states"]
        left: Tensor = output[0] if isinstance(output, tuple) else output
        if rate > 0:
            dropped = torch.rand(left.shape[0], 1, 1, device=left.device) < rate
            left = torch.where(dropped, entered.to(left.dtype), left)
        streams.append(left)
        return (left, *output[1:]) if isinstance(output, tuple) else left

    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, rate=rate: hook(rate, args, kwargs, output), with_kwargs=True
        )
        for layer, rate in zip(layers, rates or [0.0] * len(layers), strict=True)
    ]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


class LayerSkipRecipe:
    """Trains a whole model."""

    def __init__(self, options: LayerSkipOptions, context: TrainContext, model: Any) -> None:
        self._skipping = LayerSkipModule(model)
        self.module: nn.Module = self._skipping
        self._options = options
        self._tokenizer_folder = context.tokenizer_folder
        self._rates = dropout_rates(self._skipping.num_layers, options.dropout)
        self._weights = exit_weights(self._skipping.num_layers, options.e_scale)

    def loss(self, windows: Windows) -> Losses:
        """See ``Recipe.loss``. In validation loss@l and accuracy@l are of the next token after l layers."""
        skipping, training = self._skipping, self._skipping.training
        exits = list(range(skipping.num_layers))
        if training:
            exits = self._options.exits_on(int(skipping.step), skipping.num_layers)
            skipping.step += 1
        streams = skipping.streams(windows.tokens, self._rates if training else None)
        norm, head = skipping.model.base_model.norm, skipping.model.get_output_embeddings().weight
        depths = [Depth(norm(streams[layer]), head, 1, self._weights[layer]) for layer in exits]
        losses = depth_losses(windows, depths)
        return Losses(losses.total, {}) if training else losses

    def save(self, folder: Path) -> None:
        """See ``Recipe.save``: a model folder, tokenizer included."""
        save_model(self._skipping.model, folder, self._options.dtype, self._tokenizer_folder)


def build_layerskip(options: LayerSkipOptions, context: TrainContext) -> LayerSkipRecipe:
    """The model in ``context.target``, to be trained on.

    Raises:
        TrainError: a model that cannot be loaded or is built in another way, a window longer than its context,
            ``--checkpointing``.
    """
    assert context.target is not None
    if context.checkpointing:
        raise TrainError("layerskip looks at what leaves every layer; leave --checkpointing out, lower --micro-batch")
    try:
        model = load_checkpoint(context.target, "float32")
    except CheckpointError as error:
        raise TrainError(f"the target cannot be trained on: {error}") from error
    check_window(context.window, model.config.max_position_embeddings)
    if not has_plain_head(model):
        raise TrainError(
            f"a {model.config.model_type} model scales, caps or shifts its logits after the LM head, which this recipe "
            "does not do; train an adapter with 'saccade train early-exit' instead"
        )
    return LayerSkipRecipe(options, context, model.to(context.device))
