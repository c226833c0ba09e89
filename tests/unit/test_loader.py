"""Loading checkpoints: every layout that works, and a message with cause and fix for those that do not."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from models.families import supports_natively
from models.layers.ops import load_ops
from models.loader import CheckpointError, generation_config, load_model, read_config, resolve
from models.transformers_model import TransformersModel
from tests.paged import PagedRun
from tests.parity.tiny import random_prompt, save_tiny

PROMPT = random_prompt(20)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "llama")


def logits(folder: Path, **options: Any) -> Tensor:
    return PagedRun(load_model(folder, **options)).extend([PROMPT])[0]


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


# Layouts that load


def test_a_sharded_checkpoint_equals_a_single_file(llama: Path, tmp_path: Path) -> None:
    sharded = save_tiny("llama", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(sharded), logits(llama))


def test_a_pickled_checkpoint_of_tensors_equals_safetensors(llama: Path) -> None:
    expected = logits(llama)
    to_pickle(llama)
    assert torch.equal(logits(llama), expected)


def test_a_sharded_pickled_checkpoint(llama: Path) -> None:
    expected = logits(llama)
    weights = load_file(llama / "model.safetensors")
    names = sorted(weights)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, members in parts.items():
        torch.save({name: weights[name] for name in members}, llama / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (llama / "model.safetensors").unlink()
    assert torch.equal(logits(llama), expected)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_auto_is_the_checkpoints(llama: Path, key: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    config.pop("dtype")
    (llama / "config.json").write_text(json.dumps({**config, key: "bfloat16"}))
    assert load_model(llama).dtype == torch.bfloat16
    assert load_model(llama, dtype="float64").dtype == torch.float64


def test_weights_that_nobody_needs_are_ignored(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path)
    expected = logits(folder)

    def add(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    edit_weights(folder, add)
    assert torch.equal(logits(folder), expected)


def test_a_tied_checkpoint_with_another_head_uses_it_as_transformers_does(llama: Path) -> None:
    expected = logits(llama)
    edit_config(llama, tie_word_embeddings=True)
    assert torch.equal(logits(llama), expected)


def test_code_of_a_checkpoint_never_runs(llama: Path) -> None:
    expected = logits(llama)
    ran = llama / "ran"
    (llama / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    edit_config(llama, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    assert torch.equal(logits(llama), expected)
    assert not ran.exists()


def test_two_models_live_side_by_side(llama: Path, tmp_path: Path) -> None:
    other = save_tiny("qwen3", tmp_path / "qwen3")
    alone = logits(llama), logits(other)
    runs = [PagedRun(load_model(folder)) for folder in (llama, other)]
    parts: list[list[Tensor]] = [[], []]
    for token in PROMPT:
        for part, run in zip(parts, runs, strict=True):
            part.append(run.extend([[token]])[0])
    for part, expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(torch.cat(part), expected, rtol=0, atol=1e-4)


def test_max_model_len(llama: Path) -> None:
    assert load_model(llama).max_model_len == 1024
    assert load_model(llama, max_model_len=100).max_model_len == 100
    for length in (0, 1025):
        with pytest.raises(CheckpointError, match=rf"--max-model-len {length} .* 1 to 1024 tokens"):
            load_model(llama, max_model_len=length)


def test_yarn_extends_max_model_len(llama: Path) -> None:
    edit_config(llama, rope_parameters={"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0})
    assert load_model(llama).max_model_len == 4096


def test_generation_config(llama: Path) -> None:
    (llama / "generation_config.json").write_text('{"temperature": 0.7}')
    assert generation_config(llama) == {"temperature": 0.7}
    (llama / "generation_config.json").unlink()
    assert generation_config(llama) == {}


# Checkpoints that do not


def test_missing_extra_and_misshapen_weights_are_all_named(llama: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        del weights["model.layers.1.self_attn.k_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        weights["model.norm.weight"] = torch.ones(32)

    edit_weights(llama, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_model(llama)
    message = str(caught.value)
    assert "missing: model.layers.1.self_attn.k_proj.weight" in message
    assert "unknown to this architecture: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.norm.weight has shape [32], not [64]" in message
    assert str(llama) in message


def test_a_long_list_of_missing_weights_is_cut(llama: Path) -> None:
    edit_weights(llama, lambda weights: [weights.pop(name) for name in list(weights) if "layers" in name])
    with pytest.raises(CheckpointError, match="and 10 more"):
        load_model(llama)


def test_a_missing_head_is_named(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_model(llama)


@pytest.mark.parametrize("keep", [0, 5, 500, 0.5, -1])
def test_truncated_safetensors(llama: Path, keep: float) -> None:
    file = llama / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short .*download it again"):
        load_model(llama)


def test_a_truncated_pickle(llama: Path) -> None:
    to_pickle(llama)
    file = llama / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_model(llama)


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(llama: Path, zipped: bool) -> None:
    marker, file = llama / "ran", llama / "pytorch_model.bin"
    evil = {"model.norm.weight": RunsCode(marker)}
    if zipped:
        torch.save(evil, file)
    else:
        file.write_bytes(pickle.dumps(evil, protocol=2))
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"could run code.*convert the checkpoint to safetensors"):
        load_model(llama)
    assert not marker.exists()


def test_a_pickle_of_something_else(llama: Path) -> None:
    torch.save({"model": {"model.norm.weight": torch.ones(64)}}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="must hold a dictionary of tensors"):
        load_model(llama)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard.name}"):
        load_model(folder)


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(llama)


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "cannot be read"), ("[1]", "must hold a JSON object"), (None, "has no config.json")]
)
def test_a_config_that_cannot_be_read(llama: Path, content: str | None, reason: str) -> None:
    (llama / "config.json").unlink()
    if content is not None:
        (llama / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        read_config(llama)


def test_a_config_that_lacks_a_key_or_has_nonsense(llama: Path) -> None:
    edit_config(llama, num_attention_heads="many")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: .*many"):
        load_model(llama)
    config = json.loads((llama / "config.json").read_text())
    config.pop("num_attention_heads")
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: it lacks 'num_attention_heads'"):
        load_model(llama)


def test_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype 'int8' is not supported; set one of: float32"):
        load_model(llama, dtype="int8")


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", "not a name!"])
def test_an_unknown_folder(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(model)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"the hub did not give out .* check the name and the connection"):
        resolve("no-such-organisation/no-such-model")


def test_a_local_folder_resolves_to_itself(llama: Path) -> None:
    assert resolve(str(llama)) == llama


# What the native decoder takes on


@pytest.mark.parametrize(
    ("change", "native"),
    [
        ({}, True),
        ({"model_type": "gemma2"}, False),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1]}}, False),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, False),
        ({"partial_rotary_factor": 0.5}, False),
        ({"hidden_act": "relu2"}, False),
        ({"quantization_config": {"quant_method": "gptq"}}, False),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, False),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, False),
    ],
)
def test_what_runs_natively(llama: Path, change: dict[str, Any], native: bool) -> None:
    assert supports_natively({**read_config(llama), **change}) is native


def test_other_families_run_through_transformers(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, TransformersModel)
    assert (model.vocab_size, model.max_model_len) == (99, 64)


def test_layer_operations_are_chosen_by_name() -> None:
    device = torch.device("cpu")
    assert load_ops(device, torch.float32, "torch") is not None
    with pytest.raises(ValueError, match=r"unknown layer operations 'tocrh'; there are: torch"):
        load_ops(device, torch.float32, "tocrh")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"speculators_model_type": "eagle3"}, r"EAGLE-3\) and no model: use it .* --speculate eagle3="),
        ({"medusa_num_heads": 4}, r"Medusa\) and no model: use it .* --speculate medusa="),
        ({"speculators_model_type": "dflash"}, r"DFlash\) and no model$"),
    ],
)
def test_a_drafter_in_place_of_a_model_says_what_it_is(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
