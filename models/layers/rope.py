"""Rotary position embeddings: frequencies of every scaling type that transformers knows for dense decoders.

Frequencies are fixed when the model is loaded. The types whose frequencies depend on the length of the text (dynamic
NTK, longrope) take the longest text served: frequencies that changed with the batch would make a text depend on its
neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """One model's rotary embedding; fields that a kind does not use are ignored. Names are transformers'."""

    dim: int  # dims of a head that are rotated, the first ones
    theta: float = 10_000.0
    kind: str = "default"  # a key of ROPE_KINDS
    trained_len: int = 2048  # max_position_embeddings
    original_len: int = 2048  # original_max_position_embeddings: the length before any extension
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()  # [dim / 2]
    long_factor: tuple[float, ...] = ()  # [dim / 2]


Frequencies = tuple[Tensor, float]  # inverse frequencies [dim / 2] float32, and the factor on cos and sin


def rope_table(config: RopeConfig, max_len: int, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """cos and sin of positions 0 .. rows - 1, [rows, 2, dim / 2].

    Args:
        max_len: the longest text served; length-dependent frequencies are those of a text of that length.
        dtype: the model's; the table is float32, or float64 for a float64 model.
    """
    inverse, scale = ROPE_KINDS[config.kind](config, max_len)
    wide = torch.promote_types(dtype, torch.float32)
    angles = torch.arange(rows).to(wide)[:, None] * inverse.to(wide)
    return (torch.stack([angles.cos(), angles.sin()], dim=1) * scale).to(device)


def supported_len(config: RopeConfig) -> int:
    """The longest text that the scaling is made for, as vLLM derives it when none is given."""
    if config.factor is None:
        return config.trained_len
    if config.kind == "yarn":
        return int(config.original_len * config.factor)
    if config.kind in ("linear", "dynamic"):
        return int(config.trained_len * config.factor)
    return config.trained_len  # llama3 and longrope state the extended length


def _powers(config: RopeConfig, theta: float) -> Tensor:
    """theta^(2i / dim), [dim / 2] float32."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    powers: Tensor = theta**exponents
    return powers


def _default(config: RopeConfig, max_len: int) -> Frequencies:
    """RoFormer, arXiv 2104.09864."""
    return 1.0 / _powers(config, config.theta), 1.0


def _linear(config: RopeConfig, max_len: int) -> Frequencies:
    """Position interpolation, arXiv 2306.15595."""
    return 1.0 / _powers(config, config.theta) / _factor(config), 1.0


def _dynamic(config: RopeConfig, max_len: int) -> Frequencies:
    """NTK-aware scaling of theta by the length of the text, here max_len."""
    factor, length = _factor(config), max(max_len, config.trained_len)
    stretch = factor * length / config.trained_len - (factor - 1)
    theta: float = config.theta * stretch ** (config.dim / (config.dim - 2))
    return 1.0 / _powers(config, theta), 1.0


def _yarn(config: RopeConfig, max_len: int) -> Frequencies:
    """YaRN, arXiv 2309.00071: high frequencies stay, low ones are interpolated, a ramp between them."""
    factor = config.factor if config.factor is not None else config.trained_len / config.original_len

    def turning_dim(rotations: float) -> float:
        """The dim whose wave turns ``rotations`` times over the original length."""
        turns = math.log(config.original_len / (rotations * 2 * math.pi))
        return config.dim * turns / (2 * math.log(config.theta))

    low, high = turning_dim(config.beta_fast), turning_dim(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = ((torch.arange(config.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers, kept = _powers(config, config.theta), 1 - ramp
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, _yarn_attention(config, factor)


def _yarn_attention(config: RopeConfig, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def _longrope(config: RopeConfig, max_len: int) -> Frequencies:
    """LongRoPE, arXiv 2402.13753: a searched factor for each frequency, another set beyond the original length."""
    factor = config.factor if config.factor is not None else config.trained_len / config.original_len
    scale = config.attention_factor
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(config.original_len)) if factor > 1 else 1.0
    chosen = config.long_factor if max_len > config.original_len else config.short_factor
    return 1.0 / (torch.tensor(chosen, dtype=torch.float32) * _powers(config, config.theta)), scale


def _llama3(config: RopeConfig, max_len: int) -> Frequencies:
    """Llama 3.1: long waves are divided by the factor, short ones stay, those between are blended."""
    factor = _factor(config)
    inverse = 1.0 / _powers(config, config.theta)
    waves = 2 * math.pi / inverse
    smooth = (config.original_len / waves - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    longer = torch.where(waves > config.original_len / config.low_freq_factor, inverse / factor, blended)
    return torch.where(waves < config.original_len / config.high_freq_factor, inverse, longer), 1.0


def _factor(config: RopeConfig) -> float:
    if config.factor is None:
        raise ValueError(f"rope scaling of type {config.kind!r} needs a factor")
    return config.factor


ROPE_KINDS: dict[str, Callable[[RopeConfig, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
