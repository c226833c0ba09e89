"""argmax(F(x / T) + g) where some of the nodes have filters F: two ways to the same tokens.

``by_candidates`` tries the few best of x / T + g in turn and computes F only where it drops them all: far less work,
but each of its branches reads from the device. ``by_sorting`` computes F outright and never reads. ``keeps_some`` and
``keeps`` likewise.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from decoding.filters import Filters, kept, kept_everywhere

TRIED = 8  # candidates tried before the filters are computed over the whole vocabulary
SORTED = 32  # nodes whose vocabularies are sorted at one time: some 40 bytes of memory for each of their ids


class Draws(Protocol):
    """What both ways need of ``SamplingOps``."""

    def draw(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor) -> Tensor: ...

    def candidates(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, k: int) -> Tensor: ...


def by_candidates(
    ops: Draws, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, filters: Filters
) -> Tensor:
    """See ``SamplingOps.draw_filtered``."""
    drawn = ops.draw(x, temperature, noise, noise_row)
    at = filters.limiting(x.shape[1]).nonzero().squeeze(1)
    filters, x, temperature, noise_row = filters.at(at), x[at], temperature[at], noise_row[at]
    scaled = x / temperature[:, None]
    candidates = ops.candidates(x, temperature, noise, noise_row, min(TRIED, x.shape[1]))
    survives = kept(scaled, filters, candidates)
    chosen = candidates.gather(1, survives.to(torch.uint8).argmax(dim=1, keepdim=True)).squeeze(1)
    failed = (~survives.any(dim=1)).nonzero().squeeze(1)
    if failed.numel():
        keep = kept_everywhere(scaled[failed], filters.at(failed))
        z = scaled[failed] + noise[noise_row[failed]]  # filtered sequences are never greedy
        chosen[failed] = z.masked_fill(~keep, -torch.inf).argmax(dim=1)
    drawn[at] = torch.where(drawn[at] < 0, drawn[at], chosen)  # what is no token stays none
    return drawn


def by_sorting(
    ops: Draws, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, filters: Filters
) -> Tensor:
    """See ``SamplingOps.draw_filtered``. Filters that are off keep every id, so all nodes are treated alike."""
    parts = []
    for first in range(0, len(x), SORTED):
        some = slice(first, first + SORTED)
        keep = kept_everywhere(x[some] / temperature[some, None], filters.at(some))
        parts.append(ops.draw(x[some].masked_fill(~keep, -torch.inf), temperature[some], noise, noise_row[some]))
    return torch.cat(parts)


def keeps_some(scaled: Tensor, filters: Filters, at: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """See ``SamplingOps.keeps``."""
    result = torch.zeros_like(where)
    some = where.nonzero().squeeze(1)
    if some.numel():
        result[some] = kept(scaled[at[some]], filters.at(some), tokens[some, None]).squeeze(1)
    return result


def keeps(scaled: Tensor, filters: Filters, at: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """See ``SamplingOps.keeps``."""
    parts = []
    for first in range(0, len(at), SORTED):
        some = slice(first, first + SORTED)
        parts.append(kept(scaled[at[some]], filters.at(some), tokens[some, None]).squeeze(1))
    return torch.cat(parts) & where
