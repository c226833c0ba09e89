"""Modules for multi-token prediction for tests, fitted to a target in a moment."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from decoding.text import Tokenizer
from models.attention import load_backend
from models.decoder import Decoder
from models.heads.mtp import MTPConfig, MTPModel
from models.heads.mtp_files import module_shapes, write_mtp
from models.heads.parallel_heads import ParallelHeads
from models.layers.ops import load_ops
from models.loader import load_model
from tests.engines import ROOT
from tests.medusa import hidden_states


def fit_modules(
    target: Decoder, texts: Sequence[Sequence[int]], modules: int = 1, noise: float = 0.0
) -> tuple[MTPConfig, dict[str, Tensor]]:
    """Modules whose projection is a ridge regression to the target's next hidden state, from this one and the token.

    They are all alike: each goes on where the one before ended.

    Args:
        noise: size of the decoder layers' weights; 0: the layers add nothing.

    Returns:
        the config and the weights as ``write_mtp`` takes them.
    """
    config = MTPConfig.like(target.config, modules)
    inputs, wanted = [], []
    for text in texts:
        states = hidden_states(target, text).double()
        embedded = target.embed(torch.tensor(text)).double()
        inputs.append(torch.cat([unit(embedded[1:]), unit(states[:-1])], dim=1))
        wanted.append(states[1:] / target.final_norm.double())
    x, y = torch.cat(inputs), torch.cat(wanted)
    gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    projection = torch.linalg.solve(gram, x.T @ y).T  # [H, 2 H]
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in module_shapes(config).items():
        tensors[name] = torch.ones(shape) if "norm" in name else noise * torch.randn(shape, generator=generator)
        if "input_proj" in name:
            tensors[name] = projection.float()
        if "final_layernorm" in name:
            tensors[name] = target.final_norm.float().clone()
    return config, tensors


def unit(x: Tensor) -> Tensor:
    """[..., H] at a root mean square of 1."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


def fitted_model(target: Decoder, texts: Sequence[Sequence[int]], modules: int = 1, noise: float = 0.1) -> MTPModel:
    """``fit_modules`` ready to draft."""
    config, tensors = fit_modules(target, texts, modules, noise)
    ops, attention = load_ops(target.device, target.dtype), load_backend("auto", target.device, target.dtype)
    model = MTPModel(config, target, ops, attention)
    named = dict(zip(module_shapes(config), model.weights(), strict=True))
    for name, tensor in tensors.items():
        model.weights()[named[name]].copy_(tensor)
    model.pack()
    return model


def random_heads(target: Decoder, count: int) -> ParallelHeads:
    """Parallel heads that guess badly: layers as peaked as those of ``tiny_decoder``."""
    config = replace(target.config, num_layers=count, windows=())
    ops, attention = load_ops(target.device, target.dtype), load_backend("auto", target.device, target.dtype)
    heads = ParallelHeads(config, target, ops, attention)
    generator = torch.Generator().manual_seed(11)
    for weight in heads.weights().values():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.2 * drawn if weight.dim() == 1 else 0.35 * drawn)
    heads.pack()
    return heads


@cache
def demo_module() -> Path:
    """One module fitted to the demo target, in speculators' format."""
    folder = ROOT / "demo/target"
    target, tokenizer = load_model(folder, dtype="float32"), Tokenizer.load(folder)
    assert isinstance(target, Decoder)
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:12]
    config, tensors = fit_modules(target, [tokenizer.encode(json.loads(line)["prompt"]) for line in lines])
    made = Path(tempfile.mkdtemp(prefix="mtp-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    write_mtp(made, config, tensors, target="demo")
    return made
