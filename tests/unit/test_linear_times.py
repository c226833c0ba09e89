"""The times of linear layers by themselves: which layers are run, and how often."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.linear_times import linear_times, medians, read_bandwidth, read_shape, shape_times
from models.attention import load_backend
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers.ops import load_ops
from models.layers.rope import RopeConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=24,
    rope=RopeConfig(8),
    max_len=16,
)


def test_every_layer_runs_once_a_turn() -> None:
    dtype = torch.float32
    model = Decoder(CONFIG, load_ops(CPU, dtype), load_backend("auto", CPU, dtype), CPU, dtype)
    seen: list[tuple[int, ...]] = []

    def packing(weight: Tensor, bias: Tensor | None) -> object:
        def product(x: Tensor) -> Tensor:
            seen.append((*x.shape, len(weight)))
            return x

        return product

    model.pack(packing)  # type: ignore[arg-type]
    times = linear_times(model, rows=(1, 5), repeats=2)
    assert set(times) == {1, 5}
    assert all(spent > 0 for spent in times.values())
    layer = [(32, 4 * 8), (16, 32), (32, 48), (24, 32)]
    assert seen == 3 * [(rows, *sizes) for rows in (1, 5) for sizes in [*3 * layer, (32, 40)]]  # with one to warm up


def test_medians_are_taken_in_turns() -> None:
    order: list[str] = []
    times = medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == 4 * ["a", "b"]
    assert set(times) == {"a", "b"}


def test_all_ways_of_one_shape() -> None:
    assert set(shape_times(64, 32, torch.float32, rows=1, repeats=1, weight_bytes=1 << 16)) == {
        "ours",
        "onednn",
        "F.linear",
    }
    assert read_shape("12x345") == (12, 345)


def test_reading_leaves_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    assert read_bandwidth(2, repeats=1, read=1 << 16) > 0
    assert torch.get_num_threads() == before
