"""What linear layers take by themselves: ``python -m benchmarks.linear_times``.

For each shape and number of rows: our packed kernel, oneDNN on weights packed for it, and F.linear; then the rate at
which the machine reads memory, which bounds them all. Each measurement goes through enough different weights that none
is in a cache when its turn comes, as in a step of a large model. Medians of alternating runs.

``linear_times`` takes the layers of a loaded model instead: the sum that a step of it cannot undercut.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.command_line import StrictParser, whole_from
from models.decoder import Decoder
from models.layers.linear import Linear, OneDnnProduct, PackedProduct, Product

ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
SHAPES = ((1024, 2048), (1024, 1024), (1024, 6144), (3072, 1024), (256, 512), (704, 256))
Key = TypeVar("Key")

READ_BYTES = 512 << 20  # beyond every cache
WEIGHT_BYTES = 160 << 20  # of different weights that one measurement goes through


def read_bandwidth(threads: int, repeats: int = 15, read: int = READ_BYTES) -> float:
    """Bytes a second at which so many threads read memory, at their best: PyTorch's sum over ``read`` bytes.

    They lie on huge pages, if there are any, as packed weights do (models/kernels/weight_memory.h).
    """
    memory = mmap.mmap(-1, read)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return read / min(seconds(data.sum) for _ in range(repeats))
    finally:
        torch.set_num_threads(before)


def linear_times(target: Decoder, rows: Sequence[int] = ROWS, repeats: int = 15) -> dict[int, float]:
    """Seconds that all linear layers of a model, head included, take for so many rows: medians of alternating runs.

    They are called in the order of a step, each on its own weights, so caches are as they are in a step.
    """
    linears = [linear for layer in target.layers for linear in layer.linears().values()] + [target.head]

    def run_all(count: int) -> Callable[[], None]:
        inputs = {width: torch.randn(count, width).to(target.dtype) for width in {linear.inputs for linear in linears}}
        return lambda: in_a_row(linears, inputs)

    with torch.inference_mode():
        return medians({count: run_all(count) for count in rows}, repeats)


def in_a_row(linears: Sequence[Linear], inputs: Mapping[int, Tensor]) -> None:
    for linear in linears:
        linear(inputs[linear.inputs])


def shape_times(
    inputs: int, outputs: int, dtype: torch.dtype, rows: int, repeats: int, weight_bytes: int = WEIGHT_BYTES
) -> dict[str, float]:
    """Seconds of one product by each way, over so many bytes of different weights."""
    copies = max(1, weight_bytes // (inputs * outputs * dtype.itemsize))
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
    ways: dict[str, Callable[[Tensor], Product]] = {
        "ours": lambda weight: PackedProduct(weight, None),
        "onednn": lambda weight: OneDnnProduct(weight, None),
        "F.linear": lambda weight: lambda x: F.linear(x, weight),
    }
    x = torch.randn(rows, inputs).to(dtype)

    def run_all(products: list[Product]) -> Callable[[], object]:
        return lambda: [product(x) for product in products]

    runs = {name: run_all([make(weight) for weight in weights]) for name, make in ways.items()}
    return {name: total / copies for name, total in medians(runs, repeats).items()}


def medians(runs: Mapping[Key, Callable[[], object]], repeats: int) -> dict[Key, float]:
    """Median seconds of each, taken in turns after one turn to warm up."""
    taken: dict[Key, list[float]] = {key: [] for key in runs}
    for turn in range(repeats + 1):
        for key, run in runs.items():
            spent = seconds(run)
            if turn:
                taken[key].append(spent)
    return {key: statistics.median(times) for key, times in taken.items()}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def table_line(inputs: int, outputs: int, dtype: torch.dtype, rows: int, times: Mapping[str, float]) -> str:
    weight_bytes, ours = inputs * outputs * dtype.itemsize, times["ours"]
    each = "  ".join(f"{name} {spent * 1e6:8.1f} us" for name, spent in times.items())
    rates = f"{weight_bytes / ours / 1e9:6.1f} GB/s {2 * inputs * outputs * rows / ours / 1e9:7.0f} GFLOP/s"
    return f"{inputs:5} x {outputs:<5} {rows:4} rows  {each}  ours: {rates}, onednn takes {times['onednn'] / ours:.2f}x"


def read_shape(text: str) -> tuple[int, int]:
    """ "1024x4096" -> inputs, outputs."""
    inputs, outputs = text.split("x")
    return int(inputs), int(outputs)


def main() -> None:
    """See the module."""
    parser = StrictParser(prog="python -m benchmarks.linear_times", description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=read_shape, default=SHAPES, metavar="IxO", help="inputs x outputs")
    parser.add_argument("--rows", nargs="+", type=whole_from(1), default=ROWS, help="numbers of rows")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=whole_from(1), default=torch.get_num_threads())
    parser.add_argument("--repeats", type=whole_from(1), default=9, help="turns of which the median is taken")
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype: torch.dtype = getattr(torch, args.dtype)
    with torch.inference_mode():
        for inputs, outputs in args.shapes:
            for rows in args.rows:
                times = shape_times(inputs, outputs, dtype, rows, args.repeats)
                print(table_line(inputs, outputs, dtype, rows, times), flush=True)
    print(f"memory is read at {read_bandwidth(args.threads) / 1e9:.1f} GB/s by {args.threads} threads")


if __name__ == "__main__":
    main()
