"""Paged tree attention, the device side; models/attention/triton.py launches it and explains the tiling.

One program takes a *tile*: consecutive query tokens of one row times the query heads of one K/V head, BLOCK_M vectors,
so that a key is read once for all of them. Keys come in blocks of BLOCK_N, gathered page by page, and are numbered by
logical index; every SPLIT of them there is a boundary. Inside a split the softmax is online (arXiv 2205.14135), and
splits are merged in rising order (arXiv 2311.01282), either by the program itself or, where each split has a program of
its own, by ``merge_splits``: the same function of the same numbers, so that both give the same bits.

Scores are in units of log 2. A vector that has seen nothing has the peak -inf, the total 0 and the sum 0; merging that
changes no bit of the other.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_TREE = tl.constexpr(64)
NOWHERE = tl.constexpr(1 << 30)  # beyond any logical index
ROWS_AT_ONCE = tl.constexpr(128)
SPLITS_AT_ONCE = tl.constexpr(8)

# what changes from batch to batch must not make another variant of a kernel: neither its value nor its alignment
BATCH_ARGUMENTS = [
    "visible",
    "tree_mask",
    "positions",
    "row_of",
    "row_starts",
    "tree_base",
    "page_table",
    "tokens",
    "rows",
    "pages",
]


@triton.jit
def set_bits(bits):
    """Number of set bits of uint64s."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    bits = bits + (bits >> 32)
    return (bits & 0x7F).to(tl.int32)


@triton.jit
def reach_of(sees, bits, base):
    """One past the last logical key that a query token sees: those below ``sees``, ancestors ``bits`` from ``base``."""
    below = bits | (bits >> 1)
    below = below | (below >> 2)
    below = below | (below >> 4)
    below = below | (below >> 8)
    below = below | (below >> 16)
    below = below | (below >> 32)
    return tl.maximum(sees, tl.where(bits != 0, base + set_bits(below), 0))


