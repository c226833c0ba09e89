"""Writes a Llama checkpoint as GGUF, so that llama.cpp can be measured on the very same weights.

    python -m benchmarks.gguf_file MODEL_FOLDER OUT.gguf [--dtype auto|bfloat16|float32]

The file is for measuring only. Prompts go to llama.cpp as token ids and texts come back as token ids, so the
vocabulary is made of placeholders: one ASCII word for each id. Real tokens would not make it slower or faster, but a
text that ends in the middle of a character is continued by llama.cpp beyond the number of tokens asked for. Nor does
it name an end-of-text token: with one, llama.cpp either ends texts early or bans the token, and we do neither when a
request ignores it. RWKV's kind of vocabulary is the one that may lack such a token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from decoding.errors import ConfigError
from models.checkpoint import Checkpoint, CheckpointError, read_json

DTYPES = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}
TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FILE_TYPES = {"bfloat16": gguf.LlamaFileType.MOSTLY_BF16, "float32": gguf.LlamaFileType.ALL_F32}

_WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",  # absent when tied: llama.cpp then takes token_embd
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class LlamaShape:
    """What GGUF must say of a Llama model; the names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    dtype: str

    @classmethod
    def read(cls, folder: Path) -> LlamaShape:
        """From a model's folder.

        Raises:
            CheckpointError: no config.json, or one without a field that is needed.
            ConfigError: a model that this module cannot write.
        """
        config = read_json(folder / "config.json")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        _refuse_others(folder, config, str(rope.get("rope_type", "default")))
        try:
            return cls(
                **{name: int(config[name]) for name in _COUNTS},
                num_key_value_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]),
                rms_norm_eps=float(config["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
                tied=bool(config.get("tie_word_embeddings", False)),
                dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            )
        except KeyError as error:
            raise CheckpointError(f"{folder}/config.json lacks {error}; give the folder of a complete model") from None


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _refuse_others(folder: Path, config: dict[str, Any], rope_type: str) -> None:
    reasons = {
        f"its architecture is {config.get('architectures')}": config.get("architectures") != ["LlamaForCausalLM"],
        f"its RoPE is scaled ({rope_type})": rope_type != "default",
        "its linears have biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
        f"its activation is {config.get('hidden_act')}": config.get("hidden_act") != "silu",
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise ConfigError(
            f"{folder} cannot be written as GGUF: {', '.join(found)}. Only plain Llama models can, such as demo/target "
            "and what benchmarks.inflate makes of it; convert others with llama.cpp's own convert_hf_to_gguf.py"
        )


def write_gguf(folder: Path, out: Path, dtype: str = "auto") -> LlamaShape:
    """Write the model in ``folder`` to ``out``; the file appears when it is whole.

    Args:
        dtype: of the matrices, "auto" for the checkpoint's. Norms are always float32: llama.cpp computes them so.

    Raises:
        CheckpointError: a folder without a model, or with a damaged one.
        ConfigError: a model or a dtype that cannot be written.
    """
    shape = LlamaShape.read(folder)
    dtype = shape.dtype if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise ConfigError(
            f"GGUF files are written in {' or '.join(DTYPES)}, not {dtype!r}; give one of them as --dtype"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.part")
    writer = gguf.GGUFWriter(partial, "llama")
    _describe(writer, shape, folder.name, dtype)
    for name, weight in _tensors(Checkpoint.open(folder), shape):
        kind = "float32" if weight.ndim == 1 else dtype
        writer.add_tensor(name, _bytes(weight.to(TORCH[kind])), raw_dtype=DTYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)
    return shape


def _describe(writer: gguf.GGUFWriter, shape: LlamaShape, name: str, dtype: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"<{token}>" for token in range(shape.vocab_size)])


def _tensors(checkpoint: Checkpoint, shape: LlamaShape) -> Iterator[tuple[str, Tensor]]:
    """(name in GGUF, weight) of every tensor.

    Raises:
        CheckpointError: a weight that no Llama model has.
    """
    for name, weight in checkpoint.read(checkpoint.files):
        if name == "lm_head.weight" and shape.tied:
            continue
        yield _gguf_name(name), _paired(name, weight, shape)


def _gguf_name(name: str) -> str:
    if name in _WHOLE_MODEL:
        return _WHOLE_MODEL[name]
    first, _, rest = name.removeprefix("model.layers.").partition(".")
    part = _LAYER.get(rest.removesuffix(".weight"))
    if not first.isdecimal() or part is None:
        raise CheckpointError(f"{name} is no weight of a Llama model, so it cannot be written as GGUF")
    return f"blk.{first}.{part}.weight"


def _paired(name: str, weight: Tensor, shape: LlamaShape) -> Tensor:
    """Rows of queries and keys in llama.cpp's order.

    RoPE turns dimensions (i, i + head_dim / 2) of a head together in transformers, and (2i, 2i + 1) in llama.cpp's
    "llama" architecture.
    """
    heads = {"q_proj.weight": shape.num_attention_heads, "k_proj.weight": shape.num_key_value_heads}
    count = heads.get(".".join(name.split(".")[-2:]))
    if count is None:
        return weight
    halves = weight.reshape(count, 2, shape.head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _bytes(weight: Tensor) -> np.ndarray[Any, Any]:
    """The tensor as it is stored; numpy has no bfloat16."""
    return weight.contiguous().view(torch.uint8).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """Write a file.

    Returns:
        0, or 1 when the model cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf_file", description="Write a Llama model as GGUF.")
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="(default: the checkpoint's)")
    args = parser.parse_args(argv)
    try:
        write_gguf(args.model, args.out, args.dtype)
    except (CheckpointError, ConfigError) as error:
        print(f"gguf_file: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
