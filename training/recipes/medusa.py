"""Medusa-1 (2401.10774, section 2.2.1): heads that guess the next tokens from one hidden state, the target frozen.

Head k, counted from 0, is trained at every token t for the token t + k + 2 (the target's own head guesses t + 1), with
weight 0.8 ^ k in the loss. The paper's labels are the text's tokens; by default ours are the target's distributions at
the places guessed, which tell more than the one token that came, and are what drafts are accepted by. Heads begin as
copies of the target's head with blocks that do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import CheckpointError
from models.heads.medusa import MedusaConfig, open_medusa, write_medusa
from models.loader import DTYPES
from training.capture import FrozenTarget
from training.errors import TrainError
from training.heads import LABELS, Depth, Teacher, depth_losses
from training.recipe import Losses, TrainContext, Windows

FIRST_OFFSET = 2  # head 0 at token t guesses token t + 2


@dataclass(frozen=True)
class MedusaOptions:
    init: str = ""  # folder of heads to train on, of the same number and kind
    heads: int = 4  # number of heads, each a token further on
    layers: int = 1  # residual blocks of a head
    share_head: bool = False  # the heads use the target's LM head and have none of their own (version 2 of the format)
    labels: str = "target"  # target: its distributions; text: the tokens that came
    depth_decay: float = 0.8  # head k counts depth_decay ^ k in the loss
    dtype: str = "bfloat16"  # of the written weights

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if self.heads < 1 or self.layers < 1:
            raise TrainError("--heads and --layers must be at least 1")
        if self.labels not in LABELS:
            raise TrainError(f"--labels must be one of {', '.join(LABELS)}, not {self.labels!r}")
        if not 0 < self.depth_decay <= 1:
            raise TrainError(f"--depth-decay must be over 0 and at most 1, not {self.depth_decay}")
        if self.dtype not in DTYPES:
            raise TrainError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")


class MedusaModule(nn.Module):
    """The heads with gradients; models/heads/medusa.py runs them without.

    Args:
        lm_head: [V, H] what the heads' outputs begin as; None for heads that share the target's.
    """

    def __init__(self, hidden_size: int, heads: int, layers: int, lm_head: Tensor | None) -> None:
        super().__init__()
        self.layers = layers
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers)) for _ in range(heads)
        )
        for parameter in self.blocks.parameters():
            nn.init.zeros_(parameter)  # z + SiLU(0) = z
        copies = [] if lm_head is None else [nn.Parameter(lm_head.float().clone()) for _ in range(heads)]
        self.lm_heads = nn.ParameterList(copies)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """[B, S, H] -> what each head's output takes, [B, S, H]."""
        states = []
        for blocks in self.blocks:
            state = hidden
            for block in blocks:  # type: ignore[attr-defined]
                state = state + F.silu(block(state))
            states.append(state)
        return states

    def tensors(self) -> dict[str, Tensor]:
        """The weights by their public names, see models/heads/medusa.py."""
        named: dict[str, Tensor] = {}
        for head, blocks in enumerate(self.blocks):
            for name, parameter in blocks.named_parameters():  # such as 0.weight
                block, _, kind = name.partition(".")
                named[f"{head}.{block}.linear.{kind}"] = parameter
        return named | {f"{head}.{self.layers}.weight": weight for head, weight in enumerate(self.lm_heads)}


class MedusaRecipe:
    """Trains heads for a frozen target."""

    def __init__(self, options: MedusaOptions, target: FrozenTarget) -> None:
        self._options = options
        self._target = target
        lm_head = target.head().float()
        own = None if options.share_head else lm_head
        self._shared = lm_head if options.share_head else None
        self._medusa = MedusaModule(target.hidden_size, options.heads, options.layers, own).to(target.model.device)
        self.module: nn.Module = self._medusa
        if options.init:
            self._begin_with(Path(options.init))

    def loss(self, windows: Windows) -> Losses:
        """See ``Recipe.loss``: loss@d and accuracy@d are of head d - 1."""
        hidden = self._target.capture(windows.tokens).hidden
        states = self._medusa(hidden.float())
        heads = self._medusa.lm_heads if self._shared is None else [self._shared] * len(states)
        depths = [
            Depth(state, head, FIRST_OFFSET + index, self._options.depth_decay**index)
            for index, (state, head) in enumerate(zip(states, heads, strict=True))
        ]
        teacher = Teacher(hidden, self._target.logits) if self._options.labels == "target" else None
        return depth_losses(windows, depths, teacher)

    def save(self, folder: Path) -> None:
        """See ``Recipe.save``."""
        dtype = DTYPES[self._options.dtype]
        tensors = {name: weight.to(dtype) for name, weight in self._medusa.tensors().items()}
        write_medusa(folder, self._config(), tensors)

    def _config(self) -> MedusaConfig:
        options = self._options
        return MedusaConfig(
            hidden_size=self._target.hidden_size,
            num_heads=options.heads,
            num_layers=options.layers,
            vocab_size=None if options.share_head else self._target.vocab_size,
            base_model=self._target.folder.name,
        )

    @torch.no_grad()
    def _begin_with(self, folder: Path) -> None:
        try:
            file = open_medusa(folder)
            if file.config.shapes() != self._config().shapes():
                raise TrainError(
                    f"--init {folder} has {file.config}, and the options ask for {self._config()}; give the same "
                    "--heads, --layers and --share-head as made it"
                )
            own = {file.prefix + name: weight for name, weight in self._medusa.tensors().items()}
            for name, weight in file.checkpoint.read(own):
                own[name].copy_(weight)
        except CheckpointError as error:
            raise TrainError(f"--init {folder} cannot be trained on: {error}") from error


def build_medusa(options: MedusaOptions, context: TrainContext) -> MedusaRecipe:
    """Heads for ``context.target``.

    Raises:
        TrainError: a target that cannot be loaded, or whose logits are not its head's product alone.
    """
    assert context.target is not None
    dtype = context.autocast or torch.float32
    return MedusaRecipe(options, FrozenTarget.load(context.target, device=context.device, dtype=dtype))
