"""Files of EAGLE-3 drafters: the reference's layout and speculators'.

They differ in config.json and in one name: what the reference calls ``midlayer`` is ``layers.0`` in speculators. Either
may be a single file or sharded, and may bring ``embed_tokens.weight``. A draft vocabulary smaller than the target's
comes with ``d2t``, which holds offsets: entry i is the target's token i + d2t[i]; ``t2d`` says the same once more.

Taps are given twice over in different ways. ``eagle_aux_hidden_state_layer_ids`` of speculators counts the layer that a
hidden state enters; within ``eagle_config``, as SGLang and SpecForge write it, the layer that it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.attention import load_backend
from models.checkpoint import Checkpoint, CheckpointError, read_json
from models.config import ModelConfig
from models.families import describe
from models.heads.eagle import EMBEDDING
from models.heads.eagle3 import Eagle3Config, Eagle3Model, default_taps
from models.heads.head_files import (
    biases_in,
    check_kind,
    check_target,
    fill_head,
    head_kind,
    layer_config,
    own_embedding,
    write_head,
)
from models.layers.linear import Packing
from models.layers.ops import LayerOps, load_ops
from models.target import CausalModel

Layout = Literal["reference", "speculators"]
TAPS = "eagle_aux_hidden_state_layer_ids"
_REDUNDANT = ("t2d", "verifier_lm_head.weight", "verifier_norm.weight")
_SIZES = ("draft_vocab_size", "target_hidden_size")
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def load_eagle3(
    path: Path,
    target: CausalModel,
    *,
    attention: str = "auto",
    ops: LayerOps | None = None,
    tap_shift: int = 0,
    packing: Packing | None = None,
) -> Eagle3Model:
    """Load a folder of either layout.

    Args:
        packing: see ``Linear.pack``.
        tap_shift: added to the checkpoint's taps, for trainers that count them otherwise.

    Raises:
        CheckpointError: no EAGLE-3 drafter, one for another target, or files that are damaged or do not fit; the
            message names cause and fix.
    """
    stated = read_json(path / "config.json")
    check_kind("eagle3", stated, path)
    checkpoint = Checkpoint.open(path)
    names = {canonical(name): name for name in checkpoint.shapes if not name.endswith("rotary_emb.inv_freq")}
    if head_kind(stated, path) is None:
        found = "an EAGLE-1 drafter: load it with --speculate eagle=" if "fc.weight" in names else "no drafter: "
        raise CheckpointError(f"{path} holds {found}{path if 'fc.weight' in names else 'give the folder of one'}")
    config = read_eagle3_config(stated, names, target.num_layers, path)
    config = replace(config, taps=tuple(tap + tap_shift for tap in config.taps))
    _check(config, target, path)
    embedding = own_embedding(checkpoint, names.pop(EMBEDDING, EMBEDDING), target, path)
    if embedding is None and config.layer.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{path} has hidden size {config.layer.hidden_size}, the target {target.hidden_size}, so the drafter needs "
            f"an embedding of its own, and it brings no {EMBEDDING}; get the complete weights"
        )
    token_ids = _token_ids(config, checkpoint, names.pop("d2t", None), path)
    model = Eagle3Model(
        config,
        target,
        ops or load_ops(target.device, target.dtype),
        load_backend(attention, target.device, target.dtype),
        None if token_ids is None else token_ids.to(target.device),
        embedding,
    )
    wanted = {ours: stored for ours, stored in names.items() if ours not in _REDUNDANT}
    fill_head(model.weights(), checkpoint, wanted, path)
    model.pack(packing)
    return model


def read_eagle3_config(
    stated: Mapping[str, Any], names: Mapping[str, str], target_layers: int, path: Path
) -> Eagle3Config:
    """Make a config of a config.json of either layout.

    Args:
        names: of the weights beside it, as ``canonical`` has them.
        target_layers: layers of the target, for the default taps.

    Raises:
        CheckpointError: a key that is missing or cannot be used.
    """
    if "speculators_model_type" in stated:
        layer = _speculators_layer(stated, path)
    else:
        layer = biases_in(names, layer_config(stated, path))
    nested = stated.get("eagle_config") or {}
    try:
        entered = [int(tap) for tap in stated.get(TAPS) or ()]
        left = [int(tap) for tap in nested.get(TAPS) or ()]
        sizes = {name: int(stated[name]) for name in _SIZES if stated.get(name) is not None}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be used: {error}") from error
    return Eagle3Config(
        layer=layer,
        taps=tuple(entered or [index + 1 for index in left] or default_taps(target_layers)),
        draft_vocab_size=sizes.get("draft_vocab_size"),
        target_hidden_size=sizes.get("target_hidden_size"),
        **{flag: bool(stated.get(flag, nested.get(flag, False))) for flag in _FLAGS},
    )


def canonical(name: str) -> str:
    """The name that a weight of either layout has in speculators'."""
    name = name.removeprefix("model.")
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def write_eagle3(
    folder: Path,
    config: Eagle3Config,
    tensors: Mapping[str, Tensor],
    vocabulary: Tensor | None = None,
    *,
    target: Path | None = None,
    layout: Layout = "speculators",
) -> None:
    """Write a drafter; what was in the folder is replaced file by file, never half.

    Args:
        tensors: by the names of ``Eagle3Model.weights`` or of the reference, in the dtype in which they are to be
            stored; with "embed_tokens.weight" if the drafter brings its own embedding.
        vocabulary: [Vd] int64 the target's ids of the draft vocabulary, ascending; d2t and t2d are made of it. None:
            all of the target's.
        target: its folder, whose name is written for the reader of the config.

    Raises:
        ValueError: a layer that the layout cannot describe, or a vocabulary of another size than the config says.
        OSError: the folder cannot be written to.
    """
    named = {canonical(name): tensor for name, tensor in tensors.items()}
    size = config.layer.vocab_size if vocabulary is None else len(vocabulary)
    if config.draft_vocab_size not in (None, size):
        raise ValueError(f"draft_vocab_size is {config.draft_vocab_size}, and the vocabulary has {size} tokens")
    config = replace(config, draft_vocab_size=size)
    if vocabulary is not None:
        ids = vocabulary.to("cpu", torch.int64)
        named["d2t"] = ids - torch.arange(len(ids))
        named["t2d"] = torch.zeros(config.layer.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    if layout == "reference":
        if config.layer.num_layers > 1:
            raise ValueError("the reference's layout has one layer; write speculators'")
        named = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in named.items()}
        described = _reference_config(config)
    else:
        described = _speculators_config(config, target)
    write_head(folder, described, named)


