"""The first layers of a model as its own draft model (LayerSkip, 2404.16710, section 4.3).

    hidden = final norm(stream that leaves layer E),  logits = the model's LM head

There are no weights and there is no K/V but the model's: of a text that the model has run, the first layers' K/V is in
its cache already, so nothing is ever to be caught up with. What is drafted must be written to slots that the model
itself writes later, as it does when it verifies.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from models.batch import RaggedBatch
from models.kv_cache import KVCache
from models.target import ExitingModel, ForwardOutput


class ExitModel:
    """A ``CausalModel`` made of the first ``exit_layer`` layers of another, which runs over the other's cache.

    Args:
        adapter: maps what the LM head would be fed [T, H]; None: nothing does.

    Raises:
        ValueError: the model has no such exit.
    """

    def __init__(self, model: ExitingModel, exit_layer: int, adapter: Callable[[Tensor], Tensor] | None = None) -> None:
        self.vocab_size = model.vocab_size
        self.hidden_size = model.hidden_size
        self.num_layers = exit_layer
        self.max_model_len = model.max_model_len
        self.kv_spec = model.kv_spec
        self.dtype = model.dtype
        self.device = model.device
        self.new_cache = model.new_cache
        self.embed = model.embed
        self.logits = model.logits
        self._trunk = model.exit_after(exit_layer)
        self._adapter = adapter

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        """See ``CausalModel.forward``; there are no taps. ``cache`` is that of the whole model."""
        assert not taps
        hidden = self._trunk(batch, cache)
        return ForwardOutput(hidden if self._adapter is None else self._adapter(hidden))
