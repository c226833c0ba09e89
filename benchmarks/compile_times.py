"""Whether torch.compile makes a step on a CPU faster than our kernels do: ``python -m benchmarks.compile_times``.

The forward of a native decoder in plain PyTorch, weights frozen (so that inductor packs them for oneDNN), our attention
as an operation that the compiler does not look into, compiled for any number of tokens at once and for each number
apart; beside the forward that serves. Medians of alternating runs: trust the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
from torch import Tensor, nn

from benchmarks.forward_cost import ForcedTrees
from decoding.command_line import StrictParser, whole_from
from models.attention import AttentionSpec, load_backend
from models.batch import RaggedBatch
from models.config import ModelConfig
from models.decoder import Decoder, DecoderLayer
from models.kv_cache import KVCache
from models.layers.ops import TorchOps, load_ops
from models.layers.rope import RopeConfig, rope_table
from models.loader import load_model
from models.target import CausalModel, ForwardOutput

CPU = torch.device("cpu")
LARGE = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=20,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    mlp_size=3072,
    rope=RopeConfig(dim=64),
    max_len=512,
)


@torch.library.custom_op("saccade_bench::attend", mutates_args=("keys", "values"))
def attend_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: list[Tensor],
    scale: float,
) -> Tensor:
    """Store keys and values, and attend; opaque to the compiler."""
    _, positions, slots, visible, tree_mask, row_starts, tree_base, page_table = batch
    keys[slots], values[slots] = key, value
    places = (visible, tree_mask, positions, row_starts, tree_base, page_table)
    return torch.ops.saccade.attend(query, keys, values, *places, None, scale, None, None, 0)


@attend_op.register_fake
def _(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(query)


class Block(nn.Module):
    """A decoder layer in plain PyTorch, on the weights of one that is not packed."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        for name in ("qkv", "o", "gate_up", "down", "input_norm", "mlp_norm", "q_norm", "k_norm"):
            part = getattr(layer, name)
            weight = getattr(part, "weight", part)  # of a linear layer, or a norm's own
            self.register_parameter(name, None if weight is None else nn.Parameter(weight, requires_grad=False))
        self.layer_spec: AttentionSpec = layer.spec
        self.eps, self.activation, self.splits = layer.eps, layer.activation, layer.splits
        self.heads, self.head_dim = layer.num_layer_heads, layer.head_dim

    def forward(
        self, stream: Tensor, batch: list[Tensor], rope: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:  # [T, H]
        ops = TorchOps()
        normed = ops.rms_norm(stream, self.input_norm, self.eps)
        heads = nn.functional.linear(normed, self.qkv).view(-1, self.heads, self.head_dim)
        query, key, value = heads.tensor_split(self.splits, 1)
        if self.q_norm is not None:
            query, key = ops.rms_norm(query, self.q_norm, self.eps), ops.rms_norm(key, self.k_norm, self.eps)
        query, key = turn(query, batch[1], rope), turn(key, batch[1], rope)
        made = attend_op(query, key, value.contiguous(), keys, values, batch, self.layer_spec.scale)
        stream = stream + nn.functional.linear(made.flatten(1), self.o)
        normed = ops.rms_norm(stream, self.mlp_norm, self.eps)
        gated = ops.gated(nn.functional.linear(normed, self.gate_up), self.activation)
        return stream + nn.functional.linear(gated, self.down)


def turn(x: Tensor, positions: Tensor, rope: Tensor) -> Tensor:
    """RoPE over whole heads, [T, heads, D]."""
    cos, sin = rope[positions].unsqueeze(2).unbind(1)  # [T, 1, D / 2] each
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class PlainDecoder(nn.Module):
    """A decoder without biases in plain PyTorch: tokens in, logits out."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        config = decoder.config
        assert decoder.head.weight is not None
        self.blocks = nn.ModuleList(Block(layer) for layer in decoder.layers)
        self.embedding = nn.Parameter(decoder.embedding, requires_grad=False)
        self.head = nn.Parameter(decoder.head.weight, requires_grad=False)
        self.final_norm = nn.Parameter(decoder.final_norm, requires_grad=False)
        self.register_buffer("rope", rope_table(config.rope, config.max_len, config.max_len + 64, CPU, decoder.dtype))
        self.eps = config.norm_eps

    def forward(self, batch: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Tensor:
        stream = torch.embedding(self.embedding, batch[0])
        for index, block in enumerate(self.blocks):
            stream = block(stream, batch, self.rope, keys[index], values[index])
        return nn.functional.linear(TorchOps().rms_norm(stream, self.final_norm, self.eps), self.head).float()


class Compiled:
    """``PlainDecoder`` as a target. Logits are made in the forward, as the compiler likes it."""

    def __init__(self, decoder: Decoder, *, dynamic: bool) -> None:
        self.kv_spec, self.dtype, self.device = decoder.kv_spec, decoder.dtype, decoder.device
        self.vocab_size = decoder.vocab_size
        self._run = torch.compile(PlainDecoder(decoder).eval(), dynamic=dynamic)
        self._layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        """See ``CausalModel.forward``; what it calls hidden are the logits of all tokens."""
        if id(cache) not in self._layers:  # tensors of their own: views of one would be copied by the compiler
            views = [cache.layer(index) for index in range(cache.spec.num_layers)]
            self._layers[id(cache)] = [k.clone() for k, _ in views], [v.clone() for _, v in views]
        keys, values = self._layers[id(cache)]
        b = batch
        flat = [b.token_ids, b.positions, b.slots, b.visible, b.tree_mask, b.row_starts, b.tree_base, b.page_table]
        with torch.no_grad():
            return ForwardOutput(self._run(flat, keys, values))

    def logits(self, hidden: Tensor) -> Tensor:
        """Already made."""
        return hidden


def random_decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """Not packed."""
    torch.manual_seed(0)
    decoder = Decoder(config, load_ops(CPU, dtype), load_backend("auto", CPU, dtype), CPU, dtype)
    for weight in decoder.weights().values():
        weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)
    return decoder


def measure(name: str, decoder: Decoder, sizes: tuple[int, ...], rounds: int) -> None:
    """Print a line for each number of tokens: ours, compiled once, compiled for each; then the compile times."""
    trees: dict[str, ForcedTrees] = {}
    compile_seconds = {}
    for label, dynamic in (("dynamic", True), ("per size", False)):
        started = time.perf_counter()
        forced = ForcedTrees(_as_target(Compiled(decoder, dynamic=dynamic)), sizes, context=64)
        forced.seconds(1)  # every size once: all compiling happens here
        compile_seconds[label] = time.perf_counter() - started
        trees[label] = forced
    decoder.pack()
    trees["ours"] = ForcedTrees(decoder, sizes, context=64)
    times: dict[str, dict[int, list[float]]] = {label: {size: [] for size in sizes} for label in trees}
    for _ in range(rounds):
        for label, forced in trees.items():
            for size, seconds in forced.seconds(1).items():
                times[label][size] += seconds
    print(f"{name}, {str(decoder.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads")
    print("  tokens   ours ms   dynamic ms  x ours   per size ms  x ours")
    for size in sizes:
        ours, once, each = (1e3 * statistics.median(times[label][size]) for label in ("ours", "dynamic", "per size"))
        print(f"  {size:6} {ours:9.2f} {once:12.2f} {once / ours:7.2f} {each:13.2f} {each / ours:7.2f}")
    for label, seconds in compile_seconds.items():
        print(f"  compiling, {label}: {seconds:.0f} s", flush=True)


def _as_target(compiled: Any) -> CausalModel:
    target: CausalModel = compiled
    return target


def main() -> None:
    """Measure the demo's shape and a larger one."""
    parser: argparse.ArgumentParser = StrictParser(prog="benchmarks.compile_times", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/target"), help="whose shape is measured, too")
    parser.add_argument("--sizes", type=whole_from(1), nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=whole_from(1), default=15, help="(default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    inductor.freezing = True
    dynamo.recompile_limit = 64  # one for each size, model and way
    for name in options.dtypes:
        dtype, sizes = getattr(torch, name), tuple(options.sizes)
        target = load_model(options.model, dtype=name)
        assert isinstance(target, Decoder)
        measure(f"the shape of {options.model}", random_decoder(target.config, dtype), sizes, options.rounds)
        measure("1024 x 20 layers", random_decoder(LARGE, dtype), sizes, options.rounds)


if __name__ == "__main__":
    main()
