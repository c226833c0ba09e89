"""Medusa heads (2401.10774, section 2.1.1): guesses at the tokens after the next, all from one hidden state.

    z = h, then per block z = z + SiLU(W z + b), at last logits_k = U_k z

h is what the LM head is fed, after the final norm. Head k, counted from 0, evaluated at token t predicts token
t + k + 2: at the token before the root it predicts the nodes of depth k + 1. The heads know nothing of each other.

Three formats exist. Medusa-1 keeps the heads in a file of their own, ``medusa_lm_head.pt`` or ``.safetensors``, with
the weights ``{head}.{block}.linear.weight``, ``{head}.{block}.linear.bias`` and ``{head}.{number of blocks}.weight``;
in its second version the last one is left out and the heads share the target's LM head. Medusa-2 keeps them within
the target's own checkpoint, as ``medusa_head.{head}...``. The weights tell which it is: the published config.json of
vicuna-7b-v1.3 counts two heads where the file has five.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import Checkpoint, CheckpointError, Shape, misfits, read_json
from models.heads.head_files import check_kind, write_head
from models.layers.linear import Linear, Packing

HEADS_FILE = "medusa_lm_head.safetensors"
PICKLED_HEADS_FILE = "medusa_lm_head.pt"
_WITHIN_TARGET = "medusa_head."
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_OUTPUT = re.compile(r"(\d+)\.(\d+)\.weight")


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes of a set of heads."""

    hidden_size: int  # the target's
    num_heads: int
    num_layers: int = 1  # residual blocks of each head
    vocab_size: int | None = None  # rows of the heads' own outputs; None: they share the target's LM head (version 2)
    base_model: str = ""  # the target's name, for the reader

    def shapes(self) -> dict[str, Shape]:
        """Every weight as it is called in a file of heads, with its shape."""
        shapes: dict[str, Shape] = {}
        for head in range(self.num_heads):
            for block in range(self.num_layers):
                shapes[f"{head}.{block}.linear.weight"] = (self.hidden_size, self.hidden_size)
                shapes[f"{head}.{block}.linear.bias"] = (self.hidden_size,)
            if self.vocab_size is not None:
                shapes[f"{head}.{self.num_layers}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


@dataclass(frozen=True)
class MedusaFile:
    """Heads on disk."""

    config: MedusaConfig
    checkpoint: Checkpoint
    prefix: str  # what the checkpoint's names have before ours

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by the names of ``MedusaConfig.shapes``, on the CPU, one at a time.

        Raises:
            CheckpointError: for a file that cannot be read to its end.
        """
        for name, weight in self.checkpoint.read(self.prefix + ours for ours in self.config.shapes()):
            yield name.removeprefix(self.prefix), weight


def open_medusa(folder: Path) -> MedusaFile:
    """Find the heads in a folder of heads or of a Medusa-2 model; nothing but names and shapes is read.

    Raises:
        CheckpointError: no heads, a damaged file, a pickle with code in it, weights that are missing, that no Medusa
            head has or whose shape is wrong.
    """
    checkpoint = _checkpoint(folder)
    found = [name for name in checkpoint.shapes if name.startswith(_WITHIN_TARGET)]
    prefix = _WITHIN_TARGET if found else ""
    shapes = {name.removeprefix(prefix): checkpoint.shapes[name] for name in found or checkpoint.shapes}
    stated = read_json(folder / "config.json")
    config = _infer(shapes, stated, folder)
    _check(config, shapes, stated, folder)
    return MedusaFile(config, checkpoint, prefix)


def write_medusa(folder: Path, config: MedusaConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write heads as Medusa-1 does, weights first; each file is replaced at once, so none is ever half written.

    Args:
        tensors: the weights of ``config.shapes()``, in the dtype in which they are to be stored.

    Raises:
        ValueError: other tensors than these.
        OSError: the folder cannot be written to.
    """
    wanted, given = config.shapes(), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != wanted:
        wrong = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
        raise ValueError(f"these heads have other weights than their config says: {', '.join(wrong[:8])}")
    described: dict[str, Any] = {
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": config.num_layers,
        "base_model_name_or_path": config.base_model,
        "hidden_size": config.hidden_size,
    }
    described |= {"version": "2"} if config.vocab_size is None else {"vocab_size": config.vocab_size}
    write_head(folder, described, tensors, HEADS_FILE)


class MedusaHeads:
    """The heads ready to run, without autograd.

    The first blocks of all heads are one product, and with a shared LM head so are the outputs.

    Args:
        shared: the target's ``logits``, for heads without outputs of their own.
    """

    def __init__(
        self, config: MedusaConfig, shared: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self._shared = shared
        hidden, heads = config.hidden_size, config.num_heads

        def linears(count: int, outputs: int, bias: bool) -> list[Linear]:
            return [Linear(hidden, outputs, bias, device, dtype) for _ in range(count)]

        self._first = linears(1 if config.num_layers else 0, heads * hidden, True)
        self._later = [linears(heads, hidden, True) for _ in range(1, config.num_layers)]
        self._outputs = linears(0 if config.vocab_size is None else heads, config.vocab_size or 0, False)

    def logits(self, hidden: Tensor, depth: int) -> Tensor:
        """Logits of the first ``depth`` heads: [S, H] -> [S, depth, V] float32 (float64 for float64 weights)."""
        heads, size = self.config.num_heads, self.config.hidden_size
        states = hidden.expand(depth, -1, -1)  # [depth, S, H]
        for first in self._first:
            moved = F.silu(first(hidden)).view(-1, heads, size).transpose(0, 1)
            states = states + moved[:depth]
        for blocks in self._later:
            moved = torch.stack([block(state) for block, state in zip(blocks, states, strict=False)])
            states = states + F.silu(moved)
        if self._outputs:
            logits = torch.stack([out(state) for out, state in zip(self._outputs, states, strict=False)], dim=1)
            return logits if logits.dtype == torch.float64 else logits.float()
        return self._shared(states.flatten(0, 1)).view(depth, len(hidden), -1).transpose(0, 1)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by the names of ``MedusaConfig.shapes``, to be filled before ``pack``."""
        named: dict[str, Tensor] = {}
        size, last = self.config.hidden_size, self.config.num_layers
        for head in range(self.config.num_heads):
            own = slice(head * size, (head + 1) * size)
            parts = {f"{head}.0.linear": (first, own) for first in self._first}
            parts |= {f"{head}.{i}.linear": (blocks[head], slice(None)) for i, blocks in enumerate(self._later, 1)}
            parts |= {f"{head}.{last}": (out, slice(None)) for out in self._outputs[head : head + 1]}
            for name, (linear, rows) in parts.items():
                assert linear.weight is not None
                named[f"{name}.weight"] = linear.weight[rows]
                if linear.bias is not None:
                    named[f"{name}.bias"] = linear.bias[rows]
        return named

    def pack(self, packing: Packing | None = None) -> None:
        """See ``Linear.pack``."""
        for linear in [*self._first, *(one for blocks in self._later for one in blocks), *self._outputs]:
            linear.pack(packing)


def load_medusa(
    file: MedusaFile,
    shared: Callable[[Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    packing: Packing | None = None,
) -> MedusaHeads:
    """Heads with their weights, packed.

    Args:
        packing: see ``Linear.pack``.

    Raises:
        CheckpointError: for a file that cannot be read to its end.
    """
    heads = MedusaHeads(file.config, shared, device, dtype)
    weights = heads.weights()
    for name, weight in file.read():
        weights[name].copy_(weight)
    heads.pack(packing)
    return heads


def _checkpoint(folder: Path) -> Checkpoint:
    for name in (HEADS_FILE, PICKLED_HEADS_FILE):
        if (folder / name).is_file():
            return Checkpoint.of_files([folder / name])
    whole = Checkpoint.open(folder) if any(folder.glob("*.index.json")) or _has_model(folder) else None
    if whole is None or not any(name.startswith(_WITHIN_TARGET) for name in whole.shapes):
        raise CheckpointError(
            f"{folder} holds no Medusa heads: it has no {HEADS_FILE}, no {PICKLED_HEADS_FILE}, and no model with "
            f"weights called {_WITHIN_TARGET}0.0.linear.weight and so on; give the folder of the heads, or of a "
            "Medusa-2 model"
        )
    return whole


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def _infer(shapes: Mapping[str, Shape], stated: Mapping[str, Any], folder: Path) -> MedusaConfig:
    blocks = [match for match in map(_BLOCK.fullmatch, shapes) if match]
    outputs = [match for match in map(_OUTPUT.fullmatch, shapes) if match]
    strange = sorted(shapes.keys() - {match.string for match in blocks + outputs})
    if strange or not blocks + outputs:
        check_kind("medusa", stated, folder)
        kind = stated.get("architectures") or stated.get("model_type")
        said = f" (its config.json says: {kind})" if kind else ""
        raise CheckpointError(
            f"the weights in {folder} are no Medusa heads{said}: {', '.join(strange[:4]) or 'there are none'}. Give "
            "the folder of heads, whose weights are called 0.0.linear.weight, 0.0.linear.bias, 0.1.weight and so on"
        )
    layers = 1 + max((int(match[2]) for match in blocks), default=-1)
    first = shapes[(outputs or blocks)[0].string]
    return MedusaConfig(
        hidden_size=first[-1],
        num_heads=1 + max(int(match[1]) for match in blocks + outputs),
        num_layers=layers,
        vocab_size=first[0] if outputs else None,
        base_model=str(stated.get("base_model_name_or_path", "")),
    )


def _check(config: MedusaConfig, shapes: Mapping[str, Shape], stated: Mapping[str, Any], folder: Path) -> None:
    fit = misfits(config.shapes(), shapes)
    problems = [fit] if fit else []
    heads, layers = stated.get("medusa_num_heads", 1), stated.get("medusa_num_layers", config.num_layers)
    if not isinstance(heads, int) or heads > config.num_heads:  # fewer is a known slip of published ones
        problems.append(f"config.json says medusa_num_heads {heads}, there are {config.num_heads}")
    if layers != config.num_layers:
        problems.append(f"config.json says medusa_num_layers {layers}, there are {config.num_layers}")
    if problems:
        raise CheckpointError(
            f"the Medusa heads in {folder} are incomplete: {'; '.join(problems)}. Download them again"
        )
