"""A stack of decoder layers in one call (layer_stack.cpp), where everything it is made of is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.attention import AttentionBackend
from models.attention.cpu import CpuAttention
from models.batch import RaggedBatch
from models.kernels.cpu_ops import ACTIVATIONS, CpuOps
from models.kv_cache import KVCache
from models.layers.int8 import Int8Product
from models.layers.linear import Linear, PackedProduct
from models.layers.ops import LayerOps

if TYPE_CHECKING:
    from models.decoder import DecoderLayer

PRODUCTS = (PackedProduct, Int8Product)  # those that layer_stack.h knows


class FusedStack:
    """What ``LayerStack.run`` does, with the same bits. Layers must be packed, and ``fuses`` for them.

    Args:
        first: the first layer's number in the cache.
    """

    def __init__(self, layers: Sequence[DecoderLayer], final_norm: Tensor | None, rope: Tensor, first: int) -> None:
        spec, layer = layers[0].spec, layers[0]
        sizes = [spec.num_heads, spec.num_kv_heads, spec.key_dim, layer.o.outputs, layer.down.inputs]
        activation = ACTIVATIONS[layer.activation]
        self._stack = torch.classes.saccade.LayerStack(
            rope, final_norm, sizes, activation, spec.first_key, layer.eps, spec.scale, spec.soft_cap or 0.0
        )
        for layer in layers:
            self._stack.add_layer(packed_weights(layer), layer.qkv.inputs, layer.spec.window or 0)
        # the overload itself looks through all arguments for fake objects first, some ten microseconds a call
        self._run = torch.ops.saccade.run_layers.default._op
        self._has_norm = final_norm is not None
        self._first = first

    def run(
        self, stream: Tensor, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...], hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """See ``LayerStack.run``; the stream that leaves the last layer overwrites ``stream``."""
        out = torch.empty_like(stream) if self._has_norm else stream
        kept = self._run(
            self._stack,
            hidden,
            stream,
            out,
            batch.positions,
            batch.slots,
            batch.visible,
            batch.tree_mask,
            batch.row_starts,
            batch.tree_base,
            batch.page_table,
            cache.keys,
            cache.values,
            self._first,
            taps,
        )
        return out, stream, dict(zip(taps, kept, strict=True))


def fuses(layers: Sequence[DecoderLayer], ops: LayerOps, attention: AttentionBackend) -> bool:
    """Whether these layers, packed, can be a ``FusedStack``."""
    if not isinstance(ops, CpuOps) or not isinstance(attention, CpuAttention):
        return False
    linears = [linear for layer in layers for linear in layer.linears().values()]
    # a sum over ranks cannot happen within the call
    packed = all(type(linear) is Linear and isinstance(linear.product, PRODUCTS) for linear in linears)
    return packed and len({_shape(layer) for layer in layers}) == 1


def packed_weights(layer: DecoderLayer) -> dict[str, Tensor]:
    """By the names that layer_stack.h knows."""
    norms = {name: getattr(layer, name) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm")}
    named = {f"{name}.weight": norm for name, norm in norms.items() if norm is not None}
    for name, linear in layer.linears().items():
        assert isinstance(linear.product, PRODUCTS)
        named |= {f"{name}.{kind}": part for kind, part in linear.product.parts().items()}
    return named


def _shape(layer: DecoderLayer) -> tuple[object, ...]:
    """What all layers of a fused stack must have in common: all but windows and what the attention reads."""
    sizes = layer.o.outputs, layer.down.inputs, layer.activation, layer.eps
    return *sizes, replace(layer.spec, window=None)