@triton.jit
def find_tile(tile, row_starts, rows, BLOCK_Q: tl.constexpr):
    """A tile's row, its first query token and one past the row's last; a number without a tile begins behind it.

    Row r's tiles begin at number row_starts[r] // BLOCK_Q + r: at least as many numbers on as the row before has tiles.
    """
    row = -1
    for start in range(0, rows, ROWS_AT_ONCE):
        r = start + tl.arange(0, ROWS_AT_ONCE)
        begins = tl.load(row_starts + r, mask=r < rows, other=NOWHERE) // BLOCK_Q + r
        row += tl.sum((begins <= tile).to(tl.int32), 0)
    row_start = tl.load(row_starts + row)
    first = row_start + (tile - row_start // BLOCK_Q - row) * BLOCK_Q
    return row, first, tl.load(row_starts + row + 1)


@triton.jit
def window_of(positions, token, real, sees, WINDOW: tl.constexpr, FIRST_KEY: tl.constexpr):
    """The lowest position that each vector sees; the lowest key that one of them, and that all of them see."""
    if WINDOW > 0:
        low = tl.load(positions + token, mask=real, other=0).to(tl.int32) - (WINDOW - 1)
        begin = tl.maximum(tl.min(tl.where(real, low, NOWHERE), 0), FIRST_KEY)
        full_from = tl.maximum(tl.max(tl.where(real, low, 0), 0), FIRST_KEY)
    else:
        low = sees  # never read
        begin = tl.full([], FIRST_KEY, tl.int32)
        full_from = begin
    return low, begin, full_from


@triton.jit
def merge(peak, total, acc, other_peak, other_total, other_acc):
    """Two softmaxes over disjoint keys as one: peaks and totals [M], sums over values [M, Dv]."""
    joint = tl.maximum(peak, other_peak)
    safe = tl.where(joint == float("-inf"), 0.0, joint)
    fade, other_fade = tl.exp2(peak - safe), tl.exp2(other_peak - safe)
    total = total * fade + other_total * other_fade
    acc = acc * fade[:, None] + other_acc * other_fade[:, None]
    return joint, total, acc


@triton.jit
def finish(peak, total, acc, head, sinks, SINKS: tl.constexpr):
    """[M, Dv] the softmax's result; 0 for a vector that has seen no key."""
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        joint = tl.maximum(peak, sink)
        fade = tl.exp2(peak - joint)
        total = total * fade + tl.exp2(sink - joint)
        acc = acc * fade[:, None]
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def seen_keys(n, sees, bits, base, low, WINDOW: tl.constexpr, FIRST_KEY: tl.constexpr):
    """[M, N] whether each vector sees each logical key (models/batch.py says when)."""
    node = n - base  # number of the key among the tree's nodes
    in_tree = (node >= 0) & (node < MAX_TREE)
    # shifts of 32 bits take half the registers of those of 64
    low_word, high_word = (bits & 0xFFFFFFFF).to(tl.uint32), (bits >> 32).to(tl.uint32)
    word = tl.where((node < 32)[None, :], low_word[:, None], high_word[:, None])
    ancestor = (((word >> (node & 31).to(tl.uint32)[None, :]) & 1) != 0) & in_tree[None, :]
    seen = n[None, :] < sees[:, None]
    if WINDOW > 0:
        seen = seen & (n[None, :] >= low[:, None])
        if WINDOW < MAX_TREE:  # else no ancestor is too far away
            shift = tl.minimum(tl.maximum(node, 0), MAX_TREE - 1).to(tl.uint64)
            one = tl.full([1], 1, tl.uint64)
            above = bits[:, None] & ((one << shift) - 1)[None, :]  # ancestors of the ancestor: its depth
            ancestor = ancestor & (base + set_bits(above) >= low[:, None])
    seen = seen | ancestor
    if FIRST_KEY > 0:
        seen = seen & (n >= FIRST_KEY)[None, :]
    return seen


@triton.jit
def take_keys(
    q, peak, total, acc, start, reach, sees, bits, base, low, table,
    keys, values, key_slot, value_slot,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, FIRST_KEY: tl.constexpr, PAGE: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over one more block of keys; ``MASKED`` unless all vectors see all of them."""
    n = start + tl.arange(0, BLOCK_N)
    if MASKED:
        page = tl.load(table + n // PAGE, mask=n < reach, other=0)  # a key beyond reads page 0 and is masked below
    else:
        page = tl.load(table + n // PAGE)
    slot = page.to(tl.int64) * PAGE + n % PAGE
    d = tl.arange(0, KEY_BLOCK)
    if KEY_DIM == KEY_BLOCK:
        k = tl.load(keys + slot[None, :] * key_slot + d[:, None])  # [D, N]
    else:
        k = tl.load(keys + slot[None, :] * key_slot + d[:, None], mask=(d < KEY_DIM)[:, None], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee")
    if SOFT_CAP > 0:
        # cap * tanh(s / cap) by the exponential of -2 |s| / cap, which cannot overflow
        ratio = scores * (SCALE / SOFT_CAP)
        e = tl.exp2(tl.abs(ratio) * (-2 * LOG2_E))
        size = (1 - e) / (1 + e) * (SOFT_CAP * LOG2_E)
        scores = tl.where(ratio < 0, -size, size)
    else:
        scores = scores * (SCALE * LOG2_E)
    if MASKED:
        seen = seen_keys(n, sees, bits, base, low, WINDOW, FIRST_KEY)
        scores = tl.where(seen, scores, float("-inf"))
    joint = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(joint == float("-inf"), 0.0, joint)
    probs = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(peak - safe)
    total = total * fade + tl.sum(probs, 1)
    dv = tl.arange(0, VALUE_BLOCK)
    if VALUE_DIM == VALUE_BLOCK:
        v = tl.load(values + slot[:, None] * value_slot + dv[None, :])  # [N, Dv]
    else:
        v = tl.load(values + slot[:, None] * value_slot + dv[None, :], mask=(dv < VALUE_DIM)[None, :], other=0.0)
    if MASKED:  # slots that nobody sees may hold anything, NaN included
        v = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], v, 0.0)
    acc = tl.dot(probs.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return joint, total, acc


@triton.jit
def take_split(
    q, begin, end, full_from, full_to, reach, sees, bits, base, low, table,
    keys, values, key_slot, value_slot,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, FIRST_KEY: tl.constexpr, PAGE: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys [begin, end) of one split; all vectors see those of [full_from, full_to)."""
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
    full = tl.minimum(tl.maximum(tl.cdiv(full_from, BLOCK_N) * BLOCK_N, begin), end)
    tail = tl.maximum(tl.minimum(full_to // BLOCK_N * BLOCK_N, end), full)
    if WINDOW > 0 or FIRST_KEY > 0:
        for start in range(begin, full, BLOCK_N):
            peak, total, acc = take_keys(
                q, peak, total, acc, start, reach, sees, bits, base, low, table, keys, values, key_slot, value_slot,
                SCALE, SOFT_CAP, WINDOW, FIRST_KEY, PAGE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, BLOCK_N, True,
            )  # fmt: skip
    for start in range(full, tail, BLOCK_N):
        peak, total, acc = take_keys(
            q, peak, total, acc, start, reach, sees, bits, base, low, table, keys, values, key_slot, value_slot,
            SCALE, SOFT_CAP, WINDOW, FIRST_KEY, PAGE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, BLOCK_N, False,
        )  # fmt: skip
    for start in range(tail, end, BLOCK_N):
        peak, total, acc = take_keys(
            q, peak, total, acc, start, reach, sees, bits, base, low, table, keys, values, key_slot, value_slot,
            SCALE, SOFT_CAP, WINDOW, FIRST_KEY, PAGE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, BLOCK_N, True,
        )  # fmt: skip
    return peak, total, acc


@triton.jit(do_not_specialize=BATCH_ARGUMENTS)
def attend_tiles(
    query, keys, values, visible, tree_mask, positions, row_starts, tree_base, page_table, sinks,
    out,  # [T, Hq, Dv]
    peaks_and_totals,  # [splits, T, Hq, 2] float32, and
    sums,  # [splits, T, Hq, Dv] float32: written where every split has its program, for merge_splits
    tokens, rows, pages,
    query_token, query_head, key_slot, key_head, value_slot, value_head,  # strides
    HEADS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    FIRST_KEY: tl.constexpr, SINKS: tl.constexpr, PAGE: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SPLIT_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles, K/V heads, splits (1 without ``SPLIT_PROGRAMS``). SOFT_CAP, WINDOW and FIRST_KEY 0: none."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # the last tiles of a chain see the most keys: they go first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row, first, row_end = find_tile(tile, row_starts, rows, BLOCK_Q)
    if first >= row_end:
        return

    m = tl.arange(0, BLOCK_M)
    token = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    real = (m < BLOCK_Q * GROUP) & (token < row_end)
    base = tl.load(tree_base + row)
    sees = tl.load(visible + token, mask=real, other=0)
    bits = tl.load(tree_mask + token, mask=real, other=0).to(tl.uint64, bitcast=True)
    reach = tl.max(reach_of(sees, bits, base), 0)
    full_to = tl.min(tl.where(real, sees, NOWHERE), 0)
    low, begin, full_from = window_of(positions, token, real, sees, WINDOW, FIRST_KEY)

    d = tl.arange(0, KEY_BLOCK)
    token = token.to(tl.int64)
    q = tl.load(
        query + (token * query_token + head * query_head)[:, None] + d[None, :],
        mask=real[:, None] & (d < KEY_DIM)[None, :],
        other=0.0,
    )
    keys += kv_head * key_head
    values += kv_head * value_head
    table = page_table + row.to(tl.int64) * pages
    dv = tl.arange(0, VALUE_BLOCK)
    stored = real[:, None] & (dv < VALUE_DIM)[None, :]
    vector = token * HEADS + head
    begin = begin // BLOCK_N * BLOCK_N
    if SPLIT_PROGRAMS:
        split = tl.program_id(2)
        begin = tl.maximum(begin, split * SPLIT)
        end = tl.minimum(reach, (split + 1) * SPLIT)
        if begin >= end:
            return
        peak, total, acc = take_split(
            q, begin, end, full_from, full_to, reach, sees, bits, base, low, table, keys, values, key_slot, value_slot,
            SCALE, SOFT_CAP, WINDOW, FIRST_KEY, PAGE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        vector += split * (tokens.to(tl.int64) * HEADS)
        tl.store(peaks_and_totals + vector * 2, peak, mask=real)
        tl.store(peaks_and_totals + vector * 2 + 1, total, mask=real)
        tl.store(sums + vector[:, None] * VALUE_DIM + dv[None, :], acc, mask=stored)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
        for split in range(begin // SPLIT, tl.cdiv(reach, SPLIT)):
            split_peak, split_total, split_acc = take_split(
                q, tl.maximum(begin, split * SPLIT), tl.minimum(reach, (split + 1) * SPLIT), full_from, full_to,
                reach, sees, bits, base, low, table, keys, values, key_slot, value_slot,
                SCALE, SOFT_CAP, WINDOW, FIRST_KEY, PAGE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            peak, total, acc = merge(peak, total, acc, split_peak, split_total, split_acc)
        result = finish(peak, total, acc, head, sinks, SINKS)
        tl.store(out + vector[:, None] * VALUE_DIM + dv[None, :], result.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=BATCH_ARGUMENTS)
def merge_splits(
    visible, tree_mask, positions, row_of, tree_base, sinks, out, peaks_and_totals, sums, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, FIRST_KEY: tl.constexpr, SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, K/V heads. The splits that the token's own keys lie in: others would add nothing."""
    token = tl.program_id(0)
    g = tl.arange(0, GROUP_BLOCK)
    real = g < GROUP
    head = tl.where(real, tl.program_id(1) * GROUP + g, 0)
    row = tl.load(row_of + token)
    bits = tl.load(tree_mask + token).to(tl.uint64, bitcast=True)
    reach = reach_of(tl.load(visible + token), bits, tl.load(tree_base + row))
    begin = tl.full([], FIRST_KEY, tl.int32)
    if WINDOW > 0:
        begin = tl.maximum(tl.load(positions + token).to(tl.int32) - (WINDOW - 1), begin)
    first = begin // SPLIT
    last = tl.where(begin < reach, tl.cdiv(reach, SPLIT), first)
    split_stride = tokens.to(tl.int64) * HEADS
    own = token.to(tl.int64) * HEADS + head

    dv = tl.arange(0, VALUE_BLOCK)
    stored = real[:, None] & (dv < VALUE_DIM)[None, :]
    peak = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, VALUE_BLOCK], tl.float32)
    for start in range(first, last, SPLITS_AT_ONCE):
        for ahead in tl.static_range(SPLITS_AT_ONCE):  # unrolled: the loads do not wait for one another
            split = tl.full([GROUP_BLOCK], ahead, tl.int32) + start
            there = split < last
            vector = own + split * split_stride
            split_peak = tl.load(peaks_and_totals + vector * 2, mask=there, other=float("-inf"))
            split_total = tl.load(peaks_and_totals + vector * 2 + 1, mask=there, other=0.0)
            place = sums + vector[:, None] * VALUE_DIM + dv[None, :]
            split_acc = tl.load(place, mask=there[:, None] & stored, other=0.0)
            peak, total, acc = merge(peak, total, acc, split_peak, split_total, split_acc)
    result = finish(peak, total, acc, head, sinks, SINKS)
    place = out + own[:, None] * VALUE_DIM + dv[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=stored)
