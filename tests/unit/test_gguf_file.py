"""GGUF files for llama.cpp: the same weights under other names, queries and keys in its order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gguf_file import main, write_gguf
from decoding.errors import ConfigError
from models.checkpoint import CheckpointError
from tests.parity.tiny import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors as float32, fields) of a file."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        raw = torch.from_numpy(np.array(tensor.data))
        bits = raw.view(torch.bfloat16) if tensor.tensor_type == gguf.GGMLQuantizationType.BF16 else raw
        tensors[tensor.name] = bits.float().reshape(tuple(int(size) for size in reversed(tensor.shape)))
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def edited(folder: Path, source: Path, **changes: Any) -> Path:
    """A copy of a model with another config.json."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_every_weight_is_there_with_its_bits(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "out.gguf", "float32")
    written, weights = read(tmp_path / "out.gguf")[0], load_file(llama / "model.safetensors")
    assert len(written) == len(weights)
    assert torch.equal(written["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(written["output.weight"], weights["lm_head.weight"])
    assert torch.equal(written["output_norm.weight"], weights["model.norm.weight"])
    for theirs, ours in {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }.items():
        assert torch.equal(written[f"blk.1.{theirs}.weight"], weights[f"model.layers.1.{ours}.weight"]), theirs


def test_bfloat16_rounds_matrices_and_keeps_norms_in_float32(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "out.gguf", "bfloat16")
    written, weights = read(tmp_path / "out.gguf")[0], load_file(llama / "model.safetensors")
    up = weights["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(written["blk.0.ffn_up.weight"], up.bfloat16().float())
    assert torch.equal(written["blk.0.ffn_norm.weight"], weights["model.layers.0.post_attention_layernorm.weight"])


@pytest.mark.parametrize(("theirs", "ours", "heads"), [("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)])
def test_turning_neighbours_is_turning_halves(llama: Path, tmp_path: Path, theirs: str, ours: str, heads: int) -> None:
    write_gguf(llama, tmp_path / "out.gguf", "float32")
    written, weights = read(tmp_path / "out.gguf")[0], load_file(llama / "model.safetensors")
    hidden = torch.randn(64, dtype=torch.float64)
    angle = torch.rand(8, dtype=torch.float64)  # of each pair of a head of 16 dimensions
    halves = (weights[f"model.layers.0.self_attn.{ours}.weight"].double() @ hidden).reshape(heads, 2, 8)
    first, second = halves[:, 0], halves[:, 1]
    expected = torch.stack(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=1
    )
    pairs = (written[f"blk.0.{theirs}.weight"].double() @ hidden).reshape(heads, 8, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=1)
    torch.testing.assert_close(turned, expected)


def test_a_tied_head_is_left_out_and_the_shape_is_said(tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": True, "head_dim": 24, "rope_parameters": {"rope_type": "default"}}
    settings["rope_parameters"] |= {"rope_theta": 5e5}
    folder = save_tiny("llama", tmp_path / "tied", **settings)
    write_gguf(folder, tmp_path / "out.gguf")
    tensors, fields = read(tmp_path / "out.gguf")
    assert "output.weight" not in tensors
    said = {name.removeprefix("llama."): value for name, value in fields.items()}
    assert said["general.architecture"] == "llama"
    assert (said["block_count"], said["embedding_length"], said["feed_forward_length"]) == (2, 64, 96)
    assert (said["attention.head_count"], said["attention.head_count_kv"]) == (4, 2)
    assert (said["attention.key_length"], said["attention.value_length"], said["rope.dimension_count"]) == (24, 24, 24)
    assert said["rope.freq_base"] == 5e5
    assert (said["context_length"], said["vocab_size"]) == (1024, 256)


def test_the_vocabulary_has_a_word_for_each_id_and_no_end(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "out.gguf")
    fields = read(tmp_path / "out.gguf")[1]
    words = fields["tokenizer.ggml.tokens"]
    assert len(set(words)) == 256
    assert all(word.isascii() for word in words)
    assert "tokenizer.ggml.eos_token_id" not in fields


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "its architecture is \\['Qwen3ForCausalLM'\\]"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "its RoPE is scaled \\(yarn\\)"),
        ({"attention_bias": True}, "its linears have biases"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
    ],
)
def test_what_the_file_cannot_say_is_refused(llama: Path, tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    folder = edited(tmp_path / "model", llama, **changes)
    with pytest.raises(ConfigError, match=cause):
        write_gguf(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_weight_that_no_llama_has_is_named(llama: Path, tmp_path: Path) -> None:
    folder = edited(tmp_path / "model", llama)
    weights = {**load_file(llama / "model.safetensors"), "model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight is no weight"):
        write_gguf(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out.gguf")]) == 1
    assert "has no config.json" in capsys.readouterr().err
