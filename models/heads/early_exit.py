"""An adapter for early exits: a small MLP between a model's layer E and its LM head, trained on the frozen model.

    x = final norm(stream that leaves layer E)
    hidden = x + W_down (SiLU(W_gate x + b_gate) * (W_up x + b_up)) + b_down

A model that was not trained for early exits (2404.16710) says little about the next token after its first layers, but
much that a map can turn into it; the linear map of that kind is known as the tuned lens (2303.08112). Nothing between
tokens is added: K/V stays that of the model's own layers.

A folder has config.json and model.safetensors with the weights ``gate_proj``, ``up_proj`` and ``down_proj``, each with
``.weight`` and ``.bias``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint, CheckpointError, Shape, read_json
from models.heads.head_files import check_kind, fill_head, write_head
from models.layers.linear import Linear, Packing
from models.layers.ops import LayerOps, load_ops
from models.target import CausalModel

ARCHITECTURE = "EarlyExitAdapter"
_SIZES = {  # our name -> that in config.json
    "exit_layer": "exit_layer",
    "hidden_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of an adapter and of the target that it was trained for."""

    exit_layer: int  # layers that run before it
    hidden_size: int  # the target's
    mlp_size: int  # the adapter's own
    num_layers: int  # the target's
    vocab_size: int  # the target's
    base_model: str = ""  # the target's name, for the reader

    def shapes(self) -> dict[str, Shape]:
        """Every weight as it is called in a file, with its shape."""
        hidden, mlp = self.hidden_size, self.mlp_size
        sizes = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
        weights: dict[str, Shape] = {f"{name}.weight": shape for name, shape in sizes.items()}
        return weights | {f"{name}.bias": shape[:1] for name, shape in sizes.items()}


class ExitAdapter:
    """The adapter ready to run, without autograd. Fill ``weights()``, then ``pack()``."""

    def __init__(self, config: AdapterConfig, ops: LayerOps, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self._ops = ops
        self._gate_up = Linear(config.hidden_size, 2 * config.mlp_size, True, device, dtype)
        self._down = Linear(config.mlp_size, config.hidden_size, True, device, dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return hidden + self._down(self._ops.gated(self._gate_up(hidden), "silu"))

    def weights(self) -> dict[str, Tensor]:
        """Every weight by the names of ``AdapterConfig.shapes``, to be filled before ``pack``."""
        named: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            fused, down = getattr(self._gate_up, kind), getattr(self._down, kind)
            gate, up = fused.chunk(2)
            named |= {f"gate_proj.{kind}": gate, f"up_proj.{kind}": up, f"down_proj.{kind}": down}
        return named

    def pack(self, packing: Packing | None = None) -> None:
        """See ``Linear.pack``."""
        self._gate_up.pack(packing)
        self._down.pack(packing)


def read_adapter(folder: Path) -> tuple[AdapterConfig, Checkpoint]:
    """What an adapter's folder says and holds; nothing but names and shapes of the weights is read.

    Raises:
        CheckpointError: no adapter, that of another kind of drafter, a damaged file.
    """
    stated = read_json(folder / "config.json")
    check_kind("early-exit", stated, folder)
    lacking = [theirs for theirs in _SIZES.values() if type(stated.get(theirs)) is not int or stated[theirs] < 1]
    if lacking:
        raise CheckpointError(
            f"{folder / 'config.json'} is no early-exit adapter's: {', '.join(lacking)} must be whole numbers from 1 "
            "on; give a folder that 'saccade train early-exit' wrote"
        )
    sizes = {ours: int(stated[theirs]) for ours, theirs in _SIZES.items()}
    config = AdapterConfig(**sizes, base_model=str(stated.get("base_model_name_or_path", "")))
    return config, Checkpoint.open(folder)


def load_adapter(folder: Path, target: CausalModel, packing: Packing | None = None) -> ExitAdapter:
    """An adapter with its weights, packed.

    Args:
        packing: see ``Linear.pack``.

    Raises:
        CheckpointError: as ``read_adapter``; weights missing or of another shape; an adapter of another target.
    """
    config, checkpoint = read_adapter(folder)
    for what, trained, served in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("number of layers", config.num_layers, target.num_layers),
        ("vocabulary", config.vocab_size, target.vocab_size),
    ):
        if trained != served:
            raise CheckpointError(
                f"{folder} was trained for a target of {what} {trained}, and this one has {served}; use an adapter "
                "that was trained for this target"
            )
    if config.exit_layer > config.num_layers:
        raise CheckpointError(
            f"{folder / 'config.json'} puts the exit after layer {config.exit_layer} of {config.num_layers}; restore "
            "the file from its source"
        )
    adapter = ExitAdapter(config, load_ops(target.device, target.dtype), target.device, target.dtype)
    fill_head(adapter.weights(), checkpoint, {name: name for name in checkpoint.shapes}, folder)
    adapter.pack(packing)
    return adapter


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter, weights first; each file is replaced at once, so none is ever half written.

    Args:
        tensors: the weights of ``config.shapes()``, in the dtype in which they are to be stored.

    Raises:
        ValueError: other tensors than these.
        OSError: the folder cannot be written to.
    """
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != config.shapes():
        raise ValueError(f"an adapter of {config} has other weights than {given}")
    described: dict[str, Any] = {"architectures": [ARCHITECTURE]}
    described |= {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    write_head(folder, described | {"base_model_name_or_path": config.base_model}, tensors)
