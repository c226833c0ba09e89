"""Folders of trained drafters: what a config.json announces, filling a module with the weights, and writing both."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import Checkpoint, CheckpointError, misfits
from models.config import ModelConfig
from models.decoder import DecoderLayer
from models.families import LLAMA_NAMES, NATIVE_FAMILIES, UnsupportedConfig
from models.target import CausalModel

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class HeadKind:
    """A kind of drafter that public checkpoints hold."""

    title: str
    drafter: str | None = None  # what loads it: --speculate DRAFTER=PATH
    speculators: tuple[str, ...] = ()  # values of speculators_model_type
    architectures: tuple[str, ...] = ()  # entries of architectures
    keys: tuple[str, ...] = ()  # keys of config.json that no other kind has


# the first that fits counts: P-EAGLE and DeepSeek's attention come as variants of EAGLE-3's config
HEAD_KINDS = {
    "peagle": HeadKind("P-EAGLE", None, ("peagle",), (), ("parallel_drafting", "ptd_token_id")),
    "eagle3-mla": HeadKind(
        "EAGLE-3 with DeepSeek's attention", None, (), ("Eagle3DeepseekV2ForCausalLM",), ("kv_lora_rank",)
    ),
    "dflash": HeadKind("DFlash", None, ("dflash",), ("DFlashDraftModel",), ("dflash_config",)),
    "dflash2": HeadKind("DFlash2", None, ("dflash2",)),
    "dspark": HeadKind("DSpark", None, ("dspark",), ("Qwen3DSparkModel",), ("dspark_config",)),
    "eagle3": HeadKind(
        "EAGLE-3",
        "eagle3",
        ("eagle3",),
        ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"),
        ("draft_vocab_size",),
    ),
    "eagle": HeadKind("EAGLE-1", "eagle", (), ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM")),
    "speculators-eagle": HeadKind("EAGLE-1 in the speculators format", None, ("eagle",), ("EagleSpeculator",)),
    "medusa": HeadKind("Medusa", "medusa", ("medusa",), ("MedusaModel",), ("medusa_num_heads",)),
    "hydra": HeadKind("Hydra", None, ("hydra",), (), ("hydra_num_heads",)),
    "mtp": HeadKind("MTP", "mtp", ("mtp",), ("MTPSpeculator",), ("num_nextn_predict_layers",)),
    "early-exit": HeadKind("an early-exit adapter", "early-exit", (), ("EarlyExitAdapter",), ("exit_layer",)),
    "mlp": HeadKind("an MLP speculator", None, ("mlp",), ("MLPSpeculatorPreTrainedModel",)),
}


def head_kind(config: Mapping[str, Any], path: Path) -> str | None:
    """The key in ``HEAD_KINDS`` of what a config.json announces; None if it is a model's like any other.

    EAGLE-1 as published is such a case: its config.json is that of a Llama model with one layer.

    Raises:
        CheckpointError: a drafter of a kind that nobody knows, with the most similar known name.
    """
    stated = config.get("speculators_model_type")
    listed = config.get("architectures") or []
    for name, kind in HEAD_KINDS.items():
        if stated in kind.speculators:
            return name
        if stated is not None:
            continue  # where a config names its kind, nothing else in it counts
        if any(one in kind.architectures for one in listed) or any(config.get(key) for key in kind.keys):
            return name
    unknown = [str(stated)] if stated else [str(one) for one in listed if _sounds_like_a_head(str(one))]
    if unknown:
        known = [one for kind in HEAD_KINDS.values() for one in (kind.speculators if stated else kind.architectures)]
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        raise CheckpointError(
            f"{path} announces a drafter of the unknown kind {unknown[0]!r} (the most similar known one is "
            f"{close[0]!r}); use a checkpoint of one that is served: {served_kinds()}"
        )
    return None


def check_kind(wanted: str, config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError, with what to do, if a config.json announces a drafter other than ``wanted``."""
    name = head_kind(config, path)
    if name is None or name == wanted:
        return
    kind = HEAD_KINDS[name]
    remedy = (
        f"load it with --speculate {kind.drafter}={path}"
        if kind.drafter
        else f"there is no drafter for these; use a checkpoint of one that is served: {served_kinds()}"
    )
    raise CheckpointError(f"{path} holds {kind.title}, not {HEAD_KINDS[wanted].title}: {remedy}")