def _check(config: Eagle3Config, target: CausalModel, path: Path) -> None:
    check_target(config.layer, config.tap_size, target, path)
    wrong = [tap for tap in config.taps if not 0 <= tap < target.num_layers]
    if wrong:
        raise CheckpointError(
            f"{path} reads the hidden states that enter layers {', '.join(map(str, config.taps))}, and the target has "
            f"layers 0 to {target.num_layers - 1}; use a drafter that was trained for this target"
        )


def _token_ids(config: Eagle3Config, checkpoint: Checkpoint, stored: str | None, path: Path) -> Tensor | None:
    """[Vd] the target's ids of the draft vocabulary; None if it is the target's own (then d2t is a leftover)."""
    size, vocab = config.num_drafted, config.layer.vocab_size
    if size == vocab:
        return None
    if stored is None:
        raise CheckpointError(f"{path} drafts {size} of {vocab} tokens and lacks d2t, which says which; get all of it")
    ((_, offsets),) = checkpoint.read([stored])
    if list(offsets.shape) != [size]:
        raise CheckpointError(f"{path}: d2t has shape {list(offsets.shape)}, not [{size}]; get all of one drafter")
    ids = torch.arange(size) + offsets.to(torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(set(ids.tolist())) != size:
        raise CheckpointError(
            f"{path}: d2t does not lead to {size} different tokens of {vocab}; its entries must be offsets, the "
            "target's id minus the draft's. Get the file from its source again"
        )
    return ids


def _speculators_layer(stated: Mapping[str, Any], path: Path) -> ModelConfig:
    layer = stated.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise CheckpointError(f"{path / 'config.json'} lacks transformer_layer_config; get the file from its source")
    kind = str(layer.get("model_type", "llama"))
    if kind not in ("llama", "qwen3"):
        raise CheckpointError(
            f"{path} has layers like those of {kind!r}; EAGLE-3 is served with layers of llama and qwen3"
        )
    read = layer_config(layer, path, kind)
    types = list(layer.get("layer_types") or [])
    if "sliding_attention" in types:  # by layer_types alone, whatever else the family goes by
        window = layer.get("sliding_window")
        if not isinstance(window, int) or len(types) != read.num_layers:
            raise CheckpointError(f"{path / 'config.json'} has sliding layers without a sliding_window; mend the file")
        read = replace(read, windows=tuple(window if kind == "sliding_attention" else None for kind in types))
    return read


def _reference_config(config: Eagle3Config) -> dict[str, Any]:
    described = {**describe(config.layer), "model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    described |= {
        "draft_vocab_size": config.num_drafted,
        "tie_word_embeddings": False,
        "eagle_config": {TAPS: [tap - 1 for tap in config.taps], "use_aux_hidden_state": True},
    }
    if config.tap_size != config.layer.hidden_size:
        described["target_hidden_size"] = config.tap_size
    return described | {flag: True for flag in _FLAGS if getattr(config, flag)}


def _speculators_config(config: Eagle3Config, target: Path | None) -> dict[str, Any]:
    described = describe(config.layer)
    if described["model_type"] not in ("llama", "qwen3"):
        raise ValueError("speculators has EAGLE-3 with layers of llama and qwen3 only: biases on all of q, k, v, o")
    described["tie_word_embeddings"] = False
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": described,
        "draft_vocab_size": config.num_drafted,
        "target_hidden_size": config.tap_size,
        **{flag: getattr(config, flag) for flag in _FLAGS},
        "embed_requires_grad": False,
        TAPS: list(config.taps),
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target.name if target else None, "architectures": []},
        },
    }
