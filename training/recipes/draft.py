"""A small model of the target's family and vocabulary, distilled from the target (2310.08461) by KL(target || draft).

It begins as the target with most layers left out: embeddings, the chosen layers, final norm and head are the target's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.checkpoint import CheckpointError
from models.loader import DTYPES
from models.transformers_checkpoint import load_checkpoint
from training.capture import FrozenTarget
from training.errors import TrainError
from training.heads import LABELS, Depth, Teacher, depth_losses
from training.recipe import Losses, TrainContext, Windows
from training.recipes.lm import save_model

_LAYER = re.compile(r"(.*\.(?:layers|h|blocks)\.)(\d+)(\..*)")
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in configs with an entry for each layer


@dataclass(frozen=True)
class DraftOptions:
    init: str = ""  # folder of a draft model to train on; the layers are then its own
    layers: int = 1  # number of layers
    from_layers: str = ""  # the target's layers it begins as, such as 0,4; default: evenly spread, the first included
    labels: str = "target"  # target: its distributions; text: the tokens that came
    dtype: str = "bfloat16"  # of the written weights

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if self.layers < 1:
            raise TrainError(f"--layers must be at least 1, not {self.layers}")
        if self.labels not in LABELS:
            raise TrainError(f"--labels must be one of {', '.join(LABELS)}, not {self.labels!r}")
        if self.dtype not in DTYPES:
            raise TrainError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def chosen(self, total: int) -> list[int]:
        """The target's layers, of ``total``, that the draft begins as.

        Raises:
            TrainError: more than there are, or none of the target's.
        """
        if not self.from_layers:
            if self.layers >= total:
                raise TrainError(f"--layers {self.layers} is no smaller than the target, which has {total}")
            return [index * total // self.layers for index in range(self.layers)]
        words = self.from_layers.split(",")
        chosen = [int(word) for word in words if word.strip().isdecimal()]
        if len(chosen) != len(words) or len(chosen) != self.layers or not all(index < total for index in chosen):
            raise TrainError(
                f"--from-layers {self.from_layers} must name as many layers of the target as --layers says "
                f"({self.layers}), each from 0 to {total - 1}, such as {','.join(map(str, range(self.layers)))}"
            )
        return chosen


class DraftRecipe:
    """Trains a whole model of transformers."""

    def __init__(self, options: DraftOptions, context: TrainContext, target: FrozenTarget, draft: Any) -> None:
        self.module: nn.Module = draft
        self._options = options
        self._target = target
        self._tokenizer_folder = context.tokenizer_folder
        if context.checkpointing:
            draft.gradient_checkpointing_enable()
        self._trunk = draft.base_model
        self._head = draft.get_output_embeddings()

    def loss(self, windows: Windows) -> Losses:
        """See ``Recipe.loss``: loss@1 and accuracy@1 are of the next token."""
        hidden = self._trunk(input_ids=windows.tokens, use_cache=False).last_hidden_state
        teacher = None
        if self._options.labels == "target":
            teacher = Teacher(self._target.capture(windows.tokens).hidden, self._target.logits)
        return depth_losses(windows, [Depth(hidden, self._head.weight, 1)], teacher)

    def save(self, folder: Path) -> None:
        """See ``Recipe.save``: a model folder, tokenizer included."""
        save_model(self.module, folder, self._options.dtype, self._tokenizer_folder)


def build_draft(options: DraftOptions, context: TrainContext) -> DraftRecipe:
    """A draft model for ``context.target``.

    Raises:
        TrainError: a target that cannot be loaded or cut down, or whose logits are not its head's product alone.
    """
    assert context.target is not None
    target = FrozenTarget.load(context.target, device=context.device, dtype=context.autocast or torch.float32)
    if options.init:
        draft = load_draft(Path(options.init), target.vocab_size)
    else:
        draft = cut_down(context.target, options.chosen(target.model.num_layers))
    if not has_plain_head(draft):
        raise TrainError(
            f"a {draft.config.model_type} model scales, caps or shifts its logits after the LM head, which drafts are "
            "not trained for; choose another recipe"
        )
    draft = draft.to(context.device)
    return DraftRecipe(options, context, target, draft)


def load_draft(folder: Path, vocab_size: int) -> Any:
    """The draft model in ``folder``, in float32.

    Raises:
        TrainError: it cannot be loaded, or has another vocabulary than the target.
    """
    try:
        draft = load_checkpoint(folder, "float32")
    except CheckpointError as error:
        raise TrainError(f"--init {folder} cannot be trained on: {error}") from error
    if draft.config.vocab_size != vocab_size:
        raise TrainError(
            f"--init {folder} has {draft.config.vocab_size} tokens and the target {vocab_size}; choose a draft model "
            "of the target's vocabulary"
        )
    return draft


@torch.no_grad()
def has_plain_head(draft: Any) -> bool:
    """Whether the logits are the product of hidden states and the head's weight, and nothing else."""
    out = draft(torch.arange(8)[None], use_cache=False, output_hidden_states=True)
    head = draft.get_output_embeddings()
    return torch.allclose(F.linear(out.hidden_states[-1], head.weight), out.logits, rtol=1e-4, atol=1e-4)


def cut_down(folder: Path, layers: list[int]) -> Any:
    """The model in ``folder`` with these of its layers, in float32: a model of transformers.

    Raises:
        TrainError: transformers has no such model, or it has other weights by layer than layers.
    """
    from transformers import AutoModelForCausalLM

    try:
        whole = load_checkpoint(folder, "float32")
    except CheckpointError as error:
        raise TrainError(f"the target cannot be cut down: {error}") from error
    config = whole.config
    config.num_hidden_layers = len(layers)
    for name in _BY_LAYER:
        entries = getattr(config, name, None)
        if entries is not None:
            setattr(config, name, [entries[layer] for layer in layers])
    weights = {}
    for name, weight in whole.state_dict().items():
        match = _LAYER.fullmatch(name)
        if match is None:
            weights[name] = weight
        else:
            places = [new for new, old in enumerate(layers) if old == int(match[2])]
            weights |= {f"{match[1]}{new}{match[3]}": weight for new in places}
    draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    try:
        draft.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainError(
            f"a {config.model_type} model cannot be cut down to {len(layers)} layers: {str(error).splitlines()[-1]}; "
            "train a draft with 'saccade train lm' instead"
        ) from error
    return draft
