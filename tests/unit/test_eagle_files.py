"""Folders of EAGLE drafters: what is written is read again, and what does not fit is refused by name."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import Checkpoint, CheckpointError, read_json
from models.config import ModelConfig
from models.decoder import Decoder
from models.heads.eagle import EagleConfig, load_eagle, read_eagle_config, write_eagle
from models.heads.eagle3 import Eagle3Config, Eagle3Model, default_taps
from models.heads.eagle3_files import Layout, canonical, load_eagle3, read_eagle3_config, write_eagle3
from models.heads.head_files import HEAD_KINDS, head_kind
from models.layers.rope import RopeConfig
from tests.engines import tiny_decoder
from tests.parity.eagle_files import HIDDEN, LLAMA, VOCAB, Weights, draw, layer_tensors, save

LAYERS = 6
LAYER = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=48,
    rope=RopeConfig(dim=8),
    max_len=2048,
    norm_eps=1e-5,
)
PLAIN = Eagle3Config(LAYER, default_taps(LAYERS))
IDS = torch.tensor([0, 3, 4, 7, 11, 30, 47])
CONFIG3 = LLAMA | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 7}


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64, layers=LAYERS)


def tensors3(first: str = "midlayer.", drafted: int = 7, hidden: int = HIDDEN) -> Weights:
    torch.manual_seed(drafted)
    tensors = layer_tensors(first, 2 * hidden, hidden)
    for name in (f"{first}input_layernorm", f"{first}hidden_norm", "norm"):
        tensors[f"{name}.weight"] = draw("norm", (hidden,))
    tensors["fc.weight"] = draw("fc", (hidden, 3 * HIDDEN))
    tensors["lm_head.weight"] = draw("lm_head", (drafted, hidden))
    if drafted < VOCAB:
        tensors["d2t"] = IDS - torch.arange(7)
        tensors["t2d"] = torch.isin(torch.arange(VOCAB), IDS)
    return tensors


def tensors1(bias: bool = True) -> Weights:
    torch.manual_seed(1)
    tensors = layer_tensors("layers.0.", HIDDEN)
    tensors["fc.weight"] = draw("fc", (HIDDEN, 2 * HIDDEN))
    return tensors | ({"fc.bias": draw("fc", (HIDDEN,))} if bias else {})


def stored(folder: Path) -> Weights:
    checkpoint = Checkpoint.open(folder)
    return dict(checkpoint.read(checkpoint.shapes))


def assert_same(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# writing and reading again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["reference", "speculators"])
@pytest.mark.parametrize("drafted", [7, VOCAB])
@pytest.mark.parametrize("flags", [(), ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_eagle3_is_read_as_it_was_written(
    layout: Layout, drafted: int, flags: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    given = tensors3("midlayer." if layout == "reference" else "layers.0.", drafted)
    if flags:
        given["input_norm.weight"] = draw("norm", (3 * HIDDEN,))
        given |= {f"fc_norm.{i}.weight": draw("norm", (HIDDEN,)) for i in range(3)}
    given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    config = replace(PLAIN, draft_vocab_size=drafted, taps=(1, 3, 5), **dict[str, Any](dict.fromkeys(flags, True)))
    trained = {name: tensor for name, tensor in given.items() if name not in ("d2t", "t2d")}
    write_eagle3(tmp_path, config, trained, IDS if drafted < VOCAB else None, layout=layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(stored(tmp_path), given)

    names = {canonical(name): name for name in given}
    read = read_eagle3_config(read_json(tmp_path / "config.json"), names, LAYERS, tmp_path)
    assert replace(read, target_hidden_size=None) == config
    model = load_eagle3(tmp_path, target())
    assert model.source.taps == (1, 3, 5)
    assert (model.token_ids is None) == (drafted == VOCAB)
    loaded = model.weights()  # not packed in float64
    assert loaded.keys() == {canonical(name) for name in trained}
    for name, tensor in trained.items():
        assert torch.equal(loaded[canonical(name)], tensor.double()), name


def test_a_drafter_in_several_layers_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = replace(PLAIN, layer=replace(LAYER, num_layers=2))
    given = tensors3("layers.0.", VOCAB) | layer_tensors("layers.1.", HIDDEN)
    given["layers.1.input_layernorm.weight"] = draw("norm", (HIDDEN,))
    write_eagle3(tmp_path, config, given, target=Path("/somewhere/llama"))
    assert_same(stored(tmp_path), given)
    assert load_eagle3(tmp_path, target()).weights().keys() == given.keys()
    verifier = read_json(tmp_path / "config.json")["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == "llama"
    with pytest.raises(ValueError, match="has one layer"):
        write_eagle3(tmp_path, config, given, layout="reference")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_eagle1_is_read_as_it_was_written(bias: bool, qkv_bias: bool, tmp_path: Path) -> None:
    given = tensors1(bias)
    if qkv_bias:
        given |= {f"layers.0.self_attn.{n}_proj.bias": draw("bias", (size,)) for n, size in (("q", 32), ("k", 16))}
        given["layers.0.self_attn.v_proj.bias"] = draw("bias", (16,))
    config = EagleConfig(replace(LAYER, qkv_bias=qkv_bias), bias)
    write_eagle(tmp_path, config, given)
    assert_same(stored(tmp_path), given)
    names = {name: name for name in given}
    assert read_eagle_config(read_json(tmp_path / "config.json"), names, tmp_path) == config
    assert_same(load_eagle(tmp_path, target()).weights(), given)


def test_what_cannot_be_described_is_not_written(tmp_path: Path) -> None:
    given = tensors3("layers.0.")
    with pytest.raises(ValueError, match="has 7 tokens"):
        write_eagle3(tmp_path, replace(PLAIN, draft_vocab_size=8), given, IDS)
    with pytest.raises(ValueError, match="draft_vocab_size is 7"):
        write_eagle3(tmp_path, replace(PLAIN, draft_vocab_size=7), given)
    with pytest.raises(ValueError, match="llama and qwen3 only"):
        write_eagle3(tmp_path, replace(PLAIN, layer=replace(LAYER, qkv_bias=True)), given, IDS)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    write_eagle3(tmp_path, PLAIN, tensors3("layers.0.", VOCAB))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors cannot be written"):
            write_eagle3(tmp_path, PLAIN, tensors3("layers.0.", VOCAB) | {"norm.weight": torch.ones(HIDDEN)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# what does not fit ---------------------------------------------------------------------------------------------------


def refused3(folder: Path, config: dict[str, Any], tensors: Weights, message: str, **options: Any) -> None:
    save(folder, config, tensors)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_eagle3(folder, target(), **options)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_hidden_size": 64}, "for a target of hidden size 64, and this one has 32"),
        ({"hidden_size": 64, "num_attention_heads": 8}, "for a target of hidden size 64, and this one has 32"),
        ({"vocab_size": 64}, "for a target of vocabulary 64, and this one has 48"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}}, r"enter layers 2, 4, 6.* 0 to 5"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 9, 3]}, r"enter layers 2, 9, 3"),
        ({"eagle_aux_hidden_state_layer_ids": ["low"]}, "cannot be used: invalid literal"),
        ({"eagle_config": [3]}, "cannot be used"),
        ({"draft_vocab_size": "many"}, "cannot be used"),
        ({"num_attention_heads": None}, "cannot be used"),
        ({"quantization_config": {"quant_method": "fp8"}}, "asks for quantized weights"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope scaling of type 'spiral'"),
        ({"norm_before_fc": True}, "missing: input_norm.weight"),
        ({"fc_norm": True}, r"missing: fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
        ({"num_hidden_layers": 2}, r"missing: layers.1.input_layernorm.weight, .* and 1 more"),
        ({"intermediate_size": 40}, r"midlayer.mlp.gate_proj.weight has shape \[48, 32\], not \[40, 32\]"),
    ],
)
def test_configs_that_do_not_fit(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused3(tmp_path, CONFIG3 | config, tensors3(), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("d2t"), "drafts 7 of 48 tokens and lacks d2t"),
        (lambda t: t.update(d2t=t["d2t"][:5].clone()), r"d2t has shape \[5\], not \[7\]"),
        (lambda t: t.update(d2t=IDS.clone()), "d2t does not lead to 7 different tokens of 48"),
        (lambda t: t.update(d2t=-torch.arange(7)), "d2t does not lead to 7 different tokens"),
        (lambda t: t.pop("norm.weight"), "missing: norm.weight"),
        (lambda t: t.update(mask_hidden=torch.ones(3)), "unknown to this architecture: mask_hidden"),
        (lambda t: t.update({"fc.bias": torch.ones(HIDDEN)}), "unknown to this architecture: fc.bias"),
        (lambda t: t.update({"embed_tokens.weight": torch.ones(40, HIDDEN)}), "embeds 40 tokens and the target has 48"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[Weights], object], message: str, tmp_path: Path) -> None:
    tensors = tensors3()
    change(tensors)
    refused3(tmp_path, CONFIG3, tensors, message)


def test_a_width_of_its_own_needs_an_embedding_of_its_own(tmp_path: Path) -> None:
    config = CONFIG3 | {"hidden_size": 64, "target_hidden_size": HIDDEN, "num_attention_heads": 8}
    refused3(tmp_path, config, tensors3(hidden=64), "needs an embedding of its own")


def test_speculators_layers(tmp_path: Path) -> None:
    config = {"speculators_model_type": "eagle3", "draft_vocab_size": 7}
    refused3(tmp_path / "a", config, tensors3("layers.0."), "lacks transformer_layer_config")
    layer = LLAMA | {"model_type": "deepseek_v2"}
    refused3(tmp_path / "b", config | {"transformer_layer_config": layer}, tensors3("layers.0."), "'deepseek_v2'")
    layer = LLAMA | {"layer_types": ["sliding_attention"]}
    refused3(tmp_path / "c", config | {"transformer_layer_config": layer}, tensors3("layers.0."), "sliding_window")


def test_taps_can_be_shifted(tmp_path: Path) -> None:
    save(tmp_path, CONFIG3, tensors3())
    assert load_eagle3(tmp_path, target()).source.taps == (2, 3, 3)
    assert load_eagle3(tmp_path, target(), tap_shift=-1).source.taps == (1, 2, 2)
    with pytest.raises(CheckpointError, match="enter layers 5, 6, 6"):
        load_eagle3(tmp_path, target(), tap_shift=3)


@pytest.mark.parametrize("load", [load_eagle, load_eagle3])
def test_files_that_cannot_be_read(load: Callable[[Path, Decoder], object], tmp_path: Path) -> None:
    config = LLAMA if load is load_eagle else CONFIG3
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path, target())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(tmp_path, target())
    save(tmp_path, config, tensors1() if load is load_eagle else tensors3(), "bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(tmp_path, target())
    torch.save({"fc.weight": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code, so it is not loaded"):
        load(tmp_path, target())
    (tmp_path / "pytorch_model.bin").unlink()
    save(tmp_path, config, tensors1() if load is load_eagle else tensors3())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(tmp_path, target())


# other kinds ---------------------------------------------------------------------------------------------------------


def test_the_other_version_is_named(tmp_path: Path) -> None:
    three, one = save(tmp_path / "three", CONFIG3, tensors3()), save(tmp_path / "one", LLAMA, tensors1())
    with pytest.raises(CheckpointError, match=f"holds EAGLE-3, not EAGLE-1: load it with --speculate eagle3={three}"):
        load_eagle(three, target())
    with pytest.raises(CheckpointError, match=f"EAGLE-1 drafter: load it with --speculate eagle={one}"):
        load_eagle3(one, target())


@pytest.mark.parametrize("load", [load_eagle, load_eagle3])
def test_a_complete_model_is_no_drafter(load: Callable[[Path, Decoder], object], tmp_path: Path) -> None:
    save(tmp_path, LLAMA | {"architectures": ["LlamaForCausalLM"]}, layer_tensors("model.layers.0.", HIDDEN))
    with pytest.raises(CheckpointError, match=r"no EAGLE-1 drafter|holds no drafter"):
        load(tmp_path, target())


ANNOUNCED = [
    ({"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"]}, "eagle3"),
    ({"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 32000}, "eagle3"),
    ({"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 32000}, "eagle3"),
    ({"architectures": ["EagleLlamaForCausalLM"]}, "eagle"),
    ({"speculators_model_type": "eagle"}, "speculators-eagle"),
    ({"speculators_model_type": "peagle", "draft_vocab_size": 32000}, "peagle"),
    ({"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 9, "parallel_drafting": True}, "peagle"),
    ({"architectures": ["Eagle3DeepseekV2ForCausalLM"], "draft_vocab_size": 9}, "eagle3-mla"),
    ({"speculators_model_type": "dflash", "draft_vocab_size": 9}, "dflash"),
    ({"architectures": ["DFlashDraftModel"], "dflash_config": {"mask_token_id": 1}}, "dflash"),
    ({"speculators_model_type": "dspark"}, "dspark"),
    ({"medusa_num_heads": 5, "medusa_num_layers": 1}, "medusa"),
    ({"hydra_num_heads": 4}, "hydra"),
    ({"speculators_model_type": "mtp"}, "mtp"),
    ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}, None),
]


@pytest.mark.parametrize(("config", "name"), ANNOUNCED)
def test_kinds_are_recognised_and_others_refused_by_name(
    config: dict[str, Any], name: str | None, tmp_path: Path
) -> None:
    assert head_kind(config, tmp_path) == name
    for wanted, load in (("eagle", load_eagle), ("eagle3", load_eagle3)):
        if name not in (None, wanted):
            save(tmp_path, config, {"x": torch.ones(1)})
            with pytest.raises(CheckpointError, match=f"holds {HEAD_KINDS[name].title}, not"):
                load(tmp_path, target())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"speculators_model_type": "eagle4"}, "unknown kind 'eagle4'.* 'eagle"),
        (
            {"speculators_model_type": "eagle4", "architectures": ["Eagle3Speculator"], "draft_vocab_size": 9},
            "unknown kind 'eagle4'.* 'eagle",
        ),
        (
            {"architectures": ["LlamaForCausalLMEagle9"]},
            "unknown kind 'LlamaForCausalLMEagle9'.*'LlamaForCausalLMEag",
        ),
    ],
)
def test_an_unknown_kind_names_the_nearest(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, config, {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=message):
        load_eagle3(tmp_path, target())


def test_an_eagle3_model_says_what_it_is(tmp_path: Path) -> None:
    model = load_eagle3(save(tmp_path, CONFIG3, tensors3()), target())
    assert isinstance(model, Eagle3Model)
    assert (model.feature_size, model.carry_size, model.continues) == (3 * HIDDEN, HIDDEN, False)
    assert model.kv_spec.num_layers == 1
    assert model.max_positions == target().max_model_len
