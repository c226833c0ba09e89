"""What the target computes on training windows: hidden states, taps, logits, and its frozen embedding and head.

A batch of windows is one forward pass of chains through the serving code, so training sees exactly the features that
drafting will see. On 2 CPU cores that is 2.5 times as fast as transformers' forward (bfloat16, 8 windows of 512).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.batcher import Chain, build
from decoding.cache import pages_for
from models.batch import RaggedBatch
from models.checkpoint import CheckpointError
from models.decoder import Decoder
from models.early_exit import ExitModel
from models.kv_cache import KVCache
from models.loader import load_model
from models.target import CausalModel, ExitingModel
from models.transformers_model import TransformersModel
from models.tree import roots_only
from training.errors import TrainError

_UNITS = 512  # columns of the head that are read at one time
_PROBES = 16  # random hidden states on which the head's weight must give the model's logits
_HEAD_TOLERANCE = 0.02  # of the largest logit; bfloat16 rounds to 0.004


@dataclass(frozen=True)
class Captured:
    """The target's view of windows [B, S]; no part of it asks for gradients."""

    hidden: Tensor  # [B, S, H] after the final norm: what the LM head is fed
    taps: dict[int, Tensor]  # tap i -> [B, S, H], the residual stream that enters layer i


@dataclass(frozen=True)
class _Layout:
    """What all batches of one shape share."""

    batch: RaggedBatch
    cache: KVCache


class FrozenTarget:
    """The target while a drafter is trained for it. Its weights never change and never ask for gradients."""

    def __init__(self, model: CausalModel, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self._layout: _Layout | None = None

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> FrozenTarget:
        """Load the model in ``folder``.

        Args:
            dtype: of its weights and forward pass; None: the checkpoint's.

        Raises:
            TrainError: a checkpoint that cannot be used; the message names cause and fix.
        """
        name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
        try:
            return cls(load_model(folder, dtype=name, device=device), folder)
        except CheckpointError as error:
            raise TrainError(f"the target cannot be loaded: {error}") from error

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and the head; may exceed the tokenizer's."""
        return self.model.vocab_size

    @torch.no_grad()  # not inference mode: its tensors could not be saved for a backward pass
    def capture(self, tokens: Tensor, taps: tuple[int, ...] = ()) -> Captured:
        """Hidden states of windows [B, S] int64, each from its own first position on.

        Raises:
            TrainError: windows longer than the target's context, or no such layer.
        """
        rows, length = tokens.shape
        check_window(length, self.model.max_model_len)
        wrong = [tap for tap in taps if not 0 <= tap < self.model.num_layers]
        if wrong:
            raise TrainError(f"there is no tap {wrong[0]}: the target has layers 0 .. {self.model.num_layers - 1}")
        layout = self._layout_of(rows, length)
        with torch.autocast(tokens.device.type, enabled=False):  # the model has a dtype of its own
            out = self.model.forward(replace(layout.batch, token_ids=tokens.flatten()), layout.cache, taps)
        shape = (rows, length, self.model.hidden_size)
        return Captured(out.hidden.view(shape), {tap: stream.view(shape) for tap, stream in out.taps.items()})

    def exit_after(self, layers: int) -> ExitModel:
        """The target's first layers, with its LM head.

        Raises:
            TrainError: it has no such exit.
        """
        if not isinstance(self.model, ExitingModel):
            raise TrainError(f"the target {self.folder} cannot stop after some of its layers; choose another recipe")
        try:
            return ExitModel(self.model, layers)
        except ValueError as error:
            raise TrainError(f"the target {self.folder} cannot be left early: {error}; give another layer") from error

    @torch.no_grad()
    def capture_exit(self, model: ExitModel, tokens: Tensor) -> Tensor:
        """[B, S, H] what an exit of this target feeds the LM head, on windows [B, S] int64."""
        rows, length = tokens.shape
        check_window(length, self.model.max_model_len)
        layout = self._layout_of(rows, length)
        with torch.autocast(tokens.device.type, enabled=False):
            out = model.forward(replace(layout.batch, token_ids=tokens.flatten()), layout.cache)
        return out.hidden.view(rows, length, self.model.hidden_size)

    def _layout_of(self, rows: int, length: int) -> _Layout:
        layout = self._layout
        if layout is None or layout.batch.num_rows != rows or layout.batch.max_query != length:
            layout = self._layout = _lay_out(self.model, rows, length)
        return layout

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] float32 (float64 for float64 weights)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.model.logits(hidden.to(self.model.dtype))

    @torch.no_grad()
    def embedding(self) -> Tensor:
        """A copy of the token embedding [V, H] in the target's dtype.

        Raises:
            TrainError: the model keeps none of that shape.
        """
        if isinstance(self.model, TransformersModel):
            weight: Tensor = self.model.decoder.get_input_embeddings().weight
        else:
            assert isinstance(self.model, Decoder)
            weight = self.model.embedding
        expected = (self.vocab_size, self.hidden_size)
        if tuple(weight.shape) != expected:
            raise TrainError(
                f"the embedding of the target {self.folder} is {list(weight.shape)}, and its hidden states and logits "
                f"ask for {list(expected)}: drafters that share it cannot be trained for this model"
            )
        return weight.detach().clone()

    @torch.no_grad()
    def head(self) -> Tensor:
        """A copy of the LM head [V, H] in the target's dtype: its logits are hidden @ head^T.

        A scale of the logits is in it.

        Raises:
            TrainError: the model's logits are something else: a bias, a soft cap.
        """
        device, dtype = self.model.device, self.model.dtype
        # the weight itself may be packed: the logits of unit vectors are its columns, exactly
        units = torch.eye(self.hidden_size, device=device, dtype=dtype)
        head = torch.cat([self.logits(some).to(dtype).t() for some in torch.split(units, _UNITS)], dim=1).contiguous()
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(_PROBES, self.hidden_size, generator=generator).to(device, dtype)
        given, wanted = F.linear(probes, head).float(), self.logits(probes).float()
        if not torch.allclose(given, wanted, rtol=0, atol=_HEAD_TOLERANCE * float(wanted.abs().max())):
            raise TrainError(
                f"the target {self.folder} caps or shifts its logits after the LM head, and this recipe trains on the "
                "head's weight alone; choose another recipe or target"
            )
        return head


def check_window(window: int, context: int) -> None:
    """Raise TrainError for windows that are longer than the target's context."""
    if window > context:
        raise TrainError(
            f"windows of {window} tokens are longer than the target's context of {context}; lower --window to "
            f"{context} or less"
        )


def _lay_out(model: CausalModel, rows: int, length: int) -> _Layout:
    """Chains of equal length, each on pages of its own; the K/V of one batch lies there until the next one's."""
    pages = pages_for(length)
    blank = torch.zeros(length, dtype=torch.int64).numpy()
    chains = [Chain(blank, 0, list(range(row * pages, (row + 1) * pages))) for row in range(rows)]
    trees = roots_only(torch.zeros(rows, dtype=torch.int64, device=model.device))
    batch, _ = build(chains, trees, torch.ones_like(trees.parents), [1] * rows)
    return _Layout(batch, KVCache(model.kv_spec, rows * pages, model.dtype, model.device))
