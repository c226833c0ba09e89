"""Where a small Llama's weights go in a large one that computes the same, and what stands around them.

An axis of a large weight is a map: the small model's index of each entry, or one of two kinds of padding.

    ZERO    the value there is always exactly zero: weights that read it cannot matter and are noise
    FREE    the value there is anything: weights that read it are zero, and those that write it are noise

So the zeros are few (at four times the width, a quarter of a matrix at most), and no kernel, cache or power meter
sees another model than a trained one. Noise is uniform: it never is a row's largest weight, which would make
quantisation coarser than it is for the small model.

    residual stream   ZERO, which every writer keeps; norms see a mean square that is H_old / H_new of the small one's
    q rows            FREE: the softmax ignores them, because k or v is ZERO on the other side
    k, v rows         ZERO within a real K/V head (RoPE's pairs stay pairs at a stride); in others k is FREE and v ZERO
    gate, up rows     FREE, ZERO: their product is zero

**The anchor.** Ids that the small model does not have must never win, without a mask. One padded channel of the stream
carries a constant c from the embedding on. To a norm, a constant channel is nothing but a part of eps, which is lowered
by as much: the function stays exact. The final norm makes it c / rms, which is positive, and the head's padded rows
multiply that by a large negative number. (Where the head is the embedding, all real logits move by one amount, which no
softmax sees.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inflate_shapes import Shape
from decoding.errors import ConfigError

ZERO, FREE = -1, -2
POOL = 16_777_259  # noise values drawn once; prime, so that no matrix repeats row by row
ANCHOR_SHARE = 2.0**-16  # of eps that the anchor may take: what has another eps than it is to have hardly notices
ANCHOR_NORMED = 0.25  # the anchor after the final norm, times the stream's root mean square in the small model
ANCHOR_ROW = -(2.0**15)  # the head's padded rows there: logits of -8192 / rms; within float16's range


@dataclass(frozen=True)
class Axes:
    """The maps of one model, each int64 and as long as the large axis."""

    stream: Tensor  # as it is read
    written: Tensor  # as it is written: the anchor is nobody's to change
    query: Tensor
    key: Tensor
    value: Tensor
    attended: Tensor  # what o reads
    gate: Tensor
    up: Tensor  # also what down reads
    anchor: int | None  # its channel

    def of_layer(self, *, real: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """(rows, columns) of a layer's matrices; of an added layer, which must write zeros, without real ones."""

        def side(axis: Tensor, padding: int) -> Tensor:
            return axis if real else torch.full_like(axis, padding)

        units, attended = side(self.up, ZERO), side(self.attended, ZERO)
        return {
            "q": (side(self.query, FREE), self.stream),
            "k": (side(self.key, FREE), self.stream),
            "v": (side(self.value, ZERO), self.stream),
            "o": (self.written, attended),
            "gate": (side(self.gate, FREE), self.stream),
            "up": (units, self.stream),
            "down": (self.written, units),
        }


def make_axes(small: Shape, large: Shape) -> Axes:
    """The maps from one shape to another, which must hold it.

    Raises:
        ConfigError: too few K/V heads for the small model's query heads.
    """
    stream = padded(small.hidden, large.hidden, ZERO)
    anchor = small.hidden if large.vocab > small.vocab else None
    read = stream.clone()
    if anchor is not None:
        read[anchor] = FREE
    queries, shared = _heads(small, large)
    heads = torch.tensor(queries)
    return Axes(
        stream=read,
        written=stream,
        query=_dims(torch.where(heads < 0, FREE, heads), FREE, small, large),
        key=_dims(torch.tensor([FREE if head < 0 else head for head in shared]), ZERO, small, large),
        value=_dims(torch.tensor(shared), ZERO, small, large),
        attended=_dims(heads, ZERO, small, large),
        gate=padded(small.mlp, large.mlp, FREE),
        up=padded(small.mlp, large.mlp, ZERO),
        anchor=anchor,
    )


def padded(small: int, large: int, padding: int) -> Tensor:
    """[large]: the small axis first, padding after it."""
    return torch.cat([torch.arange(small), torch.full((large - small,), padding)])


def repeated(axis: Tensor, count: int, small: int) -> Tensor:
    """An axis of ``count`` concatenated vectors, each of ``small`` entries in the small model."""
    return torch.cat([torch.where(axis < 0, axis, axis + i * small) for i in range(count)])


