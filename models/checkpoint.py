"""Weights on disk: safetensors or PyTorch files, single or sharded, read tensor by tensor."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shape = tuple[int, ...]
_SHOWN = 8  # names in one message


class CheckpointError(Exception):
    """A checkpoint that cannot be found, read or served. The message names the cause and the fix."""


@dataclass(frozen=True)
class Cut:
    """The part ``start`` .. ``stop`` - 1 of dimension ``dim`` of a weight, of ``whole`` in all."""

    dim: int
    start: int
    stop: int
    whole: int

    def whole_shape(self, part: Shape) -> Shape:
        """The shape of the weight whose part has shape ``part``."""
        return (*part[: self.dim], self.whole, *part[self.dim + 1 :])

    @property
    def index(self) -> tuple[slice, ...]:
        """What to index the weight with."""
        return (*[slice(None)] * self.dim, slice(self.start, self.stop))


@dataclass(frozen=True)
class Checkpoint:
    """Names, shapes and files of a checkpoint's weights; the weights themselves stay on disk."""

    files: dict[str, Path]  # weight -> the file that holds it
    shapes: dict[str, Shape]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the index and the headers of a checkpoint folder.

        Raises:
            CheckpointError: no weights, a missing shard, a damaged file, or a pickle with code in it.
        """
        return cls.of_files(_weight_files(folder))

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> Checkpoint:
        """The same for files of any name; .safetensors by their suffix, others are PyTorch's.

        Raises:
            CheckpointError: as ``open``.
        """
        files: dict[str, Path] = {}
        shapes: dict[str, Shape] = {}
        for path in paths:
            for name, shape in _shapes(path).items():
                files[name], shapes[name] = path, shape
        return cls(files, shapes)

    def read(self, names: Iterable[str], cuts: Mapping[str, Cut] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The named weights on the CPU, one at a time, file by file.

        Args:
            cuts: of weights of which no more than a part is read.

        Raises:
            CheckpointError: for a file that cannot be read to its end.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, wanted in by_file.items():
            if path.suffix == ".safetensors":
                yield from _read_safetensors(path, wanted, cuts or {})
            else:
                weights = _unpickle(path)
                yield from ((name, _cut(weights[name], (cuts or {}).get(name))) for name in wanted)


def misfits(wanted: Mapping[str, Shape], present: Mapping[str, Shape]) -> str:
    """How the weights of a checkpoint differ from those that are wanted, for people to read; empty if they do not."""
    problems = _listed("missing", wanted.keys() - present.keys())
    problems += _listed("unknown to this architecture", present.keys() - wanted.keys())
    problems += [
        f"{name} has shape {list(present[name])}, not {list(wanted[name])}"
        for name in sorted(wanted.keys() & present.keys())
        if wanted[name] != present[name]
    ]
    return "; ".join(problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []))


def _listed(what: str, names: Collection[str]) -> list[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(sorted(names)[:_SHOWN])}{more}"] if names else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if it is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; is it the folder of a model?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore the file from its source") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; restore the file from its source")
    return content


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _shards(index)
    raise CheckpointError(
        f"{folder} holds no weights: there is no model.safetensors, no model.safetensors.index.json and no "
        "pytorch_model.bin in it; give the folder of a complete model"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map; restore the file from its source")
    shards = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {', '.join(missing)}, named by {index.name}; download it again")
    return [index.parent / shard for shard in shards]


def _shapes(path: Path) -> dict[str, Shape]:
    if path.suffix != ".safetensors":
        return {name: tuple(weight.shape) for name, weight in _unpickle(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_safetensors(path: Path, names: list[str], cuts: Mapping[str, Cut]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_slice(name)[cuts[name].index] if name in cuts else file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _cut(weight: Tensor, cut: Cut | None) -> Tensor:
    return weight if cut is None else weight[cut.index]


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a PyTorch file, memory-mapped where its format allows; code in it is refused, never run."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise _damaged(path, ValueError("it is no file of PyTorch")) from error
        raise CheckpointError(
            f"{path} holds Python objects beside tensors, which could run code, so it is not loaded; convert the "
            "checkpoint to safetensors where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} must hold a dictionary of tensors; convert the checkpoint to safetensors")
    return weights


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == pickle.PROTO


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or cut short ({error}); download it again")
