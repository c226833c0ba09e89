"""Models whose passes are recorded and replayed, see graphs.py. Whatever they are asked for besides, the model answers.

What a pass returns is overwritten by the model's next pass.
"""

from __future__ import annotations

from torch import Tensor

from models.batch import RaggedBatch
from models.graphs import Capture, GraphedPasses, Tensors
from models.heads.feature_model import Drafted, FeatureModel
from models.kv_cache import KVCache
from models.target import CausalModel, ForwardOutput


class GraphedModel:
    """A ``CausalModel`` around another."""

    def __init__(self, model: CausalModel, capture: Capture) -> None:
        self.vocab_size = model.vocab_size
        self.hidden_size = model.hidden_size
        self.num_layers = model.num_layers
        self.max_model_len = model.max_model_len
        self.kv_spec = model.kv_spec
        self.dtype = model.dtype
        self.device = model.device
        self.new_cache = model.new_cache
        self.embed = model.embed
        self.logits = model.logits
        self._model = model
        self._passes = GraphedPasses(capture)

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        """See ``CausalModel.forward``."""

        def run(batch: RaggedBatch, by_token: Tensors, by_row: Tensors) -> Tensors:
            out = self._model.forward(batch, cache, taps)
            return (out.hidden, *(out.taps[tap] for tap in taps))

        hidden, *kept = self._passes.run((cache, taps), run, cache.scratch_page, batch)
        return ForwardOutput(hidden, dict(zip(taps, kept, strict=True)))


class GraphedFeatureModel:
    """A ``FeatureModel`` around another."""

    def __init__(self, model: FeatureModel, capture: Capture) -> None:
        self.source = model.source
        self.feature_size = model.feature_size
        self.carry_size = model.carry_size
        self.continues = model.continues
        self.kv_spec = model.kv_spec
        self.max_positions = model.max_positions
        self.token_ids = model.token_ids
        self.dtype = model.dtype
        self.device = model.device
        self.logits = model.logits
        self._model = model
        self._passes = GraphedPasses(capture)

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        """See ``FeatureModel.catch_up``."""

        def run(batch: RaggedBatch, by_token: Tensors, by_row: Tensors) -> Tensors:
            drafted = self._model.catch_up(batch, by_token[0], by_row[0] if by_row else None, cache)
            return drafted.hidden, drafted.carry

        by_row = () if before is None else (before,)
        return Drafted(*self._passes.run(("catch up", cache), run, cache.scratch_page, batch, (features,), by_row))

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        """See ``FeatureModel.extend``."""

        def run(batch: RaggedBatch, by_token: Tensors, by_row: Tensors) -> Tensors:
            drafted = self._model.extend(batch, by_token[0], depth, cache)
            return drafted.hidden, drafted.carry

        return Drafted(*self._passes.run((depth, cache), run, cache.scratch_page, batch, (carry,)))
