"""EAGLE drafters in the reference's layout with random weights, and the formulas of the papers, written plainly.

The formulas work on whole sequences in dense float64 PyTorch, with no cache and nothing of ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, HEADS, KV_HEADS, MLP = 48, 32, 4, 2, 48  # VOCAB and HIDDEN as in tests/engines.py
EPS = 1e-5
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": EPS,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
Weights = dict[str, Tensor]


def layer_tensors(
    prefix: str, inputs: int, hidden: int = HIDDEN, *, bias: bool = False, qk_norm: bool = False
) -> Weights:
    """The weights of a decoder layer that EAGLE-1 and EAGLE-3 both have."""
    dim = hidden // HEADS
    sizes = {"q": (HEADS * dim, inputs), "k": (KV_HEADS * dim, inputs), "v": (KV_HEADS * dim, inputs)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": size for name, size in sizes.items()}
    shapes["self_attn.o_proj.weight"] = (hidden, HEADS * dim)
    if bias:
        shapes |= {f"self_attn.{name}_proj.bias": (size[0],) for name, size in sizes.items()}
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if qk_norm:
        shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    shapes |= {"mlp.gate_proj.weight": (MLP, hidden), "mlp.up_proj.weight": (MLP, hidden)}
    shapes |= {"mlp.down_proj.weight": (hidden, MLP), "post_attention_layernorm.weight": (hidden,)}
    return {f"{prefix}{name}": draw(name, shape) for name, shape in shapes.items()}


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random weights of the default generator; norms about one."""
    drawn = torch.randn(shape, dtype=torch.float64)
    return 1 + 0.2 * drawn if len(shape) == 1 and "norm" in name else 0.3 * drawn


def save(folder: Path, config: dict[str, Any], tensors: Weights, form: str = "safetensors") -> Path:
    """Write a folder: "safetensors", "bin" (PyTorch's), or "sharded" (safetensors in two files with an index)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "sharded":
        files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
        for file in sorted(set(files.values())):
            save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class Formula:
    """What the formulas need beside the weights."""

    weights: Weights
    embedding: Tensor  # [V, H]
    theta: float = 10_000.0
    window: int | None = None
    flags: set[str] = field(default_factory=set)
    layers: int = 1

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def layer(self, prefix: str, x: Tensor, residual: Tensor) -> Tensor:
        """Causal attention over x [S, I] at positions 0 .. S - 1 and the MLP, over the residual stream [S, H]."""
        length, dim = len(x), self.weights[f"{prefix}self_attn.q_proj.weight"].shape[0] // HEADS
        query, key, value = (self.linear(x, f"{prefix}self_attn.{n}_proj").view(length, -1, dim) for n in "qkv")
        if f"{prefix}self_attn.q_norm.weight" in self.weights:
            query, key = self.norm(query, f"{prefix}self_attn.q_norm"), self.norm(key, f"{prefix}self_attn.k_norm")
        query, key = self.rotate(query), self.rotate(key)
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(HEADS // KV_HEADS, 1)) * dim**-0.5
        back = torch.arange(length)[:, None] - torch.arange(length)
        seen = (back >= 0) & (back < (self.window or length))
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", probs, value.repeat_interleave(HEADS // KV_HEADS, 1)).flatten(1)
        stream = residual + self.linear(attended, f"{prefix}self_attn.o_proj")
        normed = self.norm(stream, f"{prefix}post_attention_layernorm")
        gated = F.silu(self.linear(normed, f"{prefix}mlp.gate_proj")) * self.linear(normed, f"{prefix}mlp.up_proj")
        return stream + self.linear(gated, f"{prefix}mlp.down_proj")

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turns = (1.0 / self.theta ** (torch.arange(half).float() / half)).double()  # float32, as the reference has it
        turned = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(len(x))[:, None, None] * turns)
        out = torch.complex(x[..., :half].double(), x[..., half:].double()) * turned
        return torch.cat([out.real, out.imag], dim=-1)


class Eagle1Formula(Formula):
    """2401.15077, section 4.1, and the reference's code."""

    def enter(self, features: Tensor) -> Tensor:
        return features

    def run(self, tokens: list[int], carries: Tensor) -> tuple[Tensor, Tensor]:
        """(what the target's head takes, carry) [S, H] of tokens 1 .., from the carries [S, H] before each."""
        stream = self.linear(torch.cat([self.embedding[torch.tensor(tokens)], carries], 1), "fc")
        stream = self.layer("layers.0.", stream, stream)
        return stream, stream


class Eagle3Formula(Formula):
    """2503.01840, section 3.1, and the flags that trainers have added."""

    def enter(self, features: Tensor) -> Tensor:
        """fc of the taps [S, 3 H]."""
        if "norm_before_fc" in self.flags:
            features = self.norm(features, "input_norm")
        if "fc_norm" in self.flags:
            features = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(features.chunk(3, 1))], 1)
        return self.linear(features, "fc")

    def run(self, tokens: list[int], carries: Tensor) -> tuple[Tensor, Tensor]:
        """(what the drafter's head takes, carry) [S, H] of tokens 1 .., from the carries [S, H] before each."""
        first = "midlayer." if "midlayer.hidden_norm.weight" in self.weights else "layers.0."
        normed = self.norm(carries, f"{first}hidden_norm")
        embedded = self.norm(self.embedding[torch.tensor(tokens)], f"{first}input_layernorm")
        residual = normed if "norm_before_residual" in self.flags else carries
        stream = self.layer(first, torch.cat([embedded, normed], 1), residual)
        for index in range(1, self.layers):
            name = f"layers.{index}."
            stream = self.layer(name, self.norm(stream, f"{name}input_layernorm"), stream)
        hidden = self.norm(stream, "norm")
        return hidden, hidden if "norm_output" in self.flags else stream
