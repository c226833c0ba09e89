"""The vocabulary-wide operations of sampling, behind one protocol so that a device can fuse them.

``noise`` is a bank of vectors [M, V] float32; ``noise_row`` [W] names the vector of each row of logits, -1 for none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from decoding.filtered_draw import by_candidates, by_sorting, keeps, keeps_some
from decoding.filters import Filters
from decoding.noise import fill_rows
from models import kernels
from models.kernels import triton as triton_kernels

NOT_A_TOKEN = -2  # drawn where the logits are no numbers: no id, and not the padding of lists of tokens


class SamplingOps(Protocol):
    """Logits x are [W, V] float32 or float64; temperature T is [W] float32."""

    def fill_noise(
        self, bank: Tensor, places: list[int], seeds: list[int], positions: list[int], choices: list[int]
    ) -> None:
        """A NoiseKernel, see decoding/noise.py."""
        ...

    def of_nodes(
        self, temperature: Tensor, first_noise: Tensor, position: Tensor, row: Tensor, depth: Tensor, ring: int
    ) -> tuple[Tensor, Tensor]:
        """(T [W], noise_row [W]) of nodes by their rows and depths [W], from the rows' own [S].

        The vector of position t lies at first_noise + t mod ring; a node draws at its row's position + depth. A row
        whose ``first_noise`` is -1 has none.
        """
        ...

    def best(self, x: Tensor) -> Tensor:
        """argmax(x) [W] int64; the lowest id wins a tie. NOT_A_TOKEN where the largest is no finite number.

        Where only some of a row are NaN, these may count as the largest or as the smallest.
        """
        ...

    def top(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of x [W, k], largest first, and their ids [W, k] int64."""
        ...

    def draw(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor) -> Tensor:
        """argmax(x / T + g) [W] int64, of x alone without noise; ties and what is no number as in ``best``."""
        ...

    def draw_filtered(
        self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, filters: Filters
    ) -> Tensor:
        """argmax(F(x / T) + g) [W] int64; nodes without noise have no filters. What is no number as in ``best``."""
        ...

    def keeps(self, scaled: Tensor, filters: Filters, at: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        """[W] bool: the filters keep ``tokens`` [W] among scaled[at] (at [W]); asked for only ``where`` [W] is true."""
        ...

    def candidates(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, k: int) -> Tensor:
        """The k best ids of x / T + g [W, k], best first."""
        ...

    def guess(
        self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, k: int, tau: float
    ) -> tuple[Tensor, Tensor]:
        """The k best ids of z = x + T * g [W, k], best first, and softmax(z / tau) at them [W, k] float32."""
        ...


class TorchSamplingOps:
    """In plain PyTorch, on any device; a draw with filters waits for it."""

    def fill_noise(
        self, bank: Tensor, places: list[int], seeds: list[int], positions: list[int], choices: list[int]
    ) -> None:
        fill_rows(bank, places, seeds, positions, choices)

    def of_nodes(
        self, temperature: Tensor, first_noise: Tensor, position: Tensor, row: Tensor, depth: Tensor, ring: int
    ) -> tuple[Tensor, Tensor]:
        first = first_noise[row]
        return temperature[row], torch.where(first < 0, -1, first + (position[row] + depth) % ring)

    def best(self, x: Tensor) -> Tensor:
        return _largest(x)

    def top(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = x.topk(k, dim=1)
        return best.values, best.indices

    def draw(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor) -> Tensor:
        return _largest(self._noisy(x / temperature[:, None], x, noise, noise_row))

    def draw_filtered(
        self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, filters: Filters
    ) -> Tensor:
        return by_candidates(self, x, temperature, noise, noise_row, filters)

    def keeps(self, scaled: Tensor, filters: Filters, at: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        return keeps_some(scaled, filters, at, tokens, where)

    def candidates(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, k: int) -> Tensor:
        return self._noisy(x / temperature[:, None], x, noise, noise_row).topk(k, dim=1).indices

    def guess(
        self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, k: int, tau: float
    ) -> tuple[Tensor, Tensor]:
        z = x
        if len(noise):
            z = torch.where(noise_row[:, None] < 0, x, x + temperature[:, None] * noise[noise_row.clamp(min=0)])
        best = z.topk(k, dim=1)
        confidence = (best.values / tau - torch.logsumexp(z / tau, dim=1, keepdim=True)).exp()
        return best.indices, confidence.float()

    @staticmethod
    def _noisy(scaled: Tensor, x: Tensor, noise: Tensor, noise_row: Tensor) -> Tensor:
        if not len(noise):
            return x
        return torch.where(noise_row[:, None] < 0, x, scaled + noise[noise_row.clamp(min=0)])


def _largest(x: Tensor) -> Tensor:
    values, ids = x.max(dim=1)
    return torch.where(values.isfinite(), ids, NOT_A_TOKEN)


class DeviceSamplingOps(TorchSamplingOps):
    """In plain PyTorch; nothing waits for the device."""

    def draw_filtered(
        self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, filters: Filters
    ) -> Tensor:
        return by_sorting(self, x, temperature, noise, noise_row, filters)

    def keeps(self, scaled: Tensor, filters: Filters, at: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        return keeps(scaled, filters, at, tokens, where)


class CpuSamplingOps:
    """Fused, see models/kernels/sampling.cpp.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self) -> None:
        ops = kernels.required()
        self.fill_noise = ops.fill_noise_rows.default
        self.of_nodes = ops.node_parameters.default
        self.best = ops.best_ids.default
        self.draw = ops.sample_rows.default
        self.guess = ops.guess_rows.default
        self._topk = ops.topk_rows.default
        self._top = ops.top_rows.default

    def top(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Equal values come in the order of their ids."""
        values, ids = self._top(x, k)
        return values, ids

    def candidates(self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, k: int) -> Tensor:
        ids: Tensor = self._topk(x, temperature, noise, noise_row, k, True)[1]
        return ids

    def draw_filtered(
        self, x: Tensor, temperature: Tensor, noise: Tensor, noise_row: Tensor, filters: Filters
    ) -> Tensor:
        return by_candidates(self, x, temperature, noise, noise_row, filters)

    def keeps(self, scaled: Tensor, filters: Filters, at: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        return keeps_some(scaled, filters, at, tokens, where)


def _triton() -> SamplingOps:
    from decoding.triton_sampling import TritonSamplingOps

    return TritonSamplingOps()


SAMPLING_OPS: dict[str, Callable[[], SamplingOps]] = {
    "torch": TorchSamplingOps,
    "cpu": CpuSamplingOps,
    "device": DeviceSamplingOps,
    "triton": _triton,
}


def load_sampling_ops(device: torch.device, name: str = "auto") -> SamplingOps:
    """The operations called ``name``; "auto" takes the fused ones where they work.

    Raises:
        ValueError: for an unknown name.
    """
    plain = "torch" if device.type == "cpu" else "device"
    if triton_kernels.serves(device, torch.float32):
        plain = "triton"
    return kernels.pick("sampling operations", SAMPLING_OPS, name, plain, kernels.serves(device, torch.float32))
