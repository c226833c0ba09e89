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
from models.kernels.fused_stack import FusedStack, fuses
from models.kv_cache import KVCache, KVSpec
from models.layers.linear import Linear, Packing
from models.layers.ops import LayerOps
from models.layers.parallel import row_parallel, vocab_parallel
from models.layers.rope import rope_table
from models.parallel.ranks import ALONE, Ranks
from models.parallel.shards import part_of
from models.target import ForwardOutput, Trunk, check_exit


class DecoderLayer:
    """The weights of one block and its two halves. Weights are uninitialised until a loader fills them.

    Args:
        inputs: width of what the queries, keys and values are made of; default: the hidden size.
        input_norm: whether the block has a norm before its attention.
        first_key: see ``AttentionSpec``; entries of such a layer stand one slot behind their position.
        ranks: those that hold a part of the layer each; ``config`` is then of the part.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        inputs: int | None = None,
        input_norm: bool = True,
        first_key: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        heads, kv_heads, dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        window = config.window(index)
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
            # backends take a key's slot for its position: one too near where entries stand one behind
            window=None if window is None else window - min(first_key, 1),
            soft_cap=config.attention_soft_cap,
            first_key=first_key,
        )

        def norm(size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype)

        self.input_norm = norm(hidden) if input_norm else None
        self.mlp_norm = norm(hidden)
        self.q_norm = norm(dim) if config.qk_norm else None
        self.k_norm = norm(dim) if config.qk_norm else None
        self.qkv = Linear(inputs or hidden, self.num_layer_heads * dim, config.qkv_bias, device, dtype)
        self.o = row_parallel(heads * dim, hidden, config.o_bias, device, dtype, ranks)
        self.gate_up = Linear(hidden, 2 * config.mlp_size, config.mlp_bias, device, dtype)
        self.down = row_parallel(config.mlp_size, hidden, config.mlp_bias, device, dtype, ranks)

    def attend(
        self,
        normed: Tensor,  # [T, H] (or ``inputs`` wide)
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

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, to be filled before ``pack``; parts of fused weights are views.

        Names: input_norm, mlp_norm, q_norm, k_norm, q, k, v, o, gate, up, down, each with ".weight" and, where it has
        one, ".bias".
        """
        named: dict[str, Tensor] = {}
        for name in ("input_norm", "mlp_norm", "q_norm", "k_norm"):
            if getattr(self, name) is not None:
                named[f"{name}.weight"] = getattr(self, name)
        for name, linear in self.linears().items():
            for kind, fused in (("weight", linear.weight), ("bias", linear.bias)):
                if fused is not None:
                    named |= {f"{part}.{kind}": view for part, view in self._parts(name, fused).items()}
        return named

    def pack(self, packing: Packing | None = None) -> None:
        """See ``Linear.pack``."""
        for linear in self.linears().values():
            linear.pack(packing)

    def linears(self) -> dict[str, Linear]:
        """The products by name: qkv, o, gate_up, down."""
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}

    def _parts(self, name: str, fused: Tensor) -> dict[str, Tensor]:
        """The views of a fused weight or bias that checkpoints store one by one."""
        heads, kv_heads, mlp = self.spec.num_heads, self.spec.num_kv_heads, self.down.inputs
        parts = {
            "qkv": {"q": heads * self.head_dim, "k": kv_heads * self.head_dim, "v": kv_heads * self.head_dim},
            "gate_up": {"gate": mlp, "up": mlp},
        }.get(name, {name: fused.shape[0]})
        return dict(zip(parts, torch.split(fused, list(parts.values())), strict=True))


