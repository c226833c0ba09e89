"""EAGLE drafters for tests, fitted to a target in a moment."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from decoding.text import Tokenizer
from models.attention import AttentionBackend, load_backend
from models.decoder import Decoder
from models.heads.eagle import EagleConfig, EagleModel, write_eagle
from models.heads.eagle3 import Eagle3Config, Eagle3Model
from models.heads.eagle3_files import write_eagle3
from models.layers.ops import LayerOps, load_ops
from models.loader import load_model
from tests.engines import ROOT
from tests.medusa import hidden_states
from tests.mtp import unit
from tests.paged import PagedRun

Weights = dict[str, Tensor]
Model = TypeVar("Model", EagleModel, Eagle3Model)


def fit_eagle(target: Decoder, texts: Sequence[Sequence[int]], noise: float = 0.0) -> tuple[EagleConfig, Weights]:
    """A drafter whose ``fc`` is a ridge regression to the target's next feature, from this one and the token.

    Args:
        noise: size of the layer's weights; 0: it adds nothing.
    """
    config = EagleConfig(replace(target.config, num_layers=1), bias=False)
    inputs, wanted = [], []
    for text in texts:
        states = hidden_states(target, text).double()
        inputs.append(torch.cat([target.embed(torch.tensor(text[1:])).double(), states[:-1]], dim=1))
        wanted.append(states[1:])
    blank = _blank(EagleModel(config, target, *_parts(target)), noise)
    return config, blank | {"fc.weight": _ridge(inputs, wanted)}


def fit_eagle3(
    target: Decoder, texts: Sequence[Sequence[int]], taps: tuple[int, ...], ids: Tensor, noise: float = 0.0
) -> tuple[Eagle3Config, Weights]:
    """A drafter that regresses the target's next hidden state on the taps and, through attention, the token.

    Queries and keys are the embedding itself, large: a token attends to itself, so values and output pass it on.

    Args:
        ids: [Vd] the target's tokens that it can draft.
        noise: size of the MLP's weights; 0: it adds nothing.
    """
    heads = target.hidden_size // target.config.head_dim  # with K/V of their own, so that nothing of x_t is lost
    layer = replace(target.config, num_layers=1, num_heads=heads, num_kv_heads=heads, tied=False)
    config = Eagle3Config(layer, taps, draft_vocab_size=len(ids))
    size, inputs, wanted = target.hidden_size, [], []
    for text in texts:
        run = PagedRun(target, capacity=len(text))
        out = run.forward(run.batch({0: list(text)}), taps)
        features = torch.cat([out.taps[tap] for tap in taps], dim=1)[:-1].double()
        inputs.append(torch.cat([features, unit(target.embed(torch.tensor(text[1:])).double())], dim=1))
        wanted.append(out.hidden[1:].double() / target.final_norm.double())
    fitted = _ridge(inputs, wanted)
    weights = _blank(Eagle3Model(config, target, *_parts(target)), noise)
    weights["fc.weight"] = fitted[:, :-size]
    look = torch.cat([3 * torch.eye(size), torch.zeros(size, size)], dim=1)
    attention = "layers.0.self_attn."
    weights |= {f"{attention}{name}_proj.weight": look.clone() for name in "qk"}
    weights[f"{attention}v_proj.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)
    weights[f"{attention}o_proj.weight"] = fitted[:, -size:]
    head = target.embedding if target.config.tied else target.head.weight
    assert head is not None
    weights["lm_head.weight"] = (head.double() * target.final_norm.double())[ids].float()
    return config, weights


def fitted_eagle(target: Decoder, texts: Sequence[Sequence[int]], noise: float = 0.1) -> EagleModel:
    """``fit_eagle`` ready to draft."""
    config, weights = fit_eagle(target, texts, noise)
    return _filled(EagleModel(config, target, *_parts(target)), weights)


def fitted_eagle3(
    target: Decoder, texts: Sequence[Sequence[int]], taps: tuple[int, ...], ids: Tensor, noise: float = 0.1
) -> Eagle3Model:
    """``fit_eagle3`` ready to draft."""
    config, weights = fit_eagle3(target, texts, taps, ids, noise)
    return _filled(Eagle3Model(config, target, *_parts(target), token_ids=ids), weights)


@cache
def demo_eagle() -> Path:
    """An EAGLE-1 drafter fitted to the demo target."""
    folder = _folder("eagle-")
    write_eagle(folder, *fit_eagle(*_demo()))
    return folder


@cache
def demo_eagle3() -> Path:
    """An EAGLE-3 drafter fitted to the demo target, over half of its vocabulary."""
    target, texts = _demo()
    ids = torch.arange(target.vocab_size // 2)  # the tokenizer's most frequent merges come first
    folder = _folder("eagle3-")
    config, weights = fit_eagle3(target, texts, (2, 5, 7), ids)
    write_eagle3(folder, config, weights, ids)
    return folder


@cache
def _demo() -> tuple[Decoder, list[list[int]]]:
    folder = ROOT / "demo/target"
    target, tokenizer = load_model(folder, dtype="float32"), Tokenizer.load(folder)
    assert isinstance(target, Decoder)
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:12]
    return target, [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]


def _folder(prefix: str) -> Path:
    made = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _parts(target: Decoder) -> tuple[LayerOps, AttentionBackend]:
    return load_ops(target.device, target.dtype), load_backend("auto", target.device, target.dtype)


def _blank(model: EagleModel | Eagle3Model, noise: float) -> Weights:
    """Norms of one and layers of little weight."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.ones(weight.shape) if "norm" in name else noise * torch.randn(weight.shape, generator=generator)
        for name, weight in model.weights().items()
    }


def _filled(model: Model, weights: Weights) -> Model:
    for name, weight in model.weights().items():
        weight.copy_(weights[name])
    model.pack()
    return model


def _ridge(inputs: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """[O, I] the linear map from inputs [T, I] to what is wanted [T, O]."""
    x, y = torch.cat(inputs), torch.cat(wanted)
    gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    solved: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solved.T.float()
