"""Modules for multi-token prediction on disk: three layouts are read, speculators' is written.

    layout        where                                             names of a module
    MiMo          model.mtp_layers.0. in the target's checkpoint    token_layernorm, hidden_layernorm, input_proj, ...
    DeepSeek      model.layers.L. after the target's L layers       enorm, hnorm, eh_proj, ..., shared_head.norm
    speculators   mtp_layers.0. in a folder of its own              as MiMo's

and in all of them those of a decoder layer. MiMo's projection takes [hidden; embedding], the others' [embedding;
hidden]. Only dense modules are read: those of other architectures are known by name and refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from models.attention import AttentionBackend
from models.checkpoint import Checkpoint, CheckpointError, Shape, read_json
from models.config import ModelConfig
from models.families import NATIVE_FAMILIES, HFConfig, describe
from models.heads.head_files import check_kind, fill_head, own_embedding, write_head
from models.heads.mtp import MTPConfig, MTPModel, MTPModule, Side
from models.layers.linear import Packing
from models.layers.ops import LayerOps
from models.target import CausalModel

NORMS: dict[str, tuple[Side, Side]] = {  # option -> (feed, recycle)
    "post": ("post", "post"),
    "pre": ("pre", "pre"),
    "post-pre": ("post", "pre"),
    "pre-post": ("pre", "post"),
}
_SAME_HEAD = 0.99  # cosine of logits: near 0 for two heads that have nothing in common, over 0.999 in bfloat16

_LAYER = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{norm: f"self_attn.{norm}" for norm in ("q_norm", "k_norm")},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_MIMO = {**_LAYER, "enorm": "token_layernorm", "hnorm": "hidden_layernorm", "proj": "input_proj"}
_MIMO["norm"] = "final_layernorm"
_DEEPSEEK = {**_LAYER, "enorm": "enorm", "hnorm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}


@dataclass(frozen=True)
class Layout:
    """How one format stores modules."""

    prefix: str  # of a module's weights; {} stands for its number
    names: Mapping[str, str]  # ours, as in ``MTPModule.weights`` -> the checkpoint's
    hidden_first: bool = False
    embedding: str | None = None  # within the module: one more copy of the target's embedding
    head: str | None = None  # and of its head

    def numbers(self, names: Mapping[str, Shape]) -> list[int]:
        """The numbers of the modules that a checkpoint has."""
        before, after = self.prefix.split("{}")
        found = re.compile(re.escape(before) + r"(\d+)" + re.escape(f"{after}{self.names['proj']}.weight"))
        return sorted(int(match[1]) for name in names if (match := found.fullmatch(name)))

    def weight(self, number: int, ours: str) -> str:
        """The checkpoint's name of a module's weight."""
        prefix, _, kind = ours.rpartition(".")
        return f"{self.prefix.format(number)}{self.names[prefix]}.{kind}"


SPECULATORS = Layout("mtp_layers.{}.", _MIMO)
LAYOUTS = (
    SPECULATORS,
    Layout("model.mtp_layers.{}.", _MIMO, hidden_first=True),
    Layout("model.layers.{}.", _DEEPSEEK, embedding="embed_tokens.weight", head="shared_head.head.weight"),
)

_LATENT = "their modules attend to a latent K/V (MLA) and mix experts"
_EXPERTS = "their modules mix experts"
_GATED = "their modules gate the attention, and their layers keep a state beside K/V"
UNSERVED = {  # model_type -> why its modules are not served
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe": _EXPERTS,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "mimo_v2_flash": "their modules have keys and values of different sizes and a partial rotation",
    "qwen3_next": _GATED,
    "qwen3_5": _GATED,
    "qwen3_5_text": _GATED,
    "qwen3_5_moe": _GATED,
    "qwen3_5_moe_text": _GATED,
}
_UNSERVED_WEIGHTS = {  # part of a weight's name -> the same, for checkpoints of other types
    ".kv_a_proj": _LATENT,
    ".mlp.experts.": _EXPERTS,
}


@dataclass(frozen=True)
class MTPFile:
    """Modules on disk."""

    config: MTPConfig
    checkpoint: Checkpoint
    names: Mapping[
        str, str
    ]  # ours, as in ``MTPModel.weights`` -> the checkpoint's; what is not known stands for itself
    embedding: str | None  # the checkpoint's name of its own copy of the target's embedding
    head: str | None  # and of its head


def open_mtp(folder: Path) -> MTPFile:
    """Find the modules in a folder of their own or in a target's; nothing but names and shapes is read.

    Raises:
        CheckpointError: no modules, modules of an architecture that is not served, a damaged file, a pickle with code
            in it.
    """
    hf = read_json(folder / "config.json")
    _refuse(hf, folder)
    check_kind("mtp", hf, folder)
    checkpoint = Checkpoint.open(folder)
    layout, numbers = _layout(checkpoint, folder)
    for part, reason in _UNSERVED_WEIGHTS.items():
        if any(part in name and name.startswith(layout.prefix.format(numbers[0])) for name in checkpoint.shapes):
            raise CheckpointError(f"the multi-token prediction in {folder} cannot be served: {reason}")
    config = _config(hf, layout, len(numbers), folder)
    names: dict[str, str] = {}
    copies: dict[str, str] = {}
    for index, number in enumerate(numbers):
        prefix = layout.prefix.format(number)
        ours = {layout.weight(number, name): f"modules.{index}.{name}" for name in _module_shapes(config, index)}
        names |= {name: stored for stored, name in ours.items()}
        for name in checkpoint.shapes:
            part = name.removeprefix(prefix)
            if not name.startswith(prefix) or part.endswith("rotary_emb.inv_freq"):
                continue
            if part in (layout.embedding, layout.head):
                copies[part] = name
            elif name not in ours:
                names[name] = name
    return MTPFile(config, checkpoint, names, copies.get(layout.embedding or ""), copies.get(layout.head or ""))


def load_mtp(
    folder: Path,
    target: CausalModel,
    ops: LayerOps,
    attention: AttentionBackend,
    norm: str,
    packing: Packing | None = None,
) -> MTPModel:
    """The modules in a folder, ready to draft for a target.

    Args:
        norm: where the norms of the feeding and the recycling pass stand, a key of ``NORMS``; "" is what the checkpoint
            says or its family does.
        packing: see ``Linear.pack``.

    Raises:
        CheckpointError: as ``open_mtp``; modules for another hidden size, vocabulary, embedding or head than the
            target's; weights that are missing, that no module has or whose shape is wrong.
    """
    file = open_mtp(folder)
    config = replace(file.config, feed=NORMS[norm][0], recycle=NORMS[norm][1]) if norm else file.config
    for what, ours, theirs in (
        ("a hidden size", config.layer.hidden_size, target.hidden_size),
        ("a vocabulary", config.layer.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"the modules in {folder} are made for a target with {what} of {ours}, and this one has {theirs}; use "
                "modules that were trained for this target"
            )
    model = MTPModel(config, target, ops, attention)
    fill_head(model.weights(), file.checkpoint, file.names, folder)
    model.pack(packing)
    _check_copies(file, target, folder)
    return model


def module_shapes(config: MTPConfig) -> dict[str, Shape]:
    """What ``write_mtp`` takes: every weight by speculators' name, such as mtp_layers.0.input_proj.weight [H, 2 H]."""
    return {
        SPECULATORS.weight(index, ours): shape
        for index in range(config.num_modules)
        for ours, shape in _module_shapes(config, index).items()
    }


