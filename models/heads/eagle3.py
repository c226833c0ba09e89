"""EAGLE-3 (2503.01840, section 3.1) as served: one layer over [embedding ; feature], features from three depths.

    h(t) = fc([tap_1 ; tap_2 ; tap_3] of the target at token t - 1)      or, for a draft node, its parent's s
    s(t) = layers( [input_layernorm(E(x_t)) ; hidden_norm(h(t))] )       residual: h(t), attention reads both
    logits = lm_head( norm(s(t)) )                                       over the draft vocabulary

Checkpoints differ in flags: ``norm_before_residual`` (the residual is hidden_norm(h)), ``norm_before_fc`` (a norm on
all taps together), ``fc_norm`` (one on each tap), ``norm_output`` (nodes take norm(s), not s). Files: eagle3_files.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import AttentionBackend
from models.batch import MAX_TREE, RaggedBatch
from models.config import ModelConfig
from models.decoder import DecoderLayer, LayerStack
from models.heads.eagle import embed
from models.heads.feature_model import Drafted, FeatureSource
from models.heads.head_files import layer_weights
from models.kv_cache import KVCache, KVSpec
from models.layers.linear import Linear, Packing
from models.layers.ops import LayerOps
from models.layers.rope import rope_table
from models.target import CausalModel


@dataclass(frozen=True)
class Eagle3Config:
    """What distinguishes one EAGLE-3 drafter from another."""

    layer: ModelConfig  # of the drafter's layers; num_layers is their number, vocab_size the target's
    taps: tuple[int, ...]  # ForwardOutput.taps, in the order in which fc takes them
    draft_vocab_size: int | None = None  # tokens that can be drafted; None: all
    target_hidden_size: int | None = None  # None: the layers' own
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    @property
    def num_drafted(self) -> int:
        """Rows of the head."""
        return self.draft_vocab_size or self.layer.vocab_size

    @property
    def tap_size(self) -> int:
        return self.target_hidden_size or self.layer.hidden_size

    @property
    def feature_size(self) -> int:
        return len(self.taps) * self.tap_size


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """The taps of the reference, for a target of that many layers."""
    return 2, num_layers // 2, num_layers - 3


class Eagle3Model:
    """A ``FeatureModel``. Fill ``weights()``, call ``pack()``, then run under inference mode.

    Args:
        token_ids: [Vd] the target's id of each entry of the draft vocabulary; None if it is the target's own.
        embedding: [V, H] if the drafter brings its own.
    """

    continues = False

    def __init__(
        self,
        config: Eagle3Config,
        target: CausalModel,
        ops: LayerOps,
        attention: AttentionBackend,
        token_ids: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> None:
        layer, device, dtype = config.layer, target.device, target.dtype
        hidden = layer.hidden_size
        self.config = config
        self.source = FeatureSource(config.taps)
        self.feature_size, self.carry_size = config.feature_size, hidden
        self.kv_spec = KVSpec(layer.num_layers, layer.num_kv_heads, layer.head_dim, layer.head_dim)
        self.max_positions = target.max_model_len
        self.token_ids = token_ids
        self.dtype, self.device = dtype, device

        def norm(size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype)

        self.taps_norm = norm(config.feature_size) if config.norm_before_fc else None
        self.tap_norms = [norm(config.tap_size) for _ in config.taps] if config.fc_norm else []
        self.fc = Linear(config.feature_size, hidden, False, device, dtype)
        self.embedding_norm, self.hidden_norm, self.final_norm = norm(hidden), norm(hidden), norm(hidden)
        first = DecoderLayer(layer, 0, device, dtype, inputs=2 * hidden, input_norm=False, first_key=1)
        others = [DecoderLayer(layer, index, device, dtype, first_key=1) for index in range(1, layer.num_layers)]
        self.layers = [first, *others]
        self.head = Linear(hidden, config.num_drafted, False, device, dtype)
        rope = rope_table(layer.rope, self.max_positions, self.max_positions + MAX_TREE, device, dtype)
        self._stack = LayerStack(self.layers, self.final_norm, rope, ops, attention)
        self._target = target
        self._embedding = embedding
        self._ops = ops

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        """See ``FeatureModel.catch_up``."""
        eps = self.config.layer.norm_eps
        if self.taps_norm is not None:
            features = self._ops.rms_norm(features, self.taps_norm, eps)
        if self.tap_norms:
            parts = torch.split(features, self.config.tap_size, dim=1)
            normed = [self._ops.rms_norm(part, w, eps) for part, w in zip(parts, self.tap_norms, strict=True)]
            features = torch.cat(normed, dim=1)
        return self._run(batch, self.fc(features), cache)

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        """See ``FeatureModel.extend``."""
        # the stack may reuse the memory of the stream that it is given
        return self._run(batch, carry if self.config.norm_before_residual else carry.clone(), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``FeatureModel.logits``."""
        logits = self.head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def weights(self) -> dict[str, Tensor]:
        """Every weight by its name in speculators' files, to be filled before ``pack``."""
        assert self.fc.weight is not None
        assert self.head.weight is not None
        named = {
            "fc.weight": self.fc.weight,
            "norm.weight": self.final_norm,
            "lm_head.weight": self.head.weight,
            "layers.0.input_layernorm.weight": self.embedding_norm,
            "layers.0.hidden_norm.weight": self.hidden_norm,
        }
        if self.taps_norm is not None:
            named["input_norm.weight"] = self.taps_norm
        named |= {f"fc_norm.{index}.weight": weight for index, weight in enumerate(self.tap_norms)}
        for index, layer in enumerate(self.layers):
            named |= layer_weights(layer, index)
        return named

    def pack(self, packing: Packing | None = None) -> None:
        """Pack the filled weights (``Linear.pack``); ``weights`` is not available afterwards where that happened."""
        self.fc.pack(packing)
        self.head.pack(packing)
        self._stack.pack(packing)

    def _run(self, batch: RaggedBatch, stream: Tensor, cache: KVCache) -> Drafted:
        ops, eps = self._ops, self.config.layer.norm_eps
        embedded = ops.rms_norm(embed(batch.token_ids, self._embedding, self._target), self.embedding_norm, eps)
        normed = ops.rms_norm(stream, self.hidden_norm, eps)
        residual = normed if self.config.norm_before_residual else stream
        joined = torch.cat([embedded, normed], dim=1)
        hidden, stream, _ = self._stack.run(residual, batch, cache, hidden=joined)
        return Drafted(hidden, hidden if self.config.norm_output else stream)
