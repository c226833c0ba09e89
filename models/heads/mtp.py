"""Multi-token prediction by sequential modules (DeepSeek-V3, 2412.19437, eq. 21 to 23), served.

Module k = 1 .. K at slot t joins the embedding of token t with what module k - 1 gave at slot t - 1 (module 1: the
target's hidden state of token t - 1), runs one decoder layer with K/V of its own, and predicts token t + 1:

    h(k, t) = layer_k( proj_k( [ enorm_k(E(x_t)) ; hnorm_k(h(k - 1, t - 1)) ] ) )
    logits  = head( norm_k( h(k, t) ) )

Its first entry stands at slot k. A draft node d below the root cannot have module 1 .. d: their chains begin with
hidden states that the target has not computed. The modules above d can be computed as trained, and all of them are,
since deeper nodes attend to their K/V; module d + 1 predicts the node's children. From depth K on the last module runs
on its own output ("recursion"), which is all there is if K = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models.attention import AttentionBackend
from models.batch import MAX_TREE, RaggedBatch
from models.config import ModelConfig
from models.decoder import DecoderLayer, LayerStack
from models.heads.feature_model import Drafted, FeatureSource
from models.kv_cache import KVCache, KVSpec
from models.layers.linear import Linear, Packing
from models.layers.ops import LayerOps
from models.layers.rope import rope_table
from models.target import CausalModel

Side = Literal["post", "pre"]  # of a norm


@dataclass(frozen=True)
class MTPConfig:
    """One family's modules by flags. Embedding and head are the target's."""

    layer: ModelConfig  # of the modules' decoder layers; num_layers is K, vocab_size the target's
    hidden_first: bool = False  # the projection takes [hidden; embedding], as MiMo's does, not [embedding; hidden]
    feed: Side = "post"  # the target's hidden state as module 1 takes it: after the target's final norm, or before
    recycle: Side = "post"  # a module's output as the next takes it: after its own last norm, or before

    @property
    def num_modules(self) -> int:
        return self.layer.num_layers

    @classmethod
    def like(cls, target: ModelConfig, num_modules: int = 1) -> MTPConfig:
        """Modules of the target's own kind of layer, without windows: what new ones are trained as."""
        return cls(replace(target, num_layers=num_modules, windows=()))


class MTPModule:
    """One module's weights, uninitialised until a loader fills them."""

    def __init__(self, config: MTPConfig, index: int, device: torch.device, dtype: torch.dtype) -> None:
        hidden = config.layer.hidden_size
        self.layer = DecoderLayer(config.layer, index, device, dtype, first_key=index + 1)
        self.embedding_norm, self.hidden_norm, self.final_norm = (
            torch.empty(hidden, device=device, dtype=dtype) for _ in range(3)
        )
        self.proj = Linear(2 * hidden, hidden, False, device, dtype)
        self._hidden_first = config.hidden_first

    def join(self, embedded: Tensor, hidden: Tensor, ops: LayerOps) -> Tensor:
        """What enters the layer, of the tokens' embeddings and the hidden states before them; [T, H] each."""
        eps = self.layer.eps
        joined = [ops.rms_norm(embedded, self.embedding_norm, eps), ops.rms_norm(hidden, self.hidden_norm, eps)]
        return self.proj(torch.cat(joined[::-1] if self._hidden_first else joined, dim=1))

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name: those of ``DecoderLayer.weights`` and enorm, hnorm, proj, norm, with ".weight"."""
        assert self.proj.weight is not None
        return {
            "enorm.weight": self.embedding_norm,
            "hnorm.weight": self.hidden_norm,
            "proj.weight": self.proj.weight,
            "norm.weight": self.final_norm,
            **self.layer.weights(),
        }


class MTPModel:
    """A ``FeatureModel``. Fill ``weights()``, call ``pack()``. Nodes carry the outputs of all modules, K * H."""

    token_ids: Tensor | None = None

    def __init__(self, config: MTPConfig, target: CausalModel, ops: LayerOps, attention: AttentionBackend) -> None:
        layer, device, dtype = config.layer, target.device, target.dtype
        self.config = config
        self.source = FeatureSource(() if config.feed == "post" else (target.num_layers,))
        self.feature_size = layer.hidden_size
        self.carry_size = config.num_modules * layer.hidden_size
        self.continues = config.num_modules > 1
        self.kv_spec = KVSpec(config.num_modules, layer.num_kv_heads, layer.head_dim, layer.head_dim)
        self.max_positions = min(layer.max_len, target.max_model_len)
        self.dtype, self.device = dtype, device
        self.modules = [MTPModule(config, index, device, dtype) for index in range(config.num_modules)]
        rope = rope_table(layer.rope, self.max_positions, self.max_positions + MAX_TREE, device, dtype)
        self._stacks = [
            LayerStack([module.layer], module.final_norm, rope, ops, attention, first=index)
            for index, module in enumerate(self.modules)
        ]
        self._target = target
        self._ops = ops

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        """See ``FeatureModel.catch_up``: every module, each on the one before's outputs a token earlier."""
        first = batch.row_starts[:-1].long()
        embedded, hidden = self._target.embed(batch.token_ids), features
        carries: list[Tensor] = []
        predicting: Tensor | None = None
        for index in range(len(self.modules)):
            if carries:
                assert before is not None
                hidden = carries[-1].roll(1, dims=0)
                hidden[first] = self._part(before, index - 1)
            normed, carry = self._run(index, embedded, hidden, batch, cache)
            predicting = normed if predicting is None else predicting
            carries.append(carry)
        assert predicting is not None
        return Drafted(predicting, torch.cat(carries, dim=1))

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        """See ``FeatureModel.extend``: the modules that nodes of this depth can have."""
        embedded, last = self._target.embed(batch.token_ids), len(self.modules) - 1
        first = min(depth, last)
        carries = [self._part(carry, index) for index in range(first)]  # no descendant asks for them
        predicting: Tensor | None = None
        for index in range(first, last + 1):
            hidden = self._part(carry, index - 1 if depth <= last else last)
            normed, made = self._run(index, embedded, hidden, batch, cache)
            predicting = normed if predicting is None else predicting
            carries.append(made)
        assert predicting is not None
        return Drafted(predicting, torch.cat(carries, dim=1))

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``FeatureModel.logits``."""
        return self._target.logits(hidden)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, those of ``MTPModule.weights`` as "modules.0.proj.weight"."""
        return {
            f"modules.{index}.{name}": weight
            for index, module in enumerate(self.modules)
            for name, weight in module.weights().items()
        }

    def pack(self, packing: Packing | None = None) -> None:
        """Pack the filled weights (``Linear.pack``); ``weights`` is not available afterwards where that happened."""
        for module, stack in zip(self.modules, self._stacks, strict=True):
            module.proj.pack(packing)
            stack.pack(packing)

    def _run(
        self, index: int, embedded: Tensor, hidden: Tensor, batch: RaggedBatch, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """(what the head takes, what is recycled) of one module."""
        stream = self.modules[index].join(embedded, hidden, self._ops)
        normed, stream, _ = self._stacks[index].run(stream, batch, cache)
        return normed, normed if self.config.recycle == "post" else stream

    def _part(self, carry: Tensor, index: int) -> Tensor:
        """One module's [T, H] of carries [T, K * H]."""
        size = self.config.layer.hidden_size
        return carry[:, index * size : (index + 1) * size]
