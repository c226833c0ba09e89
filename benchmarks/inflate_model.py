"""A Llama checkpoint padded to a larger one that computes the same function: targets and draft models."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inflate_axes import (
    ANCHOR_NORMED,
    ANCHOR_ROW,
    FREE,
    ZERO,
    Padder,
    anchor_value,
    make_axes,
    padded,
)
from benchmarks.inflate_files import SHARD_BYTES, write_model
from benchmarks.inflate_shapes import Shape
from decoding.errors import ConfigError, ModelError
from models.checkpoint import Checkpoint, CheckpointError, read_json
from models.checkpoint import Shape as TensorShape
from models.config import ModelConfig
from models.families import LLAMA_NAMES, NATIVE_FAMILIES, HFConfig

_NORMS = ("input_norm", "mlp_norm")
PARTS = ("q", "k", "v", "o", "gate", "up", "down")


class Inflation:
    """One model on its way from a small shape to a large one.

    Args:
        context: positions of the large model, where they are to be more than the small one's: its text is meaningless
            there, its cost is not.

    Raises:
        ModelError: no Llama checkpoint, or one that cannot be read.
        ConfigError: a shape that cannot hold it.
    """

    def __init__(self, source: Path, shape: Shape, *, dtype: torch.dtype, context: int | None, seed: int) -> None:
        self.source, self.shape = source, shape
        self.hf, self.small = read_llama(source)
        small = Shape.of(self.small)
        shape.holds(small)
        if shape.head_dim != small.head_dim and self.small.rope.kind != "default":
            raise ConfigError(
                f"RoPE of type {self.small.rope.kind!r} cannot be stretched; keep head_dim {small.head_dim}"
            )
        self.axes = make_axes(small, shape)
        self.pad = Padder((small.hidden, shape.hidden), dtype, seed)
        self.context = max(context or 0, self.small.rope.trained_len)
        self.anchor = anchor_value(self.small.norm_eps, small.hidden) if self.axes.anchor is not None else 0.0

    @cached_property
    def places(self) -> list[int]:
        """The large model's number of each real layer: as evenly spread as it goes, and the first is the first."""
        return [layer * self.shape.layers // self.small.num_layers for layer in range(self.small.num_layers)]

    def tap(self, tap: int) -> int:
        """Where the large model has the residual stream that enters a layer of the small one (its number: leaves)."""
        return self.places[tap] if tap < self.small.num_layers else self.shape.layers

    @property
    def padded_eps(self) -> float:
        """For norms over padded vectors without the anchor."""
        return self.small.norm_eps * self.small.hidden_size / self.shape.hidden

    @property
    def query_scale(self) -> float:
        """The softmax divides by the root of head_dim."""
        return math.sqrt(self.shape.head_dim / self.small.head_dim)

    def layer_config(self, config: ModelConfig, layers: int) -> ModelConfig:
        """A drafter's layers, which are of the target's own kind, in the target's large shape."""
        shape = self.shape
        return replace(
            config,
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            num_layers=layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            mlp_size=shape.mlp,
            rope=replace(config.rope, dim=shape.head_dim, trained_len=self.context, original_len=self.context),
            max_len=self.context,
            norm_eps=self.padded_eps,
        )

    def config(self) -> dict[str, Any]:
        """config.json of the large model."""
        shape = self.shape
        eps = self.padded_eps - self.anchor**2 / shape.hidden
        return dict(self.hf) | {
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "rms_norm_eps": eps,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": shape.tied,
            "dtype": str(self.pad.dtype).removeprefix("torch."),
        }

    def shapes(self) -> dict[str, TensorShape]:
        """Every weight of the large model in the order of the file."""
        shape = self.shape
        named: dict[str, TensorShape] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
        sizes = {part: (len(rows), len(columns)) for part, (rows, columns) in self.axes.of_layer(real=True).items()}
        for layer in range(shape.layers):
            named |= {layer_name(part, layer): (shape.hidden,) for part in _NORMS}
            named |= {layer_name(part, layer): sizes[part] for part in PARTS}
        named["model.norm.weight"] = (shape.hidden,)
        return named if shape.tied else named | {"lm_head.weight": (shape.vocab, shape.hidden)}

    def make(self, name: str) -> Tensor:
        """One weight of the large model, by its name."""
        if name == "model.embed_tokens.weight":
            return self._embedding()
        if name == "lm_head.weight":
            return self.head(self._weights["model.embed_tokens.weight" if self.small.tied else "lm_head.weight"])
        if name == "model.norm.weight":
            return self._final_norm()
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        part = next(p for p in (*_NORMS, *PARTS) if layer_name(p, 0) == f"model.layers.0.{rest}")
        # an added layer is noise like the real one before it
        like = max(index for index, place in enumerate(self.places) if place <= int(layer))
        weight = self._weights[layer_name(part, like)]
        return self.layer_part(part, weight, real=self.places[like] == int(layer))

    def layer_part(self, part: str, weight: Tensor, *, real: bool = True, columns: Tensor | None = None) -> Tensor:
        """A weight of a decoder layer.

        Args:
            columns: what q, k and v read, where it is not the stream.
        """
        if part in _NORMS:
            return self.pad.norm(weight, self.axes.stream)
        rows, read = self.axes.of_layer(real=real)[part]
        if columns is not None and part in ("q", "k", "v"):
            read = columns
        return self.pad.matrix(weight, rows, read, self.query_scale if part == "q" and real else 1.0)

    def head(self, weight: Tensor, rows: int | None = None) -> Tensor:
        """[rows, H] of the small [V, H]; ids that the small model does not have never win."""
        tokens = padded(len(weight), rows or self.shape.vocab, FREE)
        wide = self.pad.matrix(weight, tokens, self.axes.stream)
        if self.axes.anchor is not None:
            wide[len(weight) :, self.axes.anchor] = ANCHOR_ROW
        return wide

    def write(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the large model.

        Raises:
            ConfigError: see ``write_model``.
        """
        write_model(
            folder,
            self.config(),
            self.shapes(),
            self.make,
            dtype=self.pad.dtype,
            beside=self.source,
            shard_bytes=shard_bytes,
        )

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        checkpoint = Checkpoint.open(self.source)
        return dict(checkpoint.read(checkpoint.shapes))

    def _embedding(self) -> Tensor:
        """[V, H]: as a product with one-hot vectors, whose padded entries never come."""
        weight = self._weights["model.embed_tokens.weight"]
        tokens = padded(len(weight), self.shape.vocab, ZERO)
        wide = self.pad.matrix(weight.T, self.axes.written, tokens).T
        if self.axes.anchor is not None:
            wide[:, self.axes.anchor] = self.anchor
            if self.shape.tied:
                wide[len(weight) :, self.axes.anchor] = ANCHOR_ROW
        return wide

    def _final_norm(self) -> Tensor:
        wide = self.pad.norm(self._weights["model.norm.weight"], self.axes.stream)
        if self.axes.anchor is not None:
            wide[self.axes.anchor] = ANCHOR_NORMED / self.anchor * self.pad.shrink
        return wide


def check_layer(layer: ModelConfig, target: Inflation, folder: Path) -> None:
    """Raise ModelError unless a drafter's layers are of the small target's own kind and sizes."""
    alike = replace(Shape.of(target.small), layers=layer.num_layers, tied=layer.tied)
    if Shape.of(layer) != alike or layer.qkv_bias or layer.mlp_bias or layer.qk_norm or any(layer.windows):
        raise ModelError(
            f"{folder} has layers of other sizes or another kind than its target; only like ones are padded"
        )


def layer_name(part: str, layer: int) -> str:
    return f"{LLAMA_NAMES['layers.{}.' + part].format(layer)}.weight"


def read_llama(folder: Path) -> tuple[HFConfig, ModelConfig]:
    """config.json of a Llama model, as it is and as flags.

    Raises:
        ModelError: none there, or a model that cannot be inflated.
    """
    try:
        hf = read_json(folder / "config.json")
        if hf.get("model_type") != "llama":
            raise ModelError(f"{folder} holds a {hf.get('model_type')!r} model; only Llama models can be inflated")
        config = NATIVE_FAMILIES["llama"].configure(hf)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {error}") from error
    if config.qkv_bias or config.mlp_bias:
        raise ModelError(f"{folder} has biases; only Llama models without can be inflated")
    return hf, config
