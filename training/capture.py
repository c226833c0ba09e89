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
from models.checkpoint import Checkpoint, CheckpointError
from models.decoder import Decoder
from models.families import NATIVE_FAMILIES
from models.kv_cache import KVCache
from models.loader import load_model, read_config
from models.target import CausalModel
from models.transformers_model import TransformersModel
from models.tree import roots_only
from training.errors import TrainError

_PROBES = 16  # random hidden states on which the head's weight must give the model's logits


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
        if length > self.model.max_model_len:
            raise TrainError(
                f"windows of {length} tokens are longer than the target's context of {self.model.max_model_len}; "
                "lower --window"
            )
        wrong = [tap for tap in taps if not 0 <= tap < self.model.num_layers]
        if wrong:
            raise TrainError(f"there is no tap {wrong[0]}: the target has layers 0 .. {self.model.num_layers - 1}")
        layout = self._layout
        if layout is None or layout.batch.num_rows != rows or layout.batch.max_query != length:
            layout = self._layout = _lay_out(self.model, rows, length)
        with torch.autocast(tokens.device.type, enabled=False):  # the model has a dtype of its own
            out = self.model.forward(replace(layout.batch, token_ids=tokens.flatten()), layout.cache, taps)
        shape = (rows, length, self.model.hidden_size)
        return Captured(out.hidden.view(shape), {tap: stream.view(shape) for tap, stream in out.taps.items()})

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
            found = self.model.decoder.get_input_embeddings().weight
        else:
            found = self._stored("embed.weight")
        return self._checked(found, "embedding")

    @torch.no_grad()
    def head(self) -> Tensor:
        """A copy of the LM head's weight [V, H] in the target's dtype; logits are hidden @ head^T and nothing else.

        Raises:
            TrainError: the model's logits are something else: a bias, a scale, a soft cap.
        """
        if isinstance(self.model, TransformersModel):
            found = self.model.head.get_output_embeddings().weight  # type: ignore[operator]
        else:
            found = self._stored("embed.weight" if _tied(self.model) else "head.weight")
        head = self._checked(found, "LM head")
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(_PROBES, self.hidden_size, generator=generator).to(head.device, head.dtype)
        given, wanted = F.linear(probes, head).to(torch.float32), self.logits(probes).to(torch.float32)
        if not torch.allclose(given, wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max())):
            raise TrainError(
                f"the target {self.folder} scales, caps or shifts its logits after the LM head, and this recipe trains "
                "on the head's weight alone; choose another recipe or target"
            )
        return head

    def _stored(self, name: str) -> Tensor:
        """A weight by the decoder's name for it, from the checkpoint: in the model it may be packed."""
        family = NATIVE_FAMILIES[str(read_config(self.folder)["model_type"])]
        try:
            ((_, weight),) = Checkpoint.open(self.folder).read([family.checkpoint_name(name)])
        except CheckpointError as error:
            raise TrainError(f"the target cannot be read: {error}") from error
        return weight

    def _checked(self, weight: Tensor, what: str) -> Tensor:
        expected = (self.vocab_size, self.hidden_size)
        if tuple(weight.shape) != expected:
            raise TrainError(
                f"the {what} of the target {self.folder} is {list(weight.shape)}, and its hidden states and logits ask "
                f"for {list(expected)}: drafters that share it cannot be trained for this model"
            )
        return weight.detach().to(self.model.device, self.model.dtype, copy=True)


def _tied(model: CausalModel) -> bool:
    return isinstance(model, Decoder) and model.config.tied


def _lay_out(model: CausalModel, rows: int, length: int) -> _Layout:
    """Chains of equal length, each on pages of its own; the K/V of one batch lies there until the next one's."""
    pages = pages_for(length)
    blank = torch.zeros(length, dtype=torch.int64).numpy()
    chains = [Chain(blank, 0, list(range(row * pages, (row + 1) * pages))) for row in range(rows)]
    trees = roots_only(torch.zeros(rows, dtype=torch.int64, device=model.device))
    batch, _ = build(chains, trees, torch.ones_like(trees.parents), [1] * rows)
    return _Layout(batch, KVCache(model.kv_spec, rows * pages, model.dtype, model.device))
