"""Files of MTP modules: three layouts give the same modules, and what cannot be served says why."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.attention.reference import attend
from models.checkpoint import CheckpointError
from models.families import NATIVE_FAMILIES, describe
from models.heads.mtp import MTPConfig, MTPModel
from models.heads.mtp_files import UNSERVED, load_mtp, module_shapes, open_mtp, write_mtp
from models.layers.ops import TorchOps
from models.layers.rope import RopeConfig
from models.loader import load_model
from tests.engines import tiny_decoder
from tests.paged import PagedRun
from tests.parity.tiny import random_prompt, save_tiny

DEEPSEEK = {
    "token_layernorm": "enorm",
    "hidden_layernorm": "hnorm",
    "input_proj": "eh_proj",
    "final_layernorm": "shared_head.norm",
}
TARGET = tiny_decoder(torch.float64)


def random_tensors(config: MTPConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in module_shapes(config).items()}


def load(folder: Path, norm: str = "") -> MTPModel:
    return load_mtp(folder, TARGET, TorchOps(), attend, norm)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def in_layout(layout: str, folder: Path, config: MTPConfig, tensors: dict[str, Tensor]) -> Path:
    """Modules as a layout has them, beside weights of a target."""
    hf = {
        **describe(replace(config.layer, num_layers=TARGET.num_layers)),
        "num_nextn_predict_layers": config.num_modules,
    }
    stored = {"model.layers.0.mlp.up_proj.weight": torch.zeros(3)}
    for name, tensor in tensors.items():
        if layout == "mimo":
            stored[f"model.{name}"] = tensor
            continue
        number, part = name.removeprefix("mtp_layers.").split(".", 1)
        for theirs, own in DEEPSEEK.items():
            part = part.replace(theirs, own)
        stored[f"model.layers.{TARGET.num_layers + int(number)}.{part}"] = tensor
    if layout == "deepseek":
        weights = TARGET.weights()
        stored[f"model.layers.{TARGET.num_layers}.embed_tokens.weight"] = weights["embed.weight"].clone()
        stored[f"model.layers.{TARGET.num_layers}.shared_head.head.weight"] = weights["head.weight"].clone()
    return write(folder, hf, stored)


SHAPES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "llama, biases, yarn": {
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "rope": RopeConfig(dim=8, kind="yarn", factor=4.0, trained_len=512, original_len=128, beta_fast=16.0),
    },
}


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read(shape: str, modules: int, tmp_path: Path) -> None:
    layer = replace(TARGET.config, **SHAPES[shape])  # type: ignore[arg-type]
    config = replace(MTPConfig.like(layer, modules), feed="pre", recycle="post")
    tensors = random_tensors(config)
    write_mtp(tmp_path / "new" / "folder", config, tensors, target="org/target", steps=5)
    file = open_mtp(tmp_path / "new" / "folder")
    read = file.config
    assert replace(read, layer=replace(read.layer, max_len=layer.max_len)) == config
    stored = dict(file.checkpoint.read(file.names.values()))
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    said = json.loads((tmp_path / "new/folder/config.json").read_text())
    assert said["speculators_model_type"] == "mtp"
    assert said["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert said["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5


@pytest.mark.parametrize("layout", ["mimo", "deepseek", "speculators"])
def test_all_layouts_fill_the_same_modules(layout: str, tmp_path: Path) -> None:
    config = MTPConfig.like(TARGET.config, 2)
    tensors = random_tensors(config)
    if layout == "speculators":
        write_mtp(tmp_path, config, tensors)
    else:
        in_layout(layout, tmp_path, config, tensors)
    model = load(tmp_path)
    assert model.config.hidden_first == (layout == "mimo")
    names = {"proj": "input_proj", "q": "self_attn.q_proj", "down": "mlp.down_proj", "norm": "final_layernorm"}
    for index in range(2):
        for ours, theirs in names.items():
            filled = model.weights()[f"modules.{index}.{ours}.weight"]
            assert torch.equal(filled, tensors[f"mtp_layers.{index}.{theirs}.weight"].double()), (index, ours)
    assert len(model.weights()) == len(tensors)


def test_a_trunk_leaves_out_the_modules_that_its_config_announces(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    expected = PagedRun(load_model(folder)).extend([random_prompt(9)])[0]
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    modules = random_tensors(MTPConfig.like(NATIVE_FAMILIES["llama"].configure(config)))
    for name, tensor in modules.items():
        tensors[name.replace("mtp_layers.0", "model.layers.2")] = tensor
    write(folder, config, tensors)
    with pytest.raises(CheckpointError, match=r"unknown to this architecture: model\.layers\.2\."):
        load_model(folder)
    write(folder, {**config, "num_nextn_predict_layers": 1}, tensors)
    assert torch.equal(PagedRun(load_model(folder)).extend([random_prompt(9)])[0], expected)


@pytest.mark.parametrize(
    ("norm", "feed", "recycle"),
    [("", "pre", "pre"), ("post", "post", "post"), ("pre", "pre", "pre"), ("post-pre", "post", "pre")],
)
def test_norms_are_the_checkpoints_unless_told_otherwise(norm: str, feed: str, recycle: str, tmp_path: Path) -> None:
    config = replace(MTPConfig.like(TARGET.config), feed="pre", recycle="pre")
    write_mtp(tmp_path, config, random_tensors(config))
    model = load(tmp_path, norm)
    assert (model.config.feed, model.config.recycle) == (feed, recycle)
    assert model.source.taps == (() if feed == "post" else (TARGET.num_layers,))


def rename(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["mtp_layers.0.typo.weight"] = tensors.pop("mtp_layers.0.mlp.up_proj.weight")


def reshape(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["mtp_layers.0.input_proj.weight"] = tensors["mtp_layers.0.input_proj.weight"][:, :-1].clone()


def mix_experts(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["mtp_layers.0.mlp.experts.0.up_proj.weight"] = tensors.pop("mtp_layers.0.mlp.up_proj.weight")


def make_latent(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["mtp_layers.0.self_attn.kv_a_proj_with_mqa.weight"] = tensors.pop("mtp_layers.0.self_attn.k_proj.weight")


def no_modules(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"else.{name}"] = tensors.pop(name)


def qwen3_next(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["speculators_model_type"]
    config |= config["transformer_layer_config"]
    for name in list(tensors):
        tensors[name.replace("mtp_layers.0", "mtp.layers.0").replace("mtp.layers.0.input_proj", "mtp.fc")] = (
            tensors.pop(name)
        )


def layer(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config["transformer_layer_config"].update(changes)


def stated(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config.update(changes)


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "missing and unknown": (rename, "missing: mtp_layers.0.mlp.up_proj.weight.*unknown.*mtp_layers.0.typo.weight"),
    "misshapen": (reshape, r"input_proj.weight has shape \[32, 63\], not \[32, 64\]"),
    "experts": (mix_experts, "cannot be served: their modules mix experts"),
    "latent": (make_latent, "cannot be served: .*MLA"),
    "no modules": (no_modules, "has no modules for multi-token prediction"),
    "Qwen3-Next": (qwen3_next, "Qwen3-Next's layout"),
    "hidden size": (layer(hidden_size=64), "hidden size of 64, and this one has 32"),
    "vocabulary": (layer(vocab_size=50), "vocabulary of 50, and this one has 48"),
    "unknown architecture": (layer(model_type="mamba"), "'mamba'.* are not served; those of llama"),
    "a config without sizes": (stated(transformer_layer_config={"model_type": "llama"}), "lacks 'num_attention_heads'"),
    "another drafter": (stated(speculators_model_type="eagle3"), "holds .*EAGLE-3.*eagle3="),
    "windows": (layer(model_type="mistral", sliding_window=16), "sliding window"),
    "norms": (stated(feed="nowhere"), '"feed" and "recycle" must be one of post, pre'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_says_why(case: str, tmp_path: Path) -> None:
    config = MTPConfig.like(TARGET.config)
    write_mtp(tmp_path, config, random_tensors(config))
    said, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    change, message = BROKEN[case]
    change(said, tensors)
    write(tmp_path, said, tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("model_type", UNSERVED)
def test_families_without_a_forward_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "num_nextn_predict_layers": 1}))
    with pytest.raises(CheckpointError, match=f"multi-token prediction of {model_type} models cannot be served"):
        load(tmp_path)  # before any weight is looked for


def test_truncated_and_pickled_files(tmp_path: Path) -> None:
    config = MTPConfig.like(TARGET.config)
    write_mtp(tmp_path, config, random_tensors(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"run": print}))
    with pytest.raises(CheckpointError, match="could run code, so it is not loaded"):
        load(tmp_path)


@pytest.mark.parametrize("weight", ["embed_tokens.weight", "shared_head.head.weight"])
def test_another_embedding_or_head_than_the_targets_is_refused(weight: str, tmp_path: Path) -> None:
    config = MTPConfig.like(TARGET.config)
    in_layout("deepseek", tmp_path, config, random_tensors(config))
    load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.{TARGET.num_layers}.{weight}"
    tensors[name] = tensors[name].roll(1, dims=0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"another {'embedding' if 'embed' in weight else 'head'} than the target"
    ):
        load(tmp_path)


def test_the_writer_takes_what_its_config_says(tmp_path: Path) -> None:
    config = MTPConfig.like(TARGET.config)
    tensors = random_tensors(config)
    with pytest.raises(ValueError, match=r"other weights than their config says: mtp_layers.1"):
        write_mtp(tmp_path, replace(config, layer=replace(config.layer, num_layers=2)), tensors)
    with pytest.raises(ValueError, match="hidden; embedding"):
        write_mtp(tmp_path, replace(config, hidden_first=True), tensors)
    with pytest.raises(ValueError, match="no model family"):
        write_mtp(tmp_path, replace(config, layer=replace(config.layer, attention_soft_cap=20.0)), tensors)
    assert list(tmp_path.iterdir()) == []
