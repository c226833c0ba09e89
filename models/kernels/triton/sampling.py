"""Noise and draws over a vocabulary, the device side; decoding/triton_sampling.py launches them.

How a row of logits is cut depends on its length alone, so that a draw does not depend on the number of rows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
NOWHERE = tl.constexpr(2**31 - 1)  # an id that no token has
NOT_A_TOKEN = tl.constexpr(-2)  # that of decoding/sampling_ops.py


@triton.jit
def gumbel_of(bits):
    """-log(-log(1 - u)), u = (bits + 1/2) / 2^32; 1 - u is exact in float64, so its log is as good as log1p(-u)."""
    u = (bits.to(tl.float64) + 0.5) * TWO_TO_MINUS_32
    return (-tl.log(-tl.log(1.0 - u))).to(tl.float32)


@triton.jit
def fill_noise(
    bank, index, vocab,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Grid: (vectors, groups of WORDS counters). ``index`` [4, vectors]: place in the bank, seed, position, choice."""
    vector, vectors = tl.program_id(0), tl.num_programs(0)
    place = tl.load(index + vector)
    seed = tl.load(index + vectors + vector)
    position = tl.load(index + 2 * vectors + vector).to(tl.uint32)
    choice = tl.load(index + 3 * vectors + vector).to(tl.uint32)
    block = (tl.program_id(1) * WORDS + tl.arange(0, WORDS)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + position, zero + choice, zero)
    out = bank + place * vocab
    first = block.to(tl.int64) * 4
    tl.store(out + first, gumbel_of(w0), mask=first < vocab)
    tl.store(out + first + 1, gumbel_of(w1), mask=first + 1 < vocab)
    tl.store(out + first + 2, gumbel_of(w2), mask=first + 2 < vocab)
    tl.store(out + first + 3, gumbel_of(w3), mask=first + 3 < vocab)


@triton.jit
def best_of_part(
    logits, temperature, noise, noise_row, values, ids, vocab, row_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, parts). The largest x / T + g of each part (x where there is no noise), and its lowest id."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    within = column < vocab
    z = tl.load(logits + row * row_stride + column, mask=within, other=-float("inf"))
    of = tl.load(noise_row + row)
    if of >= 0:
        g = tl.load(noise + of * vocab + column, mask=within, other=0.0)
        z = tl.div_rn(z, tl.load(temperature + row)) + g
    z = tl.where(within, z, -float("inf"))
    best = tl.max(z, 0)
    tl.store(values + row * parts + part, best)
    tl.store(ids + row * parts + part, tl.min(tl.where((z == best) & within, column, NOWHERE), 0))


@triton.jit
def best_of_parts(
    values, ids, out, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows. The best of a row's parts; NOT_A_TOKEN where it is no finite number."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    within = part < parts
    value = tl.load(values + row * parts + part, mask=within, other=-float("inf"))
    place = tl.load(ids + row * parts + part, mask=within, other=NOWHERE)
    best = tl.max(value, 0)
    drawn = tl.min(tl.where(value == best, place, NOWHERE), 0)
    finite = (best > -float("inf")) & (best < float("inf"))  # false for NaN
    tl.store(out + row, tl.where(finite & (drawn < NOWHERE), drawn, NOT_A_TOKEN).to(tl.int64))
