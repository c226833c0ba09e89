"""Multi-token prediction by parallel heads (Meta, 2404.19737, section 2), served.

Head i = 1 .. n is a decoder layer over the residual stream z that enters the target's last layer, with K/V of its own;
the target's final norm and head follow. At token t - 1 it predicts token t + i: with the root at slot t, the nodes of
depth i, whatever stands above them. So one pass guesses all depths, and a "pass" over drafted nodes only looks up.
In slots: the entry at slot t is made of z of token t - 1 alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.attention import AttentionBackend
from models.batch import MAX_TREE, RaggedBatch
from models.checkpoint import CheckpointError
from models.config import ModelConfig
from models.decoder import DecoderLayer, LayerStack
from models.families import LLAMA_NAMES, NATIVE_FAMILIES
from models.heads.feature_model import Drafted, FeatureSource
from models.heads.head_files import fill_head
from models.kv_cache import KVCache, KVSpec
from models.layers.linear import Packing
from models.layers.ops import LayerOps
from models.layers.rope import rope_table
from models.meta_checkpoint import meta_config, open_meta
from models.target import CausalModel


class ParallelHeads:
    """A ``FeatureModel`` for ``num_heads`` depths. Fill ``weights()``, call ``pack()``. Nodes carry all heads' outputs.

    Args:
        config: of the heads' layers; num_layers is their number.
    """

    token_ids: Tensor | None = None
    continues = False

    def __init__(self, config: ModelConfig, target: CausalModel, ops: LayerOps, attention: AttentionBackend) -> None:
        device, dtype = target.device, target.dtype
        self.num_heads = config.num_layers
        self.source = FeatureSource((target.num_layers - 1,))
        self.feature_size = config.hidden_size
        self.carry_size = config.num_layers * config.hidden_size
        self.kv_spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, config.head_dim)
        self.max_positions = min(config.max_len, target.max_model_len)
        self.dtype, self.device = dtype, device
        self.layers = [DecoderLayer(config, index, device, dtype, first_key=1) for index in range(config.num_layers)]
        self.final_norm = torch.empty(config.hidden_size, device=device, dtype=dtype)
        rope = rope_table(config.rope, self.max_positions, self.max_positions + MAX_TREE, device, dtype)
        self._stacks = [
            LayerStack([layer], self.final_norm, rope, ops, attention, first=index)
            for index, layer in enumerate(self.layers)
        ]
        self._target = target

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        """See ``FeatureModel.catch_up``."""
        # copies, since a stack may reuse the memory of its stream
        carry = torch.cat([stack.run(features.clone(), batch, cache)[0] for stack in self._stacks], dim=1)
        return Drafted(self.of_depth(carry, 1), carry)

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        """See ``FeatureModel.extend``; ``depth`` is below the number of heads."""
        return Drafted(self.of_depth(carry, depth + 1), carry)

    def of_depth(self, carry: Tensor, depth: int) -> Tensor:
        """[T, H], what ``logits`` takes for nodes of ``depth`` = 1 .. num_heads, from carries [T, C] of the roots."""
        return carry[:, (depth - 1) * self.feature_size : depth * self.feature_size].contiguous()

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``FeatureModel.logits``."""
        return self._target.logits(hidden)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name: "norm.weight", and those of ``DecoderLayer.weights`` as "layers.0.q.weight"."""
        named = {"norm.weight": self.final_norm}
        for index, layer in enumerate(self.layers):
            named |= {f"layers.{index}.{name}": weight for name, weight in layer.weights().items()}
        return named

    def pack(self, packing: Packing | None = None) -> None:
        """Pack the filled weights (``Linear.pack``); ``weights`` is not available afterwards where that happened."""
        for stack in self._stacks:
            stack.pack(packing)


def load_parallel_heads(
    folder: Path, target: CausalModel, ops: LayerOps, attention: AttentionBackend, packing: Packing | None = None
) -> ParallelHeads:
    """The heads of a checkpoint in Meta's layout (facebook/multi-token-prediction), ready to draft for its trunk.

    Args:
        packing: see ``Linear.pack``.

    Raises:
        CheckpointError: no extra heads, heads for another target, weights that are missing or whose shape is wrong, a
            damaged file, a pickle with code in it.
    """
    checkpoint, hf = open_meta(folder), meta_config(folder)
    numbers = {name.split(".")[1] for name in checkpoint.shapes if name.startswith("extra_heads.")}
    if not numbers:
        raise CheckpointError(
            f"{folder} has no weights called extra_heads.*: it predicts one token; use a checkpoint of the same "
            "model that was trained for several, such as 7B_1T_4"
        )
    trunk = NATIVE_FAMILIES["llama"].configure(hf)
    for what, ours, theirs in (
        ("layers", trunk.num_layers, target.num_layers),
        ("hidden states", trunk.hidden_size, target.hidden_size),
        ("tokens", trunk.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"the heads in {folder} belong to a model of {ours} {what}, and this target has {theirs}; serve the "
                "model in that folder, or its conversion"
            )
    model = ParallelHeads(replace(trunk, num_layers=len(numbers)), target, ops, attention)
    names = {"norm.weight": "model.norm.weight"}
    for name in model.weights().keys() - names.keys():
        _, index, part, kind = name.split(".")
        names[name] = f"{LLAMA_NAMES['layers.{}.' + part].format(index)}.{kind}".replace("model.layers", "extra_heads")
    known = set(names.values())
    names |= {name: name for name in checkpoint.shapes if name.startswith("extra_heads.") and name not in known}
    fill_head(model.weights(), checkpoint, names, folder)
    model.pack(packing)
    return model
