"""Checkpoints as Meta publishes them: params.json and consolidated.pth, presented under Hugging Face's names.

Meta's rotary embedding turns neighbouring dims, ours the two halves of a head: the rows of the query and key
projections are put in our order as they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.checkpoint import Checkpoint, CheckpointError, Cut, read_json

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_LAYER = re.compile(r"(layers|extra_heads)\.(\d+)\.(.+)\.weight")
_TRAINED_LEN = 4096  # tokens; params.json does not say


@dataclass(frozen=True)
class MetaCheckpoint(Checkpoint):
    """Weights under names such as model.layers.0.mlp.up_proj.weight, and extra_heads.0 for model.layers.0."""

    stored: dict[str, str]  # our name -> the file's
    heads: dict[str, int]  # our name -> heads whose rows are to be put in our order

    def read(self, names: Iterable[str], cuts: Mapping[str, Cut] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See ``Checkpoint.read``; of weights with heads, parts are whole heads."""
        ours = {self.stored[name]: name for name in names}
        plain = Checkpoint({self.stored[name]: self.files[name] for name in ours.values()}, {})
        for stored, weight in plain.read(ours, {self.stored[name]: cut for name, cut in (cuts or {}).items()}):
            name = ours[stored]
            yield name, halves(weight, self._heads_in(name, weight)) if name in self.heads else weight

    def _heads_in(self, name: str, part: Tensor) -> int:
        return self.heads[name] * part.shape[0] // self.shapes[name][0]


def is_meta(folder: Path) -> bool:
    """Whether a folder holds a model in Meta's layout."""
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


def open_meta(folder: Path) -> MetaCheckpoint:
    """Read names and shapes of a folder in Meta's layout.

    Raises:
        CheckpointError: no weights, weights in several parts, a damaged file, or a pickle with code in it.
    """
    return _open(folder, read_json(folder / "params.json"))


def meta_config(folder: Path) -> dict[str, Any]:
    """params.json and the weights' shapes as the config.json of a Llama model; only layers of the trunk are counted.

    Raises:
        CheckpointError: as ``open_meta``, or a size is missing.
    """
    params = read_json(folder / "params.json")
    shapes = _open(folder, params).shapes
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    try:
        vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
        mlp_size = shapes["model.layers.0.mlp.up_proj.weight"][0]
        heads = int(params["n_heads"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder} is no Llama model in Meta's layout: it lacks {error}") from error
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": mlp_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "rms_norm_eps": float(params.get("norm_eps", 1e-5)),
        "rope_theta": float(params.get("rope_theta", 10_000.0)),
        "max_position_embeddings": int(params.get("max_seq_len", _TRAINED_LEN)),
        "dtype": "bfloat16",
    }


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, H] of pairs (0, 1), (2, 3), ... within a head in the order 0, 2, ..., 1, 3, ..."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _open(folder: Path, params: dict[str, Any]) -> MetaCheckpoint:
    files = sorted(folder.glob("consolidated*.pth"))
    if len(files) != 1:
        found = "no consolidated.pth" if not files else f"its weights in {len(files)} parts"
        raise CheckpointError(f"{folder} has {found}, and one whole file is needed; get a checkpoint of a single part")
    plain = Checkpoint.of_files(files)
    heads = int(params.get("n_heads", 1))
    turned = {"self_attn.q_proj": heads, "self_attn.k_proj": int(params.get("n_kv_heads") or heads)}
    stored = {_ours(name): name for name in plain.shapes if name != "rope.freqs"}
    return MetaCheckpoint(
        files=dict.fromkeys(stored, files[0]),
        shapes={ours: plain.shapes[name] for ours, name in stored.items()},
        stored=stored,
        heads={ours: count for ours in stored for part, count in turned.items() if f".{part}." in ours},
    )


def _ours(name: str) -> str:
    """Hugging Face's name of a weight; names that are not known stay."""
    match = _LAYER.fullmatch(name)
    if match is None:
        prefix = name.removesuffix(".weight")
        return f"{_NAMES.get(prefix, prefix)}.weight" if name.endswith(".weight") else name
    kind = "model.layers" if match[1] == "layers" else match[1]
    return f"{kind}.{match[2]}.{_NAMES.get(match[3], match[3])}.weight"
