"""MiMo-7B's architecture end to end on a tiny random instance: the trunk is Qwen2's, its modules draft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding.config import EngineConfig
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from decoding.request import GenerateRequest, SamplingParams
from models.decoder import Decoder
from models.loader import CheckpointError, load_model
from tests.engines import ALL_NODES, ROOT, run
from tests.mtp import fit_modules
from tests.paged import PagedRun, greedy
from tests.parity.tiny import load_reference, random_prompt, save_tiny

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
DEMO_VOCAB = int(json.loads((ROOT / "demo/target/config.json").read_text())["vocab_size"])
PROMPT = random_prompt(37, vocab=DEMO_VOCAB)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trunk alone, as transformers has it."""
    folder = tmp_path_factory.mktemp("qwen2")
    return save_tiny("qwen2", folder, vocab_size=DEMO_VOCAB, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def mimo(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trunk as MiMo, with two modules that were fitted to one of its texts."""
    folder = tmp_path_factory.mktemp("mimo")
    for name in TOKENIZER:
        shutil.copy(ROOT / "demo/target" / name, folder)
    config = json.loads((qwen2 / "config.json").read_text())
    config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 2}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}  # code, which never runs
    (folder / "config.json").write_text(json.dumps(config))
    target = load_model(qwen2, dtype="float32")
    assert isinstance(target, Decoder)
    _, modules = fit_modules(target, [PROMPT + greedy(target, PROMPT, 60)], 2)
    tensors = load_file(qwen2 / "model.safetensors")
    for name, tensor in modules.items():
        if "input_proj" in name:  # MiMo's takes the hidden state first
            tensor = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
        tensors[f"model.{name}"] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def engine(folder: Path, *speculate: str) -> Engine:
    config = EngineConfig(str(folder), dtype="float32", speculate=speculate, num_pages=64, plan=ALL_NODES)
    return Engine.load(config)


def test_the_trunk_is_that_of_qwen2(mimo: Path, qwen2: Path) -> None:
    (logits,) = PagedRun(load_model(mimo)).extend([PROMPT])
    with torch.inference_mode():
        expected = load_reference(qwen2)(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("speculate", ["mtp:tau=0.3", "mtp:depth=1", "mtp:depth=5,beam=3,tau=0.3"])
def test_its_own_modules_draft_the_text_of_transformers(speculate: str, mimo: Path, qwen2: Path) -> None:
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        text = load_reference(qwen2).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0
        )
    request = GenerateRequest("r", tuple(PROMPT), SamplingParams(60, 0.0, ignore_eos=True))
    outcome = run(engine(mimo, speculate), [request])["r", 0]
    assert outcome.tokens == text[0, len(PROMPT) :].tolist()
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.by_drafter["mtp"].accepted > 10, "modules that were fitted to this very text guess much of it"


def test_modules_of_another_folder(mimo: Path, qwen2: Path, tmp_path: Path) -> None:
    """The trunk in its own folder, drafted for by the modules of the full checkpoint."""
    plain = shutil.copytree(qwen2, tmp_path / "plain")
    for name in TOKENIZER:
        shutil.copy(ROOT / "demo/target" / name, plain)
    request = GenerateRequest("r", tuple(PROMPT), SamplingParams(30, 0.9, seed=4, ignore_eos=True))
    texts = [run(engine(folder, *s), [request])["r", 0] for folder, s in ((plain, ()), (plain, (f"mtp={mimo}",)))]
    assert texts[0].tokens == texts[1].tokens
    assert texts[1].last.speculation is not None
    assert texts[1].last.speculation.drafted > 0
    with pytest.raises(ModelError, match="has no modules for multi-token prediction"):
        engine(plain, "mtp")


def test_weights_that_are_neither_trunk_nor_module_are_errors(mimo: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(mimo, tmp_path / "broken")
    tensors = load_file(mimo / "model.safetensors")
    save_file({**tensors, "model.mtp.0.up.weight": torch.zeros(1)}, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown to this architecture: model\.mtp\.0\.up\.weight"):
        load_model(broken)
    del tensors["model.mtp_layers.1.hidden_layernorm.weight"]
    save_file(tensors, broken / "model.safetensors")
    load_model(broken)  # the trunk does not need it
    with pytest.raises(ModelError, match=r"mtp: .*missing: model\.mtp_layers\.1\.hidden_layernorm\.weight"):
        engine(broken, "mtp")


def test_options_that_cannot_work(mimo: Path) -> None:
    with pytest.raises(ConfigError, match="unknown norm 'past': did you mean 'post'"):
        engine(mimo, "mtp:norm=past")
    with pytest.raises(ConfigError, match="mtp: depth, top_k and beam must be at least 1"):
        engine(mimo, "mtp:beam=0")