class LayerStack:
    """Layers that run one after another over one residual stream.

    Args:
        final_norm: [H] the norm after the last layer; None if it has none.
        rope: see ``rope_table``.
        first: the first layer's number in the cache.
    """

    def __init__(
        self,
        layers: list[DecoderLayer],
        final_norm: Tensor | None,
        rope: Tensor,
        ops: LayerOps,
        attention: AttentionBackend,
        first: int = 0,
    ) -> None:
        self.layers = layers
        self._final_norm = final_norm
        self._rope = rope
        self._ops = ops
        self._attention = attention
        self._first = first
        # the norm that follows each layer's MLP is the next layer's first, or the final one
        self._next_norms = [*(layer.input_norm for layer in layers[1:]), final_norm]
        self._fused: FusedStack | None = None

    def pack(self, packing: Packing | None = None) -> None:
        """Pack the filled layers (``Linear.pack``), and run them in one call from then on where that is possible."""
        for layer in self.layers:
            layer.pack(packing)
        if fuses(self.layers, self._ops, self._attention):
            self._fused = FusedStack(self.layers, self._final_norm, self._rope, self._first)

    def cut(self, layers: int) -> LayerStack:
        """The first ``layers`` layers and the final norm as a stack of their own, over the same weights and K/V."""
        stack = LayerStack(self.layers[:layers], self._final_norm, self._rope, self._ops, self._attention, self._first)
        if self._fused is not None:
            stack.pack()  # the weights are packed: it becomes one call, too
        return stack

    def run(
        self,
        stream: Tensor,
        batch: RaggedBatch,
        cache: KVCache,
        taps: tuple[int, ...] = (),
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """All layers.

        Args:
            stream: [T, H] the residual stream that enters the first layer; its memory may be reused.
            taps: layers whose incoming stream is kept, from 1 on; the number of layers is what leaves the last.
            hidden: [T, I] what the first layer's attention reads; default: the stream, normed if the layer has a norm.
        Returns:
            the stream after the last layer, normed (as it is, without a final norm), and not, both [T, H]; the taps.
        """
        if self._fused is not None:
            return self._fused.run(stream, batch, cache, taps, hidden)
        return self.run_each(stream, batch, cache, taps, hidden)

    def run_each(
        self, stream: Tensor, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...], hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """``run``, operation by operation: what the fused stack must equal to the bit."""
        ops, attention, rope = self._ops, self._attention, self._rope
        kept: dict[int, Tensor] = {}
        if hidden is None:
            norm, eps = self.layers[0].input_norm, self.layers[0].eps
            hidden = stream if norm is None else ops.rms_norm(stream, norm, eps)
        for index, layer in enumerate(self.layers):
            attended = layer.attend(hidden, batch, cache.layer(self._first + index), rope, ops, attention)
            hidden, stream = ops.add_rms_norm(attended, stream, layer.mlp_norm, layer.eps)
            norm = self._next_norms[index]
            if norm is None:
                hidden = stream = stream + layer.mlp(hidden, ops)
            else:
                hidden, stream = ops.add_rms_norm(layer.mlp(hidden, ops), stream, norm, layer.eps)
            if index + 1 in taps:
                kept[index + 1] = stream.clone()  # the next layer may reuse its memory
        return hidden, stream, kept


class Decoder:
    """A ``CausalModel`` (models/target.py). Fill ``weights()``, call ``pack()``, then run under inference mode.

    Args:
        ranks: those that share the model. Each has a ``Decoder`` with its part of the weights and of the K/V, and all
            must make the same calls; hidden states are whole in every rank, logits at rank 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: LayerOps,
        attention: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_layers = config.num_layers
        self.max_model_len = config.max_len
        part = part_of(config, ranks.size)
        self.kv_spec = KVSpec(config.num_layers, part.num_kv_heads, config.head_dim, config.head_dim, ranks.size)
        self.dtype = dtype
        self.device = device
        # draft nodes may lie past the last position of a text
        rope = rope_table(config.rope, config.max_len, config.max_len + MAX_TREE, device, dtype)
        self.layers = [DecoderLayer(part, index, device, dtype, ranks=ranks) for index in range(config.num_layers)]
        self.final_norm = torch.empty(config.hidden_size, device=device, dtype=dtype)
        self.head = vocab_parallel(config.hidden_size, config.vocab_size, device, dtype, ranks)
        assert self.head.weight is not None
        self.embedding = self.head.weight  # [V, H]; tied: it stays for the lookup when the head packs a copy
        if not config.tied or ranks.size > 1:
            self.embedding = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        if config.tied:
            own = ranks.share(config.vocab_size)
            self.head.weight = self.embedding[own.start : own.stop]
        self._stack = LayerStack(self.layers, self.final_norm, rope, ops, attention)

    def new_cache(self, num_pages: int) -> KVCache:
        """See ``CausalModel.new_cache``."""
        return KVCache(self.kv_spec, num_pages, self.dtype, self.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """See ``CausalModel.embed``."""
        return torch.embedding(self.embedding, token_ids)

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        """See ``CausalModel.forward``."""
        stream = torch.embedding(self.embedding, batch.token_ids)  # [T, H] the residual stream
        entering = {0: stream.clone()} if 0 in taps else {}
        hidden, _, kept = self._stack.run(stream, batch, cache, tuple(tap for tap in taps if tap))
        return ForwardOutput(hidden, entering | kept)

    @property
    def layer_size(self) -> int:
        """See ``ExitingModel``."""
        config = self.config
        heads = 2 * config.num_heads + 2 * config.num_kv_heads  # of query and output, of key and value
        return config.hidden_size * (heads * config.head_dim + 3 * config.mlp_size)

    def exit_after(self, layers: int) -> Trunk:
        """See ``ExitingModel.exit_after``."""
        check_exit(layers, self.num_layers)
        stack = self._stack.cut(layers)

        def run(batch: RaggedBatch, cache: KVCache) -> Tensor:
            return stack.run(torch.embedding(self.embedding, batch.token_ids), batch, cache)[0]

        return run

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel.logits``."""
        logits = self.head(hidden)
        if logits.dtype != torch.float64:
            logits = logits.float()
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, to be filled before ``pack``; parts of fused weights (q, k, v, gate, up) are views.

        Names: "embed.weight", "norm.weight", "head.weight" (untied), and those of ``DecoderLayer.weights`` as
        "layers.0.q.weight".
        """
        assert self.head.weight is not None
        named = {"embed.weight": self.embedding, "norm.weight": self.final_norm}
        if not self.config.tied:
            named["head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            named |= {f"layers.{index}.{name}": weight for name, weight in layer.weights().items()}
        return named

    def pack(self, packing: Packing | None = None) -> None:
        """Pack the filled weights (``Linear.pack``); ``weights`` is not available afterwards where that happened."""
        self._stack.pack(packing)
        self.head.pack(packing)