def write_mtp(
    folder: Path, config: MTPConfig, tensors: Mapping[str, Tensor], *, target: str = "", steps: int = 3
) -> None:
    """Write modules in speculators' format, weights first; each file is replaced at once, so none is half written.

    The norms that feed and recycling pass have no place in that format and stand beside it, as "feed" and "recycle".

    Args:
        tensors: the weights of ``module_shapes(config)``, in the dtype in which they are to be stored.
        target: name of the model that they were made for.
        steps: tokens that they were trained to draft.

    Raises:
        ValueError: other tensors than these, or modules that the format cannot describe.
        OSError: the folder cannot be written to.
    """
    wanted, given = module_shapes(config), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != wanted:
        wrong = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
        raise ValueError(f"these modules have other weights than their config says: {', '.join(wrong[:8])}")
    if config.hidden_first:
        raise ValueError("speculators' modules take [embedding; hidden], and these take [hidden; embedding]")
    write_head(folder, _describe(config, target, steps, next(iter(tensors.values())).dtype), tensors)


def _describe(config: MTPConfig, target: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    proposal = {"proposal_type": "greedy", "speculative_tokens": steps, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["MTPDraftModel"],
        "speculators_model_type": "mtp",
        "transformer_layer_config": describe(config.layer),
        "num_nextn_predict_layers": config.num_modules,
        "feed": config.feed,
        "recycle": config.recycle,
        "dtype": str(dtype).removeprefix("torch."),
        "speculators_config": {
            "algorithm": "mtp",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": []},
        },
    }


def _refuse(hf: HFConfig, folder: Path) -> None:
    """Raise CheckpointError for a model of a type that is known and not served."""
    layer = _layer(hf)
    for name in (hf.get("model_type"), layer.get("model_type"), (hf.get("text_config") or {}).get("model_type")):
        if name in UNSERVED:
            raise CheckpointError(
                f"the multi-token prediction of {name} models cannot be served: {UNSERVED[name]}. Speculate with "
                "another drafter, such as ngram, a draft model or EAGLE"
            )


def _layer(hf: HFConfig) -> HFConfig:
    layer = hf.get("transformer_layer_config", hf)
    return layer if isinstance(layer, dict) else hf


def _layout(checkpoint: Checkpoint, folder: Path) -> tuple[Layout, list[int]]:
    for layout in LAYOUTS:
        numbers = layout.numbers(checkpoint.shapes)
        if numbers:
            return layout, numbers
    if any(name.startswith("mtp.") for name in checkpoint.shapes):
        raise CheckpointError(f"{folder} has modules in Qwen3-Next's layout, which cannot be served: {_GATED}")
    raise CheckpointError(
        f"{folder} has no modules for multi-token prediction: no weight is called "
        f"{', '.join(layout.weight(0, 'proj.weight') for layout in LAYOUTS)}. Give the folder of a model that has them"
    )


def _config(hf: HFConfig, layout: Layout, modules: int, folder: Path) -> MTPConfig:
    layer, sides = _layer(hf), get_args(Side)
    family = NATIVE_FAMILIES.get(str(layer.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{folder}: layers of type {layer.get('model_type')!r} in modules for multi-token prediction are not "
            f"served; those of {', '.join(NATIVE_FAMILIES)} are"
        )
    try:
        config: ModelConfig = replace(family.configure(layer), num_layers=modules)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {reason}") from error
    if any(config.windows):
        raise CheckpointError(f"{folder}: modules for multi-token prediction with a sliding window are not served")
    feed, recycle = hf.get("feed", "post"), hf.get("recycle", "post")
    if feed not in sides or recycle not in sides:
        raise CheckpointError(f'{folder / "config.json"}: "feed" and "recycle" must be one of {", ".join(sides)}')
    return MTPConfig(replace(config, windows=()), layout.hidden_first, cast(Side, feed), cast(Side, recycle))


def _module_shapes(config: MTPConfig, index: int) -> dict[str, Shape]:
    module = MTPModule(config, index, torch.device("meta"), torch.float32)
    return {name: tuple(weight.shape) for name, weight in module.weights().items()}


def _same_head(checkpoint: Checkpoint, name: str, target: CausalModel) -> bool:
    """Whether some products of a stored head with random vectors are the target's logits: its own may be packed."""
    if checkpoint.shapes[name] != (target.vocab_size, target.hidden_size):
        return False
    ((_, head),) = checkpoint.read([name])
    rows = torch.linspace(0, len(head) - 1, min(len(head), 4096)).long()
    probe = torch.randn(4, target.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = (probe @ head[rows].float().T).flatten()
        theirs = target.logits(probe.to(target.device, target.dtype))[:, rows.to(target.device)].cpu().float().flatten()
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > _SAME_HEAD


def _check_copies(file: MTPFile, target: CausalModel, folder: Path) -> None:
    """Raise CheckpointError if modules bring another embedding or head than the target's, which they are to share."""
    differing = []
    if file.embedding and own_embedding(file.checkpoint, file.embedding, target, folder) is not None:
        differing.append("embedding")
    if file.head and not _same_head(file.checkpoint, file.head, target):
        differing.append("head")
    if differing:
        raise CheckpointError(
            f"the modules in {folder} bring another {' and '.join(differing)} than the target's; use modules that "
            "were trained for this target and share them"
        )
