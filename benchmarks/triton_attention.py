"""Times of the Triton attention kernel on a CUDA device, by the shape of its blocks, beside what reading the K/V takes.

    python -m benchmarks.triton_attention [--heads 32 --kv-heads 8 --dim 128]

One row with a context and a chain of query tokens (a tree costs the same reads). The bound is the bytes of the row's
K/V by the speed of a copy on the same device. Times are medians, the L2 cache flushed before each call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from models.attention import AttentionSpec
from models.attention.triton import Blocks, Spread, TritonAttention, blocks_for
from models.batch import PAGE_SIZE, RaggedBatch
from models.kernels.triton import shared_memory

DEVICE = torch.device("cuda")
CONTEXTS = (1024, 4096, 10_000)
QUERIES = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Setting:
    name: str
    blocks: Blocks
    split: int


def settings(spec: AttentionSpec, dtype: torch.dtype) -> Iterator[Setting]:
    """The blocks that are served with, and neighbours that compile without spilling much."""
    chosen = blocks_for(spec, dtype, shared_memory(DEVICE))
    for split in (256, 128, 512):
        yield Setting(f"chosen, split {split}", chosen, split)
    yield Setting("4 warps, 32 keys", replace(chosen, keys=32, num_warps=4), 256)
    yield Setting("8 warps, 32 keys", replace(chosen, keys=32, num_warps=8), 256)
    yield Setting("2 stages", replace(chosen, num_stages=2), 256)
    yield Setting("128 vectors", replace(chosen, vectors=128), 256)


def one_row(context: int, queries: int) -> RaggedBatch:
    """A chain of ``queries`` tokens after a context, in shuffled pages."""
    keys = context + queries
    pages = torch.randperm(-(-keys // PAGE_SIZE), device=DEVICE, dtype=torch.int32)
    index = torch.arange(context, keys, device=DEVICE)
    mask = torch.zeros(queries, dtype=torch.int64, device=DEVICE)
    mask[-1] = 1

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return RaggedBatch(
        token_ids=torch.zeros_like(index),
        positions=index,
        slots=pages.long()[index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE,
        visible=(index + 1).int(),
        tree_mask=mask,
        row_of=torch.zeros(queries, dtype=torch.int32, device=DEVICE),
        row_starts=ints(0, queries),
        tree_base=ints(keys - 1),
        page_table=pages[None],
        wanted=index - context,
        max_query=queries,
        max_keys=keys,
    )


def median_us(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) * 1000


def copy_bytes_per_us() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_us(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description="times of the Triton attention kernel, by the shape of its blocks")
    for name, default in (("--heads", 32), ("--kv-heads", 8), ("--dim", 128)):
        parser.add_argument(name, type=int, default=default)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    heads, kv_heads, dim, dtype = arguments.heads, arguments.kv_heads, arguments.dim, torch.bfloat16
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5)
    speed = copy_bytes_per_us()
    print(f"{torch.cuda.get_device_name()}, copy {speed / 1e6:.2f} TB/s; microseconds a layer")
    print(f"{'context':>8} {'bound':>6} {'setting':<18}" + "".join(f"{queries:>9}" for queries in QUERIES))
    for context in CONTEXTS:
        slots = (-(-(context + max(QUERIES)) // PAGE_SIZE)) * PAGE_SIZE
        keys, values = (torch.randn(slots, kv_heads, dim, device=DEVICE).to(dtype) for _ in range(2))
        bound = 2 * context * kv_heads * dim * dtype.itemsize / speed
        for setting in settings(spec, dtype):
            attend = TritonAttention(lambda *_, blocks=setting.blocks: blocks, Spread(split=setting.split))
            times = []
            for queries in QUERIES:
                batch, query = one_row(context, queries), torch.randn(queries, heads, dim, device=DEVICE).to(dtype)
                times.append(median_us(partial(attend, query, keys, values, batch, spec)))
            print(f"{context:>8} {bound:>6.1f} {setting.name:<18}" + "".join(f"{time:>9.1f}" for time in times))


if __name__ == "__main__":
    main()
