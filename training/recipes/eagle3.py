"""EAGLE-3 (arXiv 2503.01840): trained by drafting as served ("training-time test"), on its own features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.decoder import Decoder
from models.heads.eagle3 import Eagle3Config, default_taps
from models.heads.eagle3_files import write_eagle3
from models.loader import DTYPES
from training.capture import FrozenTarget
from training.errors import TrainError
from training.modules.eagle3 import Eagle3Module
from training.modules.start import start_at_own_token, start_small
from training.recipe import Losses, TrainContext, Windows
from training.recipes.rollout import Rollouts, check_dtype, like_target, rope_for


@dataclass(frozen=True)
class Eagle3Options:
    unroll: int = 6  # drafted tokens that training unrolls; the paper: 5
    step_decay: float = 0.8  # weight of a step's loss, relative to the step before it
    keep: float = 0.7  # share of the positions that draft on after each step; the paper: all (1)
    draft_vocab: int = 32_000  # most frequent tokens of the data, which can be drafted; 0: all
    taps: str = ""  # layers of the target whose input is read, such as 2,4,5; default: 2, middle, last but two
    layers: int = 1  # number of layers
    mlp: int = 0  # width of the MLP; 0: the target's
    norm_before_residual: bool = True  # the paper: no; it learns faster
    norm_output: bool = True  # feed back the normed output (EAGLE-3.1); the paper: no
    dtype: str = "bfloat16"  # of the written weights

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if self.layers < 1 or self.mlp < 0 or self.draft_vocab < 0 or not 0 < self.step_decay <= 1:
            raise TrainError(
                "--layers must be at least 1, --mlp and --draft-vocab not negative, --step-decay in (0, 1]"
            )
        check_dtype(self.dtype)

    def chosen_taps(self, total: int) -> tuple[int, ...]:
        """The taps for a target of ``total`` layers.

        Raises:
            TrainError: none, or some that it does not have.
        """
        words = self.taps.split(",") if self.taps else [str(tap) for tap in default_taps(total)]
        taps = tuple(int(word) for word in words if word.strip().isdecimal())
        if len(taps) != len(words) or not all(tap < total for tap in taps):
            raise TrainError(
                f"taps {','.join(words)} do not fit a target of {total} layers; give --taps, each from 0 to "
                f"{total - 1}, such as {total // 4},{total // 2},{total - 1}"
            )
        return taps


class Eagle3Recipe:
    """Trains the drafter of a frozen target, whose embedding it shares.

    Args:
        vocabulary: [Vd] int64 the target's ids of the tokens that can be drafted, ascending; None: all.
    """

    def __init__(
        self, options: Eagle3Options, context: TrainContext, target: FrozenTarget, vocabulary: Tensor | None
    ) -> None:
        self._options, self._target, self._vocabulary = options, target, vocabulary
        layer = like_target(target, options.layers)
        self.config = Eagle3Config(
            layer=replace(layer, mlp_size=options.mlp or layer.mlp_size),
            taps=options.chosen_taps(target.model.num_layers),
            draft_vocab_size=None if vocabulary is None else len(vocabulary),
            norm_before_residual=options.norm_before_residual,
            norm_output=options.norm_output,
        )
        module = Eagle3Module(self.config, rope_for(layer, context))
        start_small(module)
        start_at_own_token(module.layers[0].self_attn, layer.hidden_size)  # type: ignore[arg-type]
        _start_from_target(module, target, vocabulary)
        self.module: nn.Module = module.to(context.device)
        self._rollouts = Rollouts(
            target,
            module,
            lambda: module.lm_head.weight,
            context,
            weights=[options.step_decay**step for step in range(options.unroll)],
            keep=options.keep,
            taps=self.config.taps,
            vocabulary=vocabulary,
        )

    def loss(self, windows: Windows) -> Losses:
        """See ``Recipe.loss``: loss@d and accuracy@d are of unrolled step d - 1, against the target's distribution."""
        run = self._rollouts.run(windows)
        return self._rollouts.losses(run)

    def save(self, folder: Path) -> None:
        """See ``Recipe.save``."""
        dtype = DTYPES[self._options.dtype]
        tensors = {name: weight.to(dtype) for name, weight in self.module.state_dict().items()}
        write_eagle3(folder, self.config, tensors, self._vocabulary, target=self._target.folder)


def build_eagle3(options: Eagle3Options, context: TrainContext) -> Eagle3Recipe:
    """A drafter for ``context.target``.

    Raises:
        TrainError: options that cannot work, or a target that cannot be loaded or shared.
    """
    assert context.target is not None
    dtype = context.autocast or torch.float32
    target = FrozenTarget.load(context.target, device=context.device, dtype=dtype)
    vocabulary = frequent_tokens(context.corpus, options.draft_vocab, target.vocab_size)
    return Eagle3Recipe(options, context, target, None if vocabulary is None else vocabulary.to(context.device))


def frequent_tokens(corpus: np.ndarray, size: int, vocab_size: int) -> Tensor | None:
    """The ``size`` most frequent token ids in ascending order, [size] int64; None where that is all of them."""
    if size == 0 or size >= vocab_size:
        return None
    counts = np.bincount(corpus, minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int64))


@torch.no_grad()
def _start_from_target(module: Eagle3Module, target: FrozenTarget, vocabulary: Tensor | None) -> None:
    """The head begins as the target's rows of the draft vocabulary, behind the target's norm."""
    head = target.head()
    module.lm_head.weight.copy_(head if vocabulary is None else head[vocabulary])
    if isinstance(target.model, Decoder):
        module.norm.weight.copy_(target.model.final_norm)
