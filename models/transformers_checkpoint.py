"""Loading a transformers checkpoint strictly, and making its positions independent of the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.checkpoint import CheckpointError
from models.layers.rope import RopeConfig, supported_len

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_checkpoint(path: Path, dtype: str) -> PreTrainedModel:
    """The causal LM in folder ``path`` on the CPU, every weight from its files. Code in the folder is never run.

    Raises:
        CheckpointError: if transformers has no causal LM of that type, or a weight is missing, left over or misshapen.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    config = _load_config(path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True if any(path.glob("*.safetensors")) else None,
            ignore_mismatched_sizes=True,  # they are in the report, which is checked
            output_loading_info=True,
            **({"experts_implementation": "eager"} if dtype == "float64" else {}),  # the fused one has no float64
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot load this {config.model_type!r} model: {_told(error)}"
        ) from error
    problems = [
        *(f"missing weight {name}" for name in sorted(report["missing_keys"])),
        *(
            f"unknown weight {name}"
            for name in sorted(report["unexpected_keys"])
            if not name.startswith("medusa_head.")
        ),
        *(
            f"weight {name} has shape {list(found)}, the configuration says {list(wanted)}"
            for name, found, wanted in sorted(report["mismatched_keys"])
        ),
        *report["error_msgs"],
    ]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{path}: {', '.join(problems[:8])}{more}")
    loaded: PreTrainedModel = model
    return loaded


def _load_config(path: Path) -> PretrainedConfig:
    try:
        raw: dict[str, Any] = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable config.json: {error}") from error
    kind = raw.get("model_type")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "it brings its own code, which is never run" if "auto_map" in raw else _told(error)
        raise CheckpointError(f"{path}: transformers does not know model type {kind!r}: {remedy}") from error
    if config.is_encoder_decoder:
        raise CheckpointError(f"{path}: model type {kind!r} is an encoder-decoder; only causal LMs can be served")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(f"{path}: transformers has no causal LM of model type {kind!r}")
    return config


def context_length(config: PretrainedConfig, asked: int | None) -> int:
    """The longest text to prepare for: ``asked``, or as long as the model was made for.

    Raises:
        CheckpointError: if more is asked than there is, or nothing is said at all.
    """
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        if asked is None:
            raise CheckpointError(f"model type {config.model_type!r} states no context length; set max_model_len")
        return asked
    limit = int(positions)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "linear", "yarn"):  # flat, not by layer type
        original = rope.get("original_max_position_embeddings") or limit
        scaling = RopeConfig(
            dim=0, kind=rope["rope_type"], trained_len=limit, original_len=original, factor=rope.get("factor")
        )
        limit = supported_len(scaling)
    if asked is not None and not 1 <= asked <= limit:
        raise CheckpointError(
            f"--max-model-len {asked} is not possible: this model's config allows 1 to {limit} tokens"
        )
    return limit if asked is None else asked


def _told(error: Exception) -> str:
    """What an error says in its first paragraph; the name alone, as KeyErrors have it, is a value that is not known."""
    if isinstance(error, KeyError):
        return f"its config.json has a value that this version of transformers does not know: {error}"
    return str(error).strip().split("\n\n")[0]


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Fix length-dependent RoPE (dynamic NTK, longrope) to the frequencies for ``max_model_len``.

    transformers recomputes them in each forward from the largest position of the batch; then a text would depend on
    its batch mates, and cached keys would go stale. A module whose ``rope_type`` is "default" leaves them alone.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            if _length_dependent(kinds):
                _set_frequencies(module, kinds, "inv_freq", max_model_len, {})
                module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if _length_dependent(kind):
                    name = f"{layer_type}_inv_freq"
                    _set_frequencies(module, kind, name, max_model_len, {"layer_type": layer_type})
                    kinds[layer_type] = "default"


def _length_dependent(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _set_frequencies(module: nn.Module, kind: str, name: str, max_model_len: int, layer: dict[str, str]) -> None:
    buffer = module.get_buffer(name)
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, buffer.device, seq_len=max_model_len, **layer)
    with torch.no_grad():
        buffer.copy_(frequencies)
