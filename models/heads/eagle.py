"""EAGLE-1 (2401.15077, section 4.1) and EAGLE-2 (2406.16858), which drafts a dynamic tree with the same weights.

    u(t) = fc([E(x_t) ; f(t - 1)])        f(t - 1): what the target's LM head is fed at token t - 1
    f'(t) = layer(u)(t)                   the guess at f(t), and what a draft node's children take
    logits = the target's LM head of f'(t)

The layer has no norm before its attention, and there is none after it. Files are those of the reference: config.json
is a Llama model's with one layer, the embedding is the target's, and ``fc`` has a bias unless ``"bias": false``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionBackend, load_backend
from models.batch import MAX_TREE, RaggedBatch
from models.checkpoint import Checkpoint, CheckpointError, read_json
from models.config import ModelConfig
from models.decoder import DecoderLayer, LayerStack
from models.families import describe
from models.heads.feature_model import Drafted, FeatureSource
from models.heads.head_files import (
    biases_in,
    check_kind,
    check_target,
    fill_head,
    layer_config,
    layer_weights,
    own_embedding,
    write_head,
)
from models.kv_cache import KVCache, KVSpec
from models.layers.linear import Linear, Packing
from models.layers.ops import LayerOps, load_ops
from models.layers.rope import rope_table
from models.target import CausalModel

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class EagleConfig:
    """What distinguishes one EAGLE-1 drafter from another."""

    layer: ModelConfig  # hidden_size and vocab_size are the target's
    bias: bool = True  # of fc


class EagleModel:
    """A ``FeatureModel``. Fill ``weights()``, call ``pack()``, then run under inference mode.

    Args:
        embedding: [V, H] if the drafter brings its own.
    """

    source = FeatureSource()
    continues = False
    token_ids: Tensor | None = None

    def __init__(
        self,
        config: EagleConfig,
        target: CausalModel,
        ops: LayerOps,
        attention: AttentionBackend,
        embedding: Tensor | None = None,
    ) -> None:
        layer, device, dtype = config.layer, target.device, target.dtype
        self.feature_size = self.carry_size = layer.hidden_size
        self.kv_spec = KVSpec(layer.num_layers, layer.num_kv_heads, layer.head_dim, layer.head_dim)
        self.max_positions = target.max_model_len
        self.dtype, self.device = dtype, device
        self.fc = Linear(2 * layer.hidden_size, layer.hidden_size, config.bias, device, dtype)
        self.layers = [
            DecoderLayer(layer, index, device, dtype, input_norm=index > 0, first_key=1)
            for index in range(layer.num_layers)
        ]
        rope = rope_table(layer.rope, self.max_positions, self.max_positions + MAX_TREE, device, dtype)
        self._stack = LayerStack(self.layers, None, rope, ops, attention)
        self._target = target
        self._embedding = embedding

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        """See ``FeatureModel.catch_up``."""
        embedded = embed(batch.token_ids, self._embedding, self._target)
        stream = self.fc(torch.cat([embedded, features], dim=1))
        hidden, _, _ = self._stack.run(stream, batch, cache)
        return Drafted(hidden, hidden)

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        """See ``FeatureModel.extend``: guessed features take the place of the target's."""
        return self.catch_up(batch, carry, None, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``FeatureModel.logits``."""
        return self._target.logits(hidden)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by its name in the reference's files, to be filled before ``pack``."""
        assert self.fc.weight is not None
        named = {"fc.weight": self.fc.weight}
        if self.fc.bias is not None:
            named["fc.bias"] = self.fc.bias
        for index, layer in enumerate(self.layers):
            named |= layer_weights(layer, index)
        return named

    def pack(self, packing: Packing | None = None) -> None:
        """Pack the filled weights (``Linear.pack``); ``weights`` is not available afterwards where that happened."""
        self.fc.pack(packing)
        self._stack.pack(packing)


def embed(token_ids: Tensor, own: Tensor | None, target: CausalModel) -> Tensor:
    """[T] -> [T, H] by a drafter's own embedding [V, H], or the target's."""
    return target.embed(token_ids) if own is None else torch.embedding(own, token_ids)


def load_eagle(
    path: Path,
    target: CausalModel,
    *,
    attention: str = "auto",
    ops: LayerOps | None = None,
    packing: Packing | None = None,
) -> EagleModel:
    """Load a folder in the reference's layout: config.json with pytorch_model.bin or safetensors.

    Args:
        packing: see ``Linear.pack``.

    Raises:
        CheckpointError: no EAGLE-1 drafter, one for another target, or files that are damaged or do not fit; the
            message names cause and fix.
    """
    stated = read_json(path / "config.json")
    check_kind("eagle", stated, path)
    checkpoint = Checkpoint.open(path)
    names = {name: name for name in checkpoint.shapes if not name.endswith("rotary_emb.inv_freq")}
    if "fc.weight" not in names:
        raise CheckpointError(
            f"{path} is no EAGLE-1 drafter: it has no fc.weight. Give the folder of one; a complete small model drafts "
            "with --speculate draft=PATH"
        )
    config = read_eagle_config(stated, names, path)
    check_target(config.layer, config.layer.hidden_size, target, path)
    embedding = own_embedding(checkpoint, EMBEDDING, target, path)
    model = EagleModel(
        config,
        target,
        ops or load_ops(target.device, target.dtype),
        load_backend(attention, target.device, target.dtype),
        embedding,
    )
    names.pop(EMBEDDING, None)
    fill_head(model.weights(), checkpoint, names, path)
    model.pack(packing)
    return model


def read_eagle_config(stated: Mapping[str, Any], names: Mapping[str, str], path: Path) -> EagleConfig:
    """Make a config of a config.json and the names of the weights beside it.

    Raises:
        CheckpointError: a key that is missing or cannot be used.
    """
    return EagleConfig(biases_in(names, layer_config(stated, path)), bool(stated.get("bias", True)))


def write_eagle(folder: Path, config: EagleConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a drafter as the reference does, but in safetensors.

    Args:
        tensors: by the names of ``EagleModel.weights``, in the dtype in which they are to be stored; with
            "embed_tokens.weight" the drafter brings its own embedding.

    Raises:
        ValueError: a layer that config.json cannot describe.
        OSError: the folder cannot be written to; what was there stays.
    """
    described = {**describe(config.layer), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    described |= {"bias": config.bias, "qkv_bias": config.layer.qkv_bias}
    write_head(folder, described, tensors)
