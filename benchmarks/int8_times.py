"""What products with int8 weights take on a CPU, beside those of bfloat16: ``python -m benchmarks.int8_times``.

Each measurement goes through enough different weights that none is in a cache when its turn comes, as in a step of a
large model. Medians of alternating runs: trust the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from decoding.command_line import StrictParser, whole_from
from models.layers.int8 import TorchaoProduct, int8_packing, quantize
from models.layers.linear import Product, exact_packing

WEIGHT_BYTES = 128 << 20  # of different weights in bfloat16 that one measurement goes through
CPU = torch.device("cpu")


def pytorchs_own(weight: Tensor) -> Product:
    """By PyTorch's kernel for few rows."""
    values, scale = quantize(weight)
    narrow = scale.flatten().to(weight.dtype)
    return lambda x: torch._weight_int8pack_mm(x, values, narrow)


def ways(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Product]]:
    """How weights are stored and multiplied, the default first."""
    exact, eight = exact_packing(CPU, dtype), int8_packing(CPU, dtype)
    assert exact is not None
    made: dict[str, Callable[[Tensor], Product]] = {
        str(dtype).removeprefix("torch."): lambda weight: exact(weight, None),
        "int8": lambda weight: eight(weight, None),
        "int8pack_mm": pytorchs_own,
        "torchao": lambda weight: TorchaoProduct(weight, None),
    }
    return made if dtype == torch.bfloat16 else {name: made[name] for name in list(made)[:2]}


def times(inputs: int, outputs: int, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Seconds of one product, by way."""
    copies = max(1, WEIGHT_BYTES // (2 * inputs * outputs))
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, inputs).to(dtype)
    products = {name: [make(weight) for weight in weights] for name, make in ways(dtype).items()}
    taken: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(repeats + 1):
        for name, each in products.items():
            some = each if name != "torchao" else each[:4]  # slow, and never from a cache
            started = time.perf_counter()
            for product in some:
                product(x)
            if turn:
                taken[name].append((time.perf_counter() - started) / len(some))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


@torch.inference_mode()
def main() -> None:
    """Print a line for each shape and number of rows."""
    parser: argparse.ArgumentParser = StrictParser(prog="benchmarks.int8_times", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "2048x8192"], help="inputs x outputs")
    parser.add_argument("--rows", nargs="+", type=whole_from(1), default=[1, 8, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=whole_from(1), default=9, help="turns (default: %(default)s)")
    options = parser.parse_args()
    print(f"microseconds of one product, {torch.get_num_threads()} threads")
    for name in options.dtypes:
        dtype = getattr(torch, name)
        print(f"{'':22} " + " ".join(f"{way:>12}" for way in ways(dtype)) + "   int8 is faster by")
        for shape in options.shapes:
            inputs, outputs = map(int, shape.split("x"))
            for rows in options.rows:
                found = times(inputs, outputs, rows, dtype, options.repeats)
                line = " ".join(f"{seconds * 1e6:12.0f}" for seconds in found.values())
                print(f"{shape:>12} {rows:4} rows {line} {found[name] / found['int8']:16.2f}", flush=True)


if __name__ == "__main__":
    main()
