"""The element-wise operations of a decoder layer, the device side; models/layers/triton_ops.py launches them.

Arithmetic is float32 and rounded once, at the end. How a row of numbers is cut depends on its length alone, so that its
bits do not depend on the number of rows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)

# they change from batch to batch: no variants of a kernel for their values
BATCH_ARGUMENTS = ["rows", "positions", "slots"]


@triton.jit
def normed(x, weight, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, BLOCK] of which WIDTH columns count, the others being 0."""
    mean_square = tl.sum(x * x, 1) / WIDTH
    return x * (1.0 / tl.sqrt(mean_square + EPS))[:, None] * weight[None, :]


@triton.jit(do_not_specialize=BATCH_ARGUMENTS)
def rms_norm(
    x, weight, out, rows,
    token, head,  # strides of x: row r is head r % HEADS of token r // HEADS
    HEADS: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: groups of ROWS rows."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    within = (r < rows)[:, None] & (column < WIDTH)[None, :]
    place = (r // HEADS * token + r % HEADS * head)[:, None] + column[None, :]
    wide = tl.load(x + place, mask=within, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    result = normed(wide, factor, EPS, WIDTH)
    tl.store(out + r[:, None] * WIDTH + column[None, :], result.to(out.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=BATCH_ARGUMENTS)
def add_rms_norm(
    x, residual, weight, out, rows,
    EPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: groups of ROWS rows. The sum, rounded, goes into ``residual``; its norm into ``out``."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    within = (r < rows)[:, None] & (column < WIDTH)[None, :]
    place = r[:, None] * WIDTH + column[None, :]
    added = tl.load(x + place, mask=within, other=0.0).to(tl.float32)
    total = added + tl.load(residual + place, mask=within, other=0.0).to(tl.float32)
    total = total.to(residual.dtype.element_ty)
    tl.store(residual + place, total, mask=within)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    result = normed(total.to(tl.float32), factor, EPS, WIDTH)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=within)


@triton.jit
def turn(
    source, target, cos, sin, heads, dims, source_head, target_head,
    COUNT: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate ``heads`` of one token, halves convention; dims beyond 2 * HALF are copied."""
    wanted = (heads < COUNT)[:, None] & (dims < HALF)[None, :]
    read = source + heads[:, None] * source_head + dims[None, :]
    write = target + heads[:, None] * target_head + dims[None, :]
    first = tl.load(read, mask=wanted, other=0.0).to(tl.float32)
    second = tl.load(read + HALF, mask=wanted, other=0.0).to(tl.float32)
    turned = first * cos[None, :] - second * sin[None, :]
    tl.store(write, turned.to(target.dtype.element_ty), mask=wanted)
    turned = second * cos[None, :] + first * sin[None, :]
    tl.store(write + HALF, turned.to(target.dtype.element_ty), mask=wanted)
    if DIM > 2 * HALF:
        beyond = 2 * HALF + tl.arange(0, REST_BLOCK)
        kept = (heads < COUNT)[:, None] & (beyond < DIM)[None, :]
        rest = tl.load(source + heads[:, None] * source_head + beyond[None, :], mask=kept)
        tl.store(target + heads[:, None] * target_head + beyond[None, :], rest.to(target.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=BATCH_ARGUMENTS)
def rotate_and_store(
    query, key, value, rope, positions, slots, keys, values, turned,
    query_token, query_head, key_token, key_head, value_token, value_head,  # strides
    key_slot, key_slot_head, value_slot, value_slot_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, groups of HEADS heads: those of the queries, then of the keys, each with the values."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    dims = tl.arange(0, HALF_BLOCK)
    angles = rope + tl.load(positions + token) * (2 * HALF) + dims
    cos = tl.load(angles, mask=dims < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=dims < HALF, other=0.0)
    query_groups: tl.constexpr = (QUERIES + HEADS - 1) // HEADS
    if group < query_groups:
        heads = group * HEADS + tl.arange(0, HEADS)
        source = query + token * query_token
        target = turned + token * (QUERIES * DIM)
        turn(source, target, cos, sin, heads, dims, query_head, DIM, QUERIES, DIM, HALF, REST_BLOCK)
    else:
        heads = (group - query_groups) * HEADS + tl.arange(0, HEADS)
        slot = tl.load(slots + token)
        source = key + token * key_token
        target = keys + slot * key_slot
        turn(source, target, cos, sin, heads, dims, key_head, key_slot_head, KEYS, DIM, HALF, REST_BLOCK)
        column = tl.arange(0, VALUE_BLOCK)
        within = (heads < KEYS)[:, None] & (column < VALUE_DIM)[None, :]
        read = value + token * value_token + heads[:, None] * value_head + column[None, :]
        write = values + slot * value_slot + heads[:, None] * value_slot_head + column[None, :]
        tl.store(write, tl.load(read, mask=within).to(values.dtype.element_ty), mask=within)


@triton.jit
def gated(gate_up, out, token, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: tokens, blocks of columns. ``token``: stride of gate_up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < WIDTH
    gate = tl.load(gate_up + row * token + column, mask=within, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * token + WIDTH + column, mask=within, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 1 + tanh(u) = 2 sigmoid(2u)
        active = gate * tl.sigmoid((gate + 0.044715 * gate * gate * gate) * (2.0 * SQRT_2_OVER_PI))
    tl.store(out + row * WIDTH + column, (active * up).to(out.dtype.element_ty), mask=within)
