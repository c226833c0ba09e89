"""One dense decoder for Llama, Mistral, Qwen2 and Qwen3: pre-norm blocks of grouped-query attention and a gated MLP.

Input is packed and ragged; queries, keys and values come from one product, gate and up from another. The forward is
written for small models too, where a step is bound by the number of calls: no modules, nothing looked up or reshaped
that can be fixed at load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention import AttentionBackend, AttentionSpec
from models.batch import MAX_TREE, RaggedBatch
from models.config import ModelConfig
from models.kv_cache import KVCache, KVSpec
from models.layers.linear import Linear
from models.layers.ops import LayerOps
from models.layers.rope import rope_table
from models.target import ForwardOutput


class DecoderLayer:
    """The weights of one block and its two halves. Weights are uninitialised until a loader fills them."""

    def __init__(self, config: ModelConfig, index: int, device: torch.device, dtype: torch.dtype) -> None:
        heads, kv_heads, dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.num_layer_heads = heads + 2 * kv_heads
        self.splits = (heads, heads + kv_heads)  # where keys and values begin
        self.head_dim = dim
        self.eps = config.norm_eps
        self.activation = config.activation
        self.spec = AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            key_dim=dim,
            value_dim=dim,
            scale=config.attention_scale or dim**-0.5,
            window=config.window(index),
            soft_cap=config.attention_soft_cap,
        )

        def norm(size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype)

        self.input_norm, self.mlp_norm = norm(hidden), norm(hidden)
        self.q_norm = norm(dim) if config.qk_norm else None
        self.k_norm = norm(dim) if config.qk_norm else None
        self.qkv = Linear(hidden, self.num_layer_heads * dim, config.qkv_bias, device, dtype)
        self.o = Linear(heads * dim, hidden, config.o_bias, device, dtype)
        self.gate_up = Linear(hidden, 2 * config.mlp_size, config.mlp_bias, device, dtype)
        self.down = Linear(config.mlp_size, hidden, config.mlp_bias, device, dtype)

    def attend(
        self,
        normed: Tensor,  # [T, H]
        batch: RaggedBatch,
        slots: tuple[Tensor, Tensor],  # this layer's keys [S, Hkv, D] and values [S, Hkv, D]
        rope: Tensor,
        ops: LayerOps,
        attention: AttentionBackend,
    ) -> Tensor:  # [T, H]
        """Attention over the cache, the batch's own K/V stored first."""
        keys, values = slots
        heads = self.qkv(normed).view(-1, self.num_layer_heads, self.head_dim)
        query, key, value = heads.tensor_split(self.splits, 1)  # half the price of split
        if self.q_norm is not None and self.k_norm is not None:
            query = ops.rms_norm(query, self.q_norm, self.eps)
            key = ops.rms_norm(key, self.k_norm, self.eps)
        query = ops.rotate_and_store(query, key, value, rope, batch.positions, batch.slots, keys, values)
        return self.o(attention(query, keys, values, batch, self.spec).flatten(1))

    def mlp(self, normed: Tensor, ops: LayerOps) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(ops.gated(self.gate_up(normed), self.activation))

    def linears(self) -> dict[str, Linear]:
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}


class Decoder:
    """A ``CausalModel`` (models/target.py). Fill ``weights()``, call ``pack()``, then run under inference mode."""

    def __init__(
        self,
        config: ModelConfig,
        ops: LayerOps,
        attention: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_layers = config.num_layers
        self.max_model_len = config.max_len
        self.kv_spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, config.head_dim)
        self.dtype = dtype
        self.device = device
        self._ops = ops
        self._attention = attention
        # draft nodes may lie past the last position of a text
        self._rope = rope_table(config.rope, config.max_len, config.max_len + MAX_TREE, device, dtype)
        self.layers = [DecoderLayer(config, index, device, dtype) for index in range(config.num_layers)]
        self.final_norm = torch.empty(config.hidden_size, device=device, dtype=dtype)
        self.head = Linear(config.hidden_size, config.vocab_size, False, device, dtype)
        assert self.head.weight is not None
        # [V, H]; tied: the head's weight itself, which stays for the lookup when the head packs a copy
        self.embedding = self.head.weight if config.tied else torch.empty_like(self.head.weight)
        # the norm that follows each layer's MLP is the next layer's first, or the final one
        self._next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.final_norm]

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        """See ``CausalModel.forward``."""
        ops, attention, rope, eps = self._ops, self._attention, self._rope, self.config.norm_eps
        stream = torch.embedding(self.embedding, batch.token_ids)  # [T, H] the residual stream
        kept = {0: stream.clone()} if 0 in taps else {}
        hidden = ops.rms_norm(stream, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            attended = layer.attend(hidden, batch, cache.layer(index), rope, ops, attention)
            hidden, stream = ops.add_rms_norm(attended, stream, layer.mlp_norm, eps)
            hidden, stream = ops.add_rms_norm(layer.mlp(hidden, ops), stream, self._next_norms[index], eps)
            if taps and index + 1 in taps:
                kept[index + 1] = stream.clone()  # the next layer may reuse its memory
        return ForwardOutput(hidden, kept)

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel.logits``."""
        logits = self.head(hidden)
        if logits.dtype != torch.float64:
            logits = logits.float()
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, to be filled before ``pack``; parts of fused weights (q, k, v, gate, up) are views.

        Names: "embed.weight", "norm.weight", "head.weight" (untied), and of each layer "layers.0.input_norm.weight",
        mlp_norm, q_norm, k_norm, q, k, v, o, gate, up, down, each with ".weight" and where it has one ".bias".
        """
        assert self.head.weight is not None
        named = {"embed.weight": self.embedding, "norm.weight": self.final_norm}
        if not self.config.tied:
            named["head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            for name in ("input_norm", "mlp_norm", "q_norm", "k_norm"):
                if getattr(layer, name) is not None:
                    named[f"layers.{index}.{name}.weight"] = getattr(layer, name)
            for name, linear in layer.linears().items():
                for kind, fused in (("weight", linear.weight), ("bias", linear.bias)):
                    if fused is not None:
                        parts = self._parts(name, fused)
                        named |= {f"layers.{index}.{part}.{kind}": view for part, view in parts.items()}
        return named

    def _parts(self, name: str, fused: Tensor) -> dict[str, Tensor]:
        """The views of a fused weight or bias that checkpoints store one by one."""
        config = self.config
        kv = config.num_kv_heads * config.head_dim
        parts = {
            "qkv": {"q": config.num_heads * config.head_dim, "k": kv, "v": kv},
            "gate_up": {"gate": config.mlp_size, "up": config.mlp_size},
        }.get(name, {name: fused.shape[0]})
        return dict(zip(parts, torch.split(fused, list(parts.values())), strict=True))

    def pack(self) -> None:
        """Reorder the filled weights for the device; ``weights`` is not available afterwards where that happened."""
        for layer in self.layers:
            for linear in layer.linears().values():
                linear.pack()
        self.head.pack()
