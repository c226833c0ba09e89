"""A small batch through the kernels: does Triton work on this device, and does it compute what the definition says?"""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention import AttentionSpec
from models.attention.reference import attend
from models.attention.triton import Blocks, Spread, TritonAttention
from models.batch import PAGE_SIZE, RaggedBatch
from models.layers.ops import TorchOps
from models.layers.triton_ops import TritonOps

CONTEXT = 40
SPLIT = 64  # the row's keys lie in two splits
NODES = 32
BLOCKS = Blocks(vectors=64, keys=32, key_dim=16, value_dim=16, num_warps=4, num_stages=2)
TOLERANCE = 0.05  # a broken kernel is off by more, bfloat16 by less


def probe(device: torch.device, dtype: torch.dtype) -> None:
    """Run attention over one tree, its splits merged, and a norm.

    Raises:
        RuntimeError: a result is wrong. And whatever Triton, its compiler or the driver raises.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    spec = AttentionSpec(num_heads=2, num_kv_heads=1, key_dim=16, value_dim=16, scale=0.25)
    batch = _tree_batch(device)
    slots = int(batch.page_table.max() + 1) * PAGE_SIZE
    query, keys, values = random(batch.num_tokens, 2, 16), random(slots, 1, 16), random(slots, 1, 16)
    attended = TritonAttention(lambda *_: BLOCKS, Spread(split=SPLIT))(query, keys, values, batch, spec)
    _compare("attention", attended, attend(query, keys, values, batch, spec))
    x, residual, weight = random(3, 40), random(3, 40), random(40)
    expected = TorchOps().add_rms_norm(x, residual, weight, 1e-5)[0]
    _compare("the norm", TritonOps().add_rms_norm(x, residual, weight, 1e-5)[0], expected)


def _compare(what: str, result: Tensor, expected: Tensor) -> None:
    error = float((result - expected).abs().max())
    if not error <= TOLERANCE:  # NaN, too
        raise RuntimeError(f"{what} is off by {error:.3g} from what plain PyTorch computes")


def _tree_batch(device: torch.device) -> RaggedBatch:
    """One row: a context and a binary tree."""
    masks = [1]
    for node in range(1, NODES):
        masks.append(masks[(node - 1) // 2] | 1 << node)
    pages = -(-(CONTEXT + NODES) // PAGE_SIZE)

    def index(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    positions = [CONTEXT + mask.bit_count() - 1 for mask in masks]
    return RaggedBatch(
        token_ids=index([0] * NODES, torch.int64),
        positions=index(positions, torch.int64),
        slots=index(list(range(CONTEXT, CONTEXT + NODES)), torch.int64),
        visible=index([CONTEXT + 1] * NODES),
        tree_mask=index(masks, torch.int64),
        row_of=index([0] * NODES),
        row_starts=index([0, NODES]),
        tree_base=index([CONTEXT]),
        page_table=index(list(range(pages)))[None],
        wanted=index(list(range(NODES)), torch.int64),
        max_query=NODES,
        max_keys=CONTEXT + NODES,
    )
