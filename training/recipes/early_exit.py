"""An adapter for early exits (models/heads/early_exit.py): the target is frozen, and its first layers learn to draft.

At every token the adapter's logits are to be the target's own there: KL(target || exit), as the target's distribution
is what drafts are accepted by (2310.08461). It begins as the exit without adapter. The exit's hidden states are those
of serving: the same pass over the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import CheckpointError
from models.heads.early_exit import AdapterConfig, read_adapter, write_adapter
from models.loader import DTYPES
from training.capture import FrozenTarget
from training.errors import TrainError
from training.heads import LABELS, Depth, Teacher, depth_losses
from training.recipe import Losses, TrainContext, Windows


@dataclass(frozen=True)
class EarlyExitOptions:
    init: str = ""  # folder of an adapter to train on, of the same exit and width
    exit_layer: int | None = None  # layers before the exit; default: a quarter of the target's
    mlp: int | None = None  # width of the adapter; default: twice the hidden size
    labels: str = "target"  # target: its distributions; text: the tokens that came
    dtype: str = "bfloat16"  # of the written weights

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if self.mlp is not None and self.mlp < 1:
            raise TrainError(f"--mlp must be at least 1, not {self.mlp}")
        if self.labels not in LABELS:
            raise TrainError(f"--labels must be one of {', '.join(LABELS)}, not {self.labels!r}")
        if self.dtype not in DTYPES:
            raise TrainError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")


class AdapterModule(nn.Module):
    """The adapter with gradients; models/heads/early_exit.py runs it without."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_size)
        self.up_proj = nn.Linear(hidden_size, mlp_size)
        self.down_proj = nn.Linear(mlp_size, hidden_size)
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        mapped: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return hidden + mapped


class EarlyExitRecipe:
    """Trains an adapter for a frozen target."""

    def __init__(self, options: EarlyExitOptions, target: FrozenTarget) -> None:
        model = target.model
        layer = max(1, model.num_layers // 4) if options.exit_layer is None else options.exit_layer
        self._exit = target.exit_after(layer)
        self._target = target
        self._labels = options.labels
        self._dtype = DTYPES[options.dtype]
        self._config = AdapterConfig(
            exit_layer=layer,
            hidden_size=target.hidden_size,
            mlp_size=options.mlp or 2 * target.hidden_size,
            num_layers=model.num_layers,
            vocab_size=target.vocab_size,
            base_model=target.folder.name,
        )
        self._adapter = AdapterModule(target.hidden_size, self._config.mlp_size).to(model.device)
        self._head = target.head().float()
        self.module: nn.Module = self._adapter
        if options.init:
            self._begin_with(Path(options.init))

    def loss(self, windows: Windows) -> Losses:
        """See ``Recipe.loss``: loss@1 and accuracy@1 are of the next token."""
        hidden = self._adapter(self._target.capture_exit(self._exit, windows.tokens).float())
        teacher = None
        if self._labels == "target":
            teacher = Teacher(self._target.capture(windows.tokens).hidden, self._target.logits)
        return depth_losses(windows, [Depth(hidden, self._head, 1)], teacher)

    def save(self, folder: Path) -> None:
        """See ``Recipe.save``."""
        weights = {name: weight.detach().to(self._dtype) for name, weight in self._adapter.named_parameters()}
        write_adapter(folder, self._config, weights)

    @torch.no_grad()
    def _begin_with(self, folder: Path) -> None:
        try:
            config, checkpoint = read_adapter(folder)
            if config.shapes() != self._config.shapes() or config.exit_layer != self._config.exit_layer:
                raise TrainError(
                    f"--init {folder} has {config}, and the options ask for {self._config}; give the --exit-layer and "
                    "--mlp that made it"
                )
            own = dict(self._adapter.named_parameters())
            for name, weight in checkpoint.read(own):
                own[name].copy_(weight)
        except (CheckpointError, KeyError) as error:
            raise TrainError(f"--init {folder} cannot be trained on: {error}") from error


def build_early_exit(options: EarlyExitOptions, context: TrainContext) -> EarlyExitRecipe:
    """An adapter for ``context.target``.

    Raises:
        TrainError: a target that cannot be loaded or left early, or whose logits are not its head's product alone.
    """
    assert context.target is not None
    dtype = context.autocast or torch.float32
    return EarlyExitRecipe(options, FrozenTarget.load(context.target, device=context.device, dtype=dtype))
