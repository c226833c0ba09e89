"""The last check of a transformers model that is being loaded: its logits on our cache against its own eager attention.

Two rows in one batch, a prompt in two chunks and a token tree: what serving does, on a few random tokens. It catches
what does not pass through the attention hook (score biases, scalings), and whatever else is not as it seems.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.batch import PAGE_SIZE, RaggedBatch
from models.kv_cache import KVCache
from models.target import CausalModel, Trunk
from models.transformers_inspection import random_tokens, set_attention

ROW_A = 17  # tokens of the first probe row, committed in two chunks
CHUNK_A = 11
ROW_B = 6  # tokens of the second, committed at once; a tree follows
TREE_PARENTS = (-1, 0, 0, 1, 3)
PATHS = ((0, 1, 3, 4), (0, 2))  # the tree's nodes along its two paths


@dataclass(frozen=True)
class Reference:
    """The probe's tokens and the logits that the model's eager attention gives them."""

    tokens: Tensor  # [ROW_A + ROW_B + nodes]
    row_a: Tensor  # [ROW_A, V]
    row_b: Tensor  # [ROW_B, V]
    tree: Tensor  # [nodes, V]


@torch.no_grad()
def reference_logits(model: PreTrainedModel) -> Reference:
    """Logits of the probe's rows and of every path of its tree, by the model's own eager attention, one text each."""
    tokens = random_tokens(model, ROW_A + ROW_B + len(TREE_PARENTS))
    a, b, nodes = torch.split(tokens, [ROW_A, ROW_B, len(TREE_PARENTS)])
    set_attention(model, "eager")

    def run(text: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=text[None], use_cache=False).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    row_b = run(b)
    tree = row_b.new_empty(len(nodes), row_b.shape[1])
    for path in PATHS:
        index = torch.tensor(path, device=model.device)
        tree[index] = run(torch.cat([b, nodes[index]]))[ROW_B:]
    return Reference(tokens, run(a), row_b, tree)


@torch.no_grad()
def compare_with(model: CausalModel, reference: Reference) -> None:
    """Compare the model's logits over a page cache with the reference.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    a, b, nodes = torch.split(reference.tokens, [ROW_A, ROW_B, len(TREE_PARENTS)])
    cache = KVCache(model.kv_spec, 5, model.dtype, model.device)
    pages = ([3, 1], [4, 2])  # page 0 stays unused
    first = _probe_batch([a[:CHUNK_A], b], (0, 0), (None, None), pages)
    second = _probe_batch([a[CHUNK_A:], nodes], (CHUNK_A, ROW_B), (None, TREE_PARENTS), pages)
    prompts = model.logits(model.forward(first, cache).hidden)
    rest_a, tree = model.logits(model.forward(second, cache).hidden).tensor_split([ROW_A - CHUNK_A])
    for what, ours, theirs in (
        ("prompts", prompts, torch.cat([reference.row_a[:CHUNK_A], reference.row_b])),
        ("the second chunk of a prompt", rest_a, reference.row_a[CHUNK_A:]),
        ("a token tree", tree, reference.tree),
    ):
        error = relative_error(ours, theirs, model.dtype)
        if not error <= TOLERANCE[model.dtype]:
            raise ValueError(f"on our cache its logits for {what} differ from transformers' by {error:.2g}, relatively")


@torch.no_grad()
def compare_exit(model: CausalModel, trunk: Trunk, layers: int) -> None:
    """Compare the K/V that the first ``layers`` layers write with that of the whole model's pass.

    Raises:
        ValueError: it differs, there is some of later layers, or the hidden states are of another shape.
    """
    tokens = torch.arange(CHUNK_A, device=model.device) % model.vocab_size
    batch = _probe_batch([tokens], (0,), (None,), ([0],))
    caches = [KVCache(model.kv_spec, 1, model.dtype, model.device) for _ in range(2)]
    model.forward(batch, caches[0])
    hidden = trunk(batch, caches[1])
    if hidden.shape != (CHUNK_A, model.hidden_size):
        raise ValueError(f"its hidden states are {list(hidden.shape)} there")
    for whole, part in ((caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
        if not torch.allclose(part[:layers], whole[:layers], rtol=0.02, atol=1e-3) or bool(part[layers:].any()):
            raise ValueError("its first layers do not compute the same when no others follow")


# Random models of seven families, 2 and 12 layers, err by at most 5e-7 (float64: eager softmax is float32), 5e-6, 0.04
# and 0.09 (experts' routers amplify rounding). Families with biases in their attention err by 0.4 and more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}


def relative_error(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """Error norm over the norm of the centred logits [W, V], per token; the worst token's.

    In 16 bits the median token's: rounding may send a token to another expert, which changes all of its logits.
    """
    centred = theirs - theirs.mean(dim=-1, keepdim=True)
    errors = (ours - theirs).norm(dim=-1) / centred.norm(dim=-1).clamp(min=torch.finfo(theirs.dtype).tiny)
    return float(errors.median() if dtype.itemsize == 2 else errors.max())


def _probe_batch(
    queries: list[Tensor],
    contexts: tuple[int, ...],
    trees: tuple[tuple[int, ...] | None, ...],
    pages: tuple[list[int], ...],
) -> RaggedBatch:
    """Rows of ``queries`` after ``contexts`` committed tokens; a row is a chain, or a tree with these parents."""
    device = queries[0].device
    positions: list[int] = []
    slots: list[int] = []
    visible: list[int] = []
    masks: list[int] = []
    bases: list[int] = []
    for query, context, parents, row_pages in zip(queries, contexts, trees, pages, strict=True):
        count = len(query)
        keys = range(context, context + count)
        slots += [row_pages[key // PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE for key in keys]
        if parents is None:
            positions += keys
            visible += [key + 1 for key in keys]
            masks += [0] * (count - 1) + [1]
            bases.append(context + count - 1)
        else:
            mask = [1]
            for node in range(1, count):
                mask.append(mask[parents[node]] | 1 << node)
            positions += [context + bits.bit_count() - 1 for bits in mask]
            visible += [context] * count
            masks += mask
            bases.append(context)
    lengths = [len(query) for query in queries]

    def index(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return RaggedBatch(
        token_ids=torch.cat(queries),
        positions=index(positions, torch.int64),
        slots=index(slots, torch.int64),
        visible=index(visible),
        tree_mask=index(masks, torch.int64),
        row_of=index([row for row, length in enumerate(lengths) for _ in range(length)]),
        row_starts=index([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        tree_base=index(bases),
        page_table=torch.tensor(pages, dtype=torch.int32, device=device),
        wanted=torch.arange(sum(lengths), device=device),
        max_query=max(lengths),
        max_keys=max(context + length for context, length in zip(contexts, lengths)),
    )
