"""Large checkpoints written shard by shard: one shard is in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from decoding.errors import ConfigError
from models.checkpoint import Checkpoint, Shape

SHARD_BYTES = 2**31
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    make: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    beside: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json last, so that a folder with one is complete.

    Args:
        shapes: every weight, in the order in which they are to be made and stored.
        make: a weight by its name; called once for each, in that order.
        beside: folder whose tokenizer and generation config are copied.

    Raises:
        ConfigError: the folder holds a model already, or cannot be written to.
    """
    refuse_full(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards = _shards(shapes, dtype, shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({name: make(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = {"total_size": sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize}
            _write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
        for name in _BESIDE:
            if (beside / name).is_file():
                shutil.copyfile(beside / name, folder / name)
        _write_json(folder / "config.json", config)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}); free some space, or choose another folder") from error


def refuse_full(folder: Path) -> None:
    """Raise ConfigError if a folder has a model in it: two models' shards must not mix."""
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds a model already; delete it, or choose another folder")


def _shards(shapes: Mapping[str, Shape], dtype: torch.dtype, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def parameters(folder: Path) -> int:
    """Weights of the checkpoint in a folder; the vocabulary maps of EAGLE-3 are none."""
    shapes = Checkpoint.of_files(sorted(folder.glob("*.safetensors"))).shapes
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in ("d2t", "t2d"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