def _heads(small: Shape, large: Shape) -> tuple[list[int], list[int]]:
    """The small model's query head of each large one, and the same for K/V heads.

    Padded query heads are FREE where their K/V head is real, and ZERO where it is not. Where fewer queries share a K/V
    head than in the small model, copies of it serve them.
    """
    group, wide = small.heads // small.kv_heads, large.heads // large.kv_heads
    queries: list[int] = []
    shared: list[int] = []
    for head in range(small.kv_heads):
        for first in range(0, group, wide):
            own = list(range(head * group + first, head * group + min(first + wide, group)))
            queries += own + [FREE] * (wide - len(own))
            shared.append(head)
    spare = large.kv_heads - len(shared)
    if spare < 0:
        raise ConfigError(
            f"{large.heads} heads on {large.kv_heads} K/V heads cannot hold {small.heads} on {small.kv_heads}: at "
            f"least {len(shared)} K/V heads are needed"
        )
    return queries + [ZERO] * (spare * wide), shared + [ZERO] * spare


def _dims(heads: Tensor, padding: int, small: Shape, large: Shape) -> Tensor:
    """[large heads * dims]: dim i of a head at i * stride.

    theta^(-2 i stride / (stride D)) = theta^(-2 i / D): RoPE turns each pair as fast as before, and i * stride keeps
    the two halves of a pair half a head apart.
    """
    stride = large.head_dim // small.head_dim
    own = heads[:, None] * small.head_dim + torch.arange(small.head_dim)
    dims = torch.full((len(heads), large.head_dim), padding)
    dims[:, ::stride] = torch.where(heads[:, None] < 0, heads[:, None], own)
    return dims.flatten()


class Padder:
    """Pads tensors, in the dtype in which they are stored. Deterministic: noise is a function of the seed.

    Args:
        widths: hidden size of the small and of the large model.
    """

    def __init__(self, widths: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.shrink = math.sqrt(widths[0] / widths[1])
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.empty(POOL).uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        self._place = 0

    def matrix(self, weight: Tensor, rows: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
        """[len(rows), len(columns)] of the small [O, I]; its real part times ``scale``."""
        wide = self._noise((len(rows), len(columns)), float(weight.float().std()))
        place, kept = torch.where(rows != FREE)[0], torch.where(columns == FREE)[0]
        wide[place[:, None], kept] = 0
        place, kept = torch.where(rows == ZERO)[0], torch.where(columns >= 0)[0]
        wide[place[:, None], kept] = 0
        place = torch.where(rows >= 0)[0]
        real = weight.double()[rows[place]][:, columns[kept]] * scale
        wide[place[:, None], kept] = real.to(self.dtype)
        return wide

    def norm(self, weight: Tensor, axis: Tensor) -> Tensor:
        """[len(axis)] of an RMS norm's weight. float32 where ``dtype`` would round away what makes it exact."""
        scaled = weight.double() * self.shrink
        wide = torch.where(axis < 0, scaled.mean(), scaled[axis.clamp(min=0)])
        stored = wide.to(self.dtype)
        exact = torch.equal(stored[axis >= 0].double(), wide[axis >= 0]) or self.dtype == torch.float64
        return stored if exact else wide.float()

    def vector(self, weight: Tensor, axis: Tensor) -> Tensor:
        """[len(axis)] of a bias; zero in the padding."""
        return torch.where(axis < 0, 0, weight[axis.clamp(min=0)]).to(self.dtype)

    def _noise(self, shape: tuple[int, int], size: float) -> Tensor:
        flat = torch.empty(math.prod(shape), dtype=self.dtype)
        done = 0
        while done < len(flat):
            piece = self._pool[self._place : self._place + len(flat) - done]
            torch.mul(piece, size, out=flat[done : done + len(piece)])
            done += len(piece)
            self._place = (self._place + len(piece)) % POOL
        return flat.view(shape)


def anchor_value(eps: float, hidden: int) -> float:
    """The anchor's constant: a power of two, exact in every dtype. Its square is at most a small share of eps * H.

    Raises:
        ConfigError: a model without eps leaves it no room.
    """
    if eps <= 0:
        raise ConfigError("a model whose norms have an eps of 0 cannot be given a larger vocabulary; keep its own")
    return 2.0 ** math.floor(math.log2(ANCHOR_SHARE * eps * hidden) / 2)
