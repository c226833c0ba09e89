"""Medusa heads for tests: some that know the text, some fitted to a target in a moment."""

from __future__ import annotations

import atexit
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from decoding.batcher import Chain, build
from decoding.text import Tokenizer
from models.attention import load_backend
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.decoder import Decoder
from models.heads.medusa import MedusaConfig, MedusaHeads, write_medusa
from models.kv_cache import KVCache
from models.layers.ops import load_ops
from models.layers.rope import RopeConfig
from models.loader import load_model
from models.target import CausalModel
from models.tree import roots_only
from tests.engines import ROOT


def blind_decoder(embedding: Tensor, head: Tensor, layers: int = 1) -> Decoder:
    """A decoder whose blocks add nothing: its hidden state is the normed embedding [V, H] of the last token alone."""
    vocab, hidden = embedding.shape
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_size=8,
        rope=RopeConfig(dim=8),
        max_len=256,
        norm_eps=1e-9,
    )
    cpu, dtype = torch.device("cpu"), embedding.dtype
    model = Decoder(config, load_ops(cpu, dtype), load_backend("auto", cpu, dtype), cpu, dtype)
    for name, weight in model.weights().items():
        weight.fill_(1.0 if "norm" in name else 0.0)
    model.weights()["embed.weight"].copy_(embedding)
    model.weights()["head.weight"].copy_(head)
    model.pack()
    return model


def hidden_states(target: CausalModel, tokens: Sequence[int]) -> Tensor:
    """[T, H] of one text."""
    pages = list(range(len(tokens) // 16 + 1))
    chain = Chain(torch.tensor(tokens).numpy(), 0, pages)
    trees = roots_only(torch.tensor(tokens[-1:]))
    batch, _ = build([chain], trees, torch.ones_like(trees.parents), [1])
    with torch.inference_mode():
        return target.forward(batch, KVCache(target.kv_spec, len(pages), target.dtype, target.device)).hidden


def fit_weights(target: CausalModel, texts: Sequence[Sequence[int]], head: Tensor, heads: int) -> dict[str, Tensor]:
    """Heads whose block does nothing and whose outputs are ridge regressions to the hidden states to come.

    Args:
        head: [V, H] the target's LM head.
    """
    states = [hidden_states(target, text).double() for text in texts]
    tensors: dict[str, Tensor] = {}
    for k in range(heads):
        seen, wanted = (torch.cat(parts) for parts in zip(*((s[: -k - 1], s[k + 1 :]) for s in states), strict=True))
        gram = seen.T @ seen + 1e-1 * len(seen) * torch.eye(seen.shape[1], dtype=torch.double)
        ahead = torch.linalg.solve(gram, seen.T @ wanted)  # [H, H]: the state of the text k + 1 tokens later
        tensors |= {
            f"{k}.0.linear.weight": torch.zeros(seen.shape[1], seen.shape[1]),
            f"{k}.0.linear.bias": torch.zeros(seen.shape[1]),
            f"{k}.1.weight": (head.double() @ ahead.T).float(),
        }
    return tensors


def make_heads(target: CausalModel, weights: dict[str, Tensor]) -> MedusaHeads:
    """Heads of one block, in memory."""
    vocab, hidden = weights["0.1.weight"].shape
    heads = MedusaHeads(MedusaConfig(hidden, len(weights) // 3, 1, vocab), target.logits, target.device, target.dtype)
    for name, weight in heads.weights().items():
        weight.copy_(weights[name])
    heads.pack()
    return heads


@cache
def demo_heads() -> Path:
    """Heads fitted to the demo target: bad ones, but some guesses are right."""
    model = ROOT / "demo/target"
    target, tokenizer = load_model(model, dtype="float32"), Tokenizer.load(model)
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:12]
    texts = [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]
    ((_, head),) = Checkpoint.open(model).read(["model.embed_tokens.weight"])  # it is tied
    folder = tempfile.mkdtemp(prefix="medusa-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    weights = fit_weights(target, texts, head.float(), 4)
    write_medusa(Path(folder), MedusaConfig(target.hidden_size, 4, 1, target.vocab_size), weights)
    return Path(folder)


def all_paths(depth: int, ranks: int) -> list[tuple[int, ...]]:
    """Every rank path, by brute force."""
    return [path for d in range(1, depth + 1) for path in itertools.product(range(ranks), repeat=d)]