def check_model(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError, with what to do, if a config.json is a drafter's and no model's.

    Those of published drafters that pass for a model's are found by their weights.
    """
    if "model_type" in config or (name := head_kind(config, path)) is None:
        return
    kind = HEAD_KINDS[name]
    use = f": use it beside its target, with --speculate {kind.drafter}={path}" if kind.drafter else ""
    raise CheckpointError(f"{path} holds a drafter ({kind.title}) and no model{use}")


def served_kinds() -> str:
    return ", ".join(kind.title for kind in HEAD_KINDS.values() if kind.drafter)


def layer_config(config: Mapping[str, Any], path: Path, model_type: str = "llama") -> ModelConfig:
    """A drafter's decoder layers, read as a model of ``model_type`` would be.

    Raises:
        CheckpointError: a key that is missing or cannot be used.
    """
    try:
        return NATIVE_FAMILIES[model_type].configure(config)
    except KeyError as error:
        raise CheckpointError(f"{path / 'config.json'} lacks {error}; get weights and config of one drafter") from error
    except UnsupportedConfig as error:
        raise CheckpointError(f"{path / 'config.json'} asks for {error}, which no drafter is served with") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be used: {error}") from error


def biases_in(names: Collection[str], layer: ModelConfig) -> ModelConfig:
    """``layer`` with the biases and norms that layer 0 of the checkpoint has, where its config.json cannot say.

    EAGLE's own files have no flags for them: the reference's layer has none, other trainers add them.
    """
    attention = "layers.0.self_attn."
    return replace(
        layer,
        qkv_bias=f"{attention}q_proj.bias" in names,
        o_bias=f"{attention}o_proj.bias" in names,
        mlp_bias="layers.0.mlp.gate_proj.bias" in names,
        qk_norm=f"{attention}q_norm.weight" in names,
    )


def check_target(layer: ModelConfig, feature_size: int, target: CausalModel, path: Path) -> None:
    """Raise CheckpointError unless a drafter was trained for a target of these sizes."""
    for what, trained, served in (
        ("hidden size", feature_size, target.hidden_size),
        ("vocabulary", layer.vocab_size, target.vocab_size),
    ):
        if trained != served:
            raise CheckpointError(
                f"{path} was trained for a target of {what} {trained}, and this one has {served}; use a drafter that "
                "was trained for this target"
            )


def layer_weights(layer: DecoderLayer, index: int) -> dict[str, Tensor]:
    """The weights of a layer by the names of Llama checkpoints: "layers.0.self_attn.q_proj.weight"."""
    named: dict[str, Tensor] = {}
    for ours, weight in layer.weights().items():
        name, _, kind = ours.rpartition(".")
        stored = LLAMA_NAMES["layers.{}." + name].format(index).removeprefix("model.")
        named[f"{stored}.{kind}"] = weight
    return named


def fill_head(
    weights: Mapping[str, Tensor], checkpoint: Checkpoint, stored_names: Mapping[str, str], path: Path
) -> None:
    """Copy the weights of a checkpoint, one at a time, converting device and dtype.

    Args:
        weights: what is to be filled, by names of our own.
        stored_names: for each weight that is wanted, and each that the checkpoint has and ought to mean something:
            our name -> its name there.

    Raises:
        CheckpointError: naming the weights that are missing, that nothing uses, or whose shape is wrong.
    """
    targets = {stored_names.get(name, name): weight for name, weight in weights.items()}
    present = {stored: checkpoint.shapes[stored] for stored in stored_names.values() if stored in checkpoint.shapes}
    if problems := misfits({name: tuple(weight.shape) for name, weight in targets.items()}, present):
        raise CheckpointError(
            f"the weights in {path} do not fit its config.json and the target: {problems}. Get weights and config of "
            "one drafter, trained for this target"
        )
    for stored, tensor in checkpoint.read(targets):
        targets[stored].copy_(tensor)


def own_embedding(checkpoint: Checkpoint, name: str, target: CausalModel, path: Path) -> Tensor | None:
    """The embedding that a drafter brings, [V, H]; None if it brings none or brings the target's.

    Raises:
        CheckpointError: it has another number of tokens than the target.
    """
    shape = checkpoint.shapes.get(name)
    if shape is None:
        return None
    if shape[0] != target.vocab_size:
        raise CheckpointError(
            f"{path} embeds {shape[0]} tokens and the target has {target.vocab_size}; use a drafter trained for this "
            "target"
        )
    ((_, stored),) = checkpoint.read([name])
    own = stored.to(target.device, target.dtype)
    if shape[1] == target.hidden_size:
        with torch.inference_mode():
            if torch.equal(own, target.embed(torch.arange(shape[0], device=target.device))):
                return None
    return own


def write_head(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: str = WEIGHTS_FILE
) -> None:
    """Write the weights as ``file`` and config.json; each is replaced at once, so neither is ever half written.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{file}.part"
    try:
        try:
            save_file(_apart(tensors), part, metadata={"format": "pt"})
        except SafetensorError as error:  # also what a full disk gives
            raise OSError(f"{folder / file} cannot be written: {error}") from error
        part.replace(folder / file)
        part.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        part.replace(folder / "config.json")
    finally:
        part.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, without memory in common, which safetensors refuses."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        memory = stored.untyped_storage().data_ptr()
        apart[name] = stored.clone() if memory in taken else stored
        taken.add(memory)
    return apart


def _sounds_like_a_head(architecture: str) -> bool:
    lowered = architecture.lower()
    return any(word in lowered for word in ("eagle", "medusa", "mtp", "hydra", "speculator", "draft", "dspark"))
