"""Trained drafters padded for an inflated target: EAGLE-3, MTP, Medusa heads, adapters for early exits.

Their layers read and write the target's padded stream, so they are padded as it is. The target's anchor reaches them
through taps, embeddings and the final norm's output; they ignore it. Where a norm of theirs sees it, it counts as a
part of eps, or of the hidden state's length, of one in ten millions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.inflate_axes import FREE, ZERO, padded, repeated
from benchmarks.inflate_files import refuse_full
from benchmarks.inflate_model import Inflation, check_layer, layer_name
from benchmarks.inflate_shapes import drafted_vocabulary
from decoding.errors import ModelError
from models.checkpoint import Checkpoint, read_json
from models.heads.eagle import EMBEDDING
from models.heads.eagle3_files import canonical, read_eagle3_config, write_eagle3
from models.heads.early_exit import read_adapter, write_adapter
from models.heads.medusa import open_medusa, write_medusa
from models.heads.mtp_files import SPECULATORS, open_mtp, write_mtp


def inflate_eagle3(source: Path, folder: Path, target: Inflation) -> None:
    """An EAGLE-3 drafter: its layer at the target's sizes, a draft vocabulary padded with ids that are never drawn.

    Raises:
        ModelError: no such drafter, or one with an embedding of its own.
        ConfigError: ``folder`` is not empty.
    """
    stored = _tensors(source)
    tensors = {canonical(name): weight for name, weight in stored.items()}
    if EMBEDDING in tensors:
        raise ModelError(f"{source} brings an embedding of its own, which cannot be inflated; use one that shares")
    names = {name: name for name in tensors}
    config = read_eagle3_config(read_json(source / "config.json"), names, target.small.num_layers, source)
    check_layer(config.layer, target, source)
    offsets = tensors.pop("d2t", None)
    tensors.pop("t2d", None)
    real = torch.arange(config.num_drafted) + (0 if offsets is None else offsets)
    old, new = target.small.vocab_size, target.shape.vocab
    rows = min(drafted_vocabulary(target.shape, config.num_drafted), new - old + config.num_drafted)
    vocabulary = torch.cat([real, torch.arange(old, old + rows - config.num_drafted)])
    inputs = repeated(target.axes.stream, 2, config.layer.hidden_size)
    features = repeated(target.axes.stream, len(config.taps), config.tap_size)
    made: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if name == "fc.weight":
            made[name] = target.pad.matrix(weight, target.axes.written, features)
        elif name == "lm_head.weight":
            made[name] = target.head(weight, rows)
        elif name == "input_norm.weight":
            made[name] = target.pad.norm(weight, features)
        elif weight.dim() == 1:
            made[name] = target.pad.norm(weight, target.axes.stream)
        else:
            first = name.startswith("layers.0.")
            made[name] = target.layer_part(_part(name), weight, columns=inputs if first else None)
    wide = replace(
        config,
        layer=target.layer_config(config.layer, config.layer.num_layers),
        taps=tuple(target.tap(tap) for tap in config.taps),
        draft_vocab_size=rows,
        target_hidden_size=target.shape.hidden,
    )
    refuse_full(folder)
    write_eagle3(folder, wide, made, None if rows == new else vocabulary, target=folder.with_name("target"))


def inflate_mtp(source: Path, folder: Path, target: Inflation) -> None:
    """Modules for multi-token prediction; embedding and head are the target's.

    Raises:
        ModelError: no such modules.
        ConfigError: ``folder`` is not empty.
    """
    file = open_mtp(source)
    check_layer(file.config.layer, target, source)
    stored = {theirs: ours for ours, theirs in file.names.items()}
    both = repeated(target.axes.stream, 2, target.small.hidden_size)
    made: dict[str, Tensor] = {}
    for theirs, weight in file.checkpoint.read(stored):
        _, number, name = stored[theirs].split(".", 2)
        part = name.removesuffix(".weight")
        if part == "proj":
            wide = target.pad.matrix(weight, target.axes.written, both)
        elif weight.dim() == 1:
            wide = target.pad.norm(weight, target.axes.stream)
        else:
            wide = target.layer_part(part, weight)
        made[SPECULATORS.weight(int(number), name)] = wide
    refuse_full(folder)
    made = dict(sorted(made.items(), key=lambda item: item[1].dim(), reverse=True))  # the first one's dtype is stated
    layer = target.layer_config(file.config.layer, file.config.num_modules)
    write_mtp(folder, replace(file.config, layer=layer), made, target="target")


def inflate_medusa(source: Path, folder: Path, target: Inflation) -> None:
    """Medusa heads: blocks at the target's width, outputs for a quarter of its vocabulary.

    Raises:
        ModelError: no such heads.
        ConfigError: ``folder`` is not empty.
    """
    file = open_medusa(source)
    rows = None if file.config.vocab_size is None else drafted_vocabulary(target.shape, file.config.vocab_size)
    made: dict[str, Tensor] = {}
    for name, weight in file.read():
        if name.endswith(".linear.weight"):
            made[name] = target.pad.matrix(weight, target.axes.written, target.axes.stream)
        elif name.endswith(".linear.bias"):
            made[name] = target.pad.vector(weight, target.axes.written)
        else:
            made[name] = target.head(weight, rows)
    config = replace(file.config, hidden_size=target.shape.hidden, vocab_size=rows, base_model="target")
    refuse_full(folder)
    write_medusa(folder, config, made)


def inflate_early_exit(source: Path, folder: Path, target: Inflation) -> None:
    """An adapter for early exits, as much wider as the target is; the exit is where the real layers before it end.

    Raises:
        ModelError: no such adapter.
        ConfigError: ``folder`` is not empty.
    """
    config, checkpoint = read_adapter(source)
    units = config.mlp_size * target.shape.hidden // config.hidden_size
    gate, up = (padded(config.mlp_size, units, value) for value in (FREE, ZERO))
    rows = {"gate_proj": gate, "up_proj": up, "down_proj": target.axes.written}
    columns = {"gate_proj": target.axes.stream, "up_proj": target.axes.stream, "down_proj": up}
    made: dict[str, Tensor] = {}
    for name, weight in checkpoint.read(config.shapes()):
        part, _, kind = name.partition(".")
        if kind == "bias":
            made[name] = target.pad.vector(weight, rows[part])
        else:
            made[name] = target.pad.matrix(weight, rows[part], columns[part])
    wide = replace(
        config,
        exit_layer=target.tap(config.exit_layer),
        hidden_size=target.shape.hidden,
        mlp_size=units,
        num_layers=target.shape.layers,
        vocab_size=target.shape.vocab,
        base_model="target",
    )
    refuse_full(folder)
    write_adapter(folder, wide, made)


HEADS: Mapping[str, Callable[[Path, Path, Inflation], None]] = {
    "eagle3": inflate_eagle3,
    "mtp": inflate_mtp,
    "medusa": inflate_medusa,
    "early-exit": inflate_early_exit,
}


def _part(name: str) -> str:
    """Ours of a layer's matrix, such as q of layers.0.self_attn.q_proj.weight."""
    kind = name.split(".", 2)[2]
    return next(
        part for part in ("q", "k", "v", "o", "gate", "up", "down") if layer_name(part, 0).endswith(f"0.{kind}")
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return dict(checkpoint.read(checkpoint.shapes))
