"""From a folder or a hub id to a model that is ready to run. Code that comes with a checkpoint never runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.attention import load_backend
from models.checkpoint import Checkpoint as Checkpoint
from models.checkpoint import CheckpointError as CheckpointError
from models.checkpoint import Cut, misfits, read_json
from models.config import ModelConfig
from models.decoder import Decoder
from models.families import NATIVE_FAMILIES, Family, supports_natively
from models.heads.head_files import check_model
from models.layers.linear import Packing
from models.layers.ops import LayerOps, load_ops
from models.layers.quantization import packing_of
from models.meta_checkpoint import is_meta, meta_config, open_meta
from models.parallel.ranks import ALONE, Ranks
from models.parallel.shards import check_fits, cuts_of
from models.target import CausalModel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_HUB_PICKLES = ("pytorch_model*.bin", "medusa_lm_head.pt")


def resolve(model: str) -> Path:
    """The folder of a model: a local folder as it is, else a hub id's files, downloaded or from the local cache.

    Raises:
        CheckpointError: neither a folder nor a model that the hub gives out.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        return local
    if local.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"there is no folder {model!r}; give the folder of a model or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(model, allow_patterns=list(_HUB_PICKLES), ignore_patterns=["*/*"])
    except (ValueError, OSError) as error:  # bad names, the hub's answers, no connection
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {model!r}, and the hub did not give out a model of that name ({reason}); check the "
            "name and the connection, or give a local folder"
        ) from error
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder, or what stands for it in Meta's layout.

    Raises:
        CheckpointError: if there is none, or it is no JSON object.
    """
    return meta_config(path) if is_meta(path) else read_json(path / "config.json")


def generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json of a model folder; empty if there is none."""
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    attention: str = "auto",
    max_model_len: int | None = None,
    ops: LayerOps | None = None,
    quantization: str = "none",
    room: int | None = None,
    ranks: Ranks = ALONE,
) -> CausalModel:
    """Load the model in a folder: with the native decoder where it can, else through transformers.

    Args:
        dtype: a key of ``DTYPES``, or "auto" for the checkpoint's.
        attention: a name in ``models.attention.BACKENDS``, or "auto".
        max_model_len: the longest text to serve; default: the longest that the model supports.
        ops: element-wise operations of the native decoder; default: the best for the device and dtype.
        quantization: of the native decoder's linear layers, a name in ``models.layers.quantization.FORMATS``.
        room: bytes that the weights of all ranks may take; checked before they are loaded, for the native decoder.
        ranks: those that share the model, each of which loads its part.

    Raises:
        CheckpointError: if the checkpoint cannot be read or served; the message names cause and fix.
        ValueError: for an unknown attention backend or quantization.
        RuntimeError: the backend or the quantization does not work here; the message names the fix.
    """
    hf, place = read_config(path), torch.device(device)
    config = _native_config(hf, path)
    _check_ranks(config, path, ranks.size)
    if config is None:
        from models.transformers_model import load_transformers_model

        if quantization != "none":
            raise _only_native(f"--quantization {quantization}", path)
        return load_transformers_model(
            path, dtype=dtype, device=place, attention=attention, max_model_len=max_model_len
        )
    checkpoint = open_meta(path) if is_meta(path) else Checkpoint.open(path)
    family = NATIVE_FAMILIES[str(hf["model_type"])].trunk_of(hf)
    config = _limited(config, max_model_len)
    if config.tied and _stores_own_head(checkpoint, family):
        config = replace(config, tied=False)
    chosen = resolve_dtype(dtype, hf)
    packing = packing_of(quantization, place, chosen)
    if room is not None:
        repeated = (ranks.size - 1) * math.prod(checkpoint.shapes.get(family.checkpoint_name("embed.weight"), (0,)))
        _check_room(checkpoint, path, chosen.itemsize if quantization == "none" else 1, room, repeated)
    backend = load_backend(attention, place, chosen)
    model = Decoder(config, ops or load_ops(place, chosen), backend, place, chosen, ranks)
    cuts = cuts_of(config, ranks, model.weights())
    fill(model.weights(), checkpoint, family, path, layer_packer(model, packing), cuts)
    model.pack(packing)  # what no layer holds: the head
    return model


def resolve_dtype(dtype: str, hf: Mapping[str, Any]) -> torch.dtype:
    """The torch dtype called ``dtype``; "auto" is the checkpoint's, float32 if it does not say.

    Raises:
        CheckpointError: for a dtype that models do not run in.
    """
    stated = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    name = str(stated).removeprefix("torch.") if dtype == "auto" else dtype
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not supported; set one of: {', '.join(DTYPES)}")
    return DTYPES[name]


def layer_packer(model: Decoder, packing: Packing | None) -> Callable[[str], None]:
    """Packs each layer once its last weight is filled, so that one layer at most is in memory in both forms.

    (Memory of weights that are not filled yet is not taken on a CPU.)
    """
    missing = [len(layer.weights()) for layer in model.layers]

    def filled(name: str) -> None:
        kind, _, rest = name.partition(".")
        if kind != "layers":
            return
        index = int(rest.partition(".")[0])
        missing[index] -= 1
        if not missing[index]:
            model.layers[index].pack(packing)

    return filled


def _check_room(checkpoint: Checkpoint, path: Path, width: int, room: int, repeated: int) -> None:
    """Raise CheckpointError, before anything is loaded, if weights of ``width`` bytes do not fit ``room`` bytes.

    Args:
        repeated: numbers that are held more than once.
    """
    size = width * (repeated + sum(math.prod(shape) for shape in checkpoint.shapes.values()))
    if size > room:
        raise CheckpointError(
            f"the weights in {path} take at least {size / 2**20:.0f} MiB, and the machine (or the container's limit) "
            f"has {room / 2**20:.0f} MiB for them, beside the K/V pool; free memory or raise the limit, lower "
            "--kv-cache-memory, or use --quantization int8 or a smaller model"
        )


def fill(
    weights: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    family: Family,
    path: Path,
    filled: Callable[[str], None] = lambda name: None,
    cuts: Mapping[str, Cut] | None = None,
) -> None:
    """Copy a checkpoint into ``weights`` (``Decoder.weights``), one tensor at a time, converting device and dtype.

    Args:
        filled: called with our name of each weight once it is there.
        cuts: by our names, which part of a stored weight ``weights`` has.

    Raises:
        CheckpointError: naming the weights that are missing, that nothing uses, or whose shape is wrong.
    """
    targets = {family.checkpoint_name(ours): weight for ours, weight in weights.items()}
    spare = {family.checkpoint_name("head.weight")}  # a tied model's head, equal to its embedding
    used = {
        name: shape
        for name, shape in checkpoint.shapes.items()
        if name in targets or not (name in spare or family.ignores(name))
    }
    cut = {family.checkpoint_name(ours): each for ours, each in (cuts or {}).items()}
    wanted = {name: tuple(weight.shape) for name, weight in targets.items()}
    wanted |= {name: each.whole_shape(wanted[name]) for name, each in cut.items()}
    if problems := misfits(wanted, used):
        raise CheckpointError(
            f"the weights in {path} do not fit its config.json: {problems}. Get weights and config of one model"
        )
    ours = {family.checkpoint_name(name): name for name in weights}
    for name, stored_weight in checkpoint.read(targets, cut):
        targets[name].copy_(stored_weight)
        filled(ours[name])


def check_ranks(path: Path, size: int) -> None:
    """Check that the model in a folder can be spread over ``size`` ranks, before anything of it is loaded.

    Raises:
        CheckpointError: it cannot; the message names the sizes that can be, or the models that can.
    """
    _check_ranks(_native_config(read_config(path), path), path, size)


def _check_ranks(config: ModelConfig | None, path: Path, size: int) -> None:
    if config is not None:
        check_fits(config, size)
    elif size > 1:
        raise _only_native("--tensor-parallel-size", path)


def _native_config(hf: Mapping[str, Any], path: Path) -> ModelConfig | None:
    """The config of the native decoder; None for a model that runs through transformers."""
    check_model(hf, path)
    try:
        return NATIVE_FAMILIES[str(hf["model_type"])].configure(hf) if supports_natively(hf) else None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be used: {_reason(error)}") from error


def _only_native(flag: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: {flag} is for models that the native decoder runs ({', '.join(NATIVE_FAMILIES)}), and this one runs "
        "through transformers; leave the flag out"
    )


def _limited(config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    if max_model_len is None:
        return config
    if not 1 <= max_model_len <= config.max_len:
        raise CheckpointError(
            f"--max-model-len {max_model_len} is not possible: this model's config allows 1 to {config.max_len} tokens"
        )
    return replace(config, max_len=max_model_len)


def _stores_own_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether a checkpoint that is said to be tied brings another head; then that one counts, as in transformers."""
    names = {family.checkpoint_name("embed.weight"), family.checkpoint_name("head.weight")}
    if not names <= checkpoint.shapes.keys():
        return False
    embedding, head = (weight for _, weight in checkpoint.read(sorted(names)))
    return embedding.shape == head.shape and not torch.equal(embedding, head)


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
