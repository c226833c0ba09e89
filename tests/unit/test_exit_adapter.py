"""Adapters for early exits: their files, what they compute, and targets that they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions, load_early_exit
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from decoding.request import GenerateRequest, SamplingParams
from models.checkpoint import CheckpointError
from models.decoder import Decoder
from models.early_exit import ExitModel
from models.heads.early_exit import AdapterConfig, load_adapter, read_adapter, write_adapter
from models.heads.head_files import check_model
from models.loader import load_model
from tests.engines import ALL_NODES, ROOT, VOCAB, BuildDrafter, make_engine, run, tiny_decoder
from tests.paged import PagedRun

CONFIG = AdapterConfig(exit_layer=2, hidden_size=32, mlp_size=24, num_layers=3, vocab_size=VOCAB, base_model="tiny")


@cache
def model(dtype: torch.dtype = torch.float32) -> Decoder:
    return tiny_decoder(dtype, layers=3)


def weights(config: AdapterConfig = CONFIG, scale: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in config.shapes().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path, CONFIG, weights())
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    config, checkpoint = read_adapter(folder)
    assert config == CONFIG
    assert checkpoint.shapes == CONFIG.shapes()
    adapter = load_adapter(folder, model(torch.float64))
    assert {name: tuple(weight.shape) for name, weight in adapter.weights().items()} == CONFIG.shapes()
    for name, weight in weights().items():
        assert torch.equal(adapter.weights()[name], weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_formula_of_its_module(folder: Path, dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    w = {name: weight.to(dtype).double() for name, weight in weights().items()}
    x = hidden.double()
    gate = F.silu(x @ w["gate_proj.weight"].T + w["gate_proj.bias"])
    up = x @ w["up_proj.weight"].T + w["up_proj.bias"]
    expected = x + (gate * up) @ w["down_proj.weight"].T + w["down_proj.bias"]
    adapter = load_adapter(folder, model(dtype))
    error = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(adapter(hidden).double(), expected, rtol=error, atol=error)


def test_an_exit_is_adapted(folder: Path) -> None:
    plain, adapter = ExitModel(model(), 2), load_adapter(folder, model())
    adapted = ExitModel(model(), 2, adapter)
    runs = [PagedRun(plain), PagedRun(adapted)]
    batch = runs[0].batch({0: [4, 5, 6]})
    torch.testing.assert_close(runs[1].forward(batch).hidden, adapter(runs[0].forward(batch).hidden))
    assert torch.equal(runs[0].cache.keys, runs[1].cache.keys)


def engine(folder: Path, **options: int) -> Engine:
    chosen = EarlyExitOptions(path=str(folder), **options)  # type: ignore[arg-type]
    drafters: dict[str, BuildDrafter] = {"early-exit": lambda context: load_early_exit(chosen, context)}
    return make_engine(model(), drafters, plan=ALL_NODES)


def test_the_drafter_takes_the_exit_of_its_adapter(folder: Path) -> None:
    request = GenerateRequest("r", (3, 1, 4, 1, 5), SamplingParams(30, 0.0, ignore_eos=True))
    made = engine(folder)
    [drafter] = made._stepper.drafters.members
    assert isinstance(drafter, EarlyExitDrafter)
    assert drafter.choice == "exit after layer 2 of 3, adapted"
    outcome = run(made, [request])["r", 0]
    assert outcome.tokens == run(make_engine(model()), [request])["r", 0].tokens
    assert outcome.last.speculation is not None
    assert outcome.last.speculation.drafted > 0
    engine(folder, exit_layer=2)
    with pytest.raises(ConfigError, match="trained for the exit after layer 2, not 1; leave exit_layer out"):
        engine(folder, exit_layer=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "a target of hidden size 64, and this one has 32"),
        ({"num_layers": 4}, "a target of number of layers 4, and this one has 3"),
        ({"vocab_size": 50}, f"a target of vocabulary 50, and this one has {VOCAB}"),
        ({"exit_layer": 4}, "puts the exit after layer 4 of 3"),
    ],
)
def test_adapters_of_other_targets_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    config = replace(CONFIG, **change)
    write_adapter(tmp_path, config, weights(config))
    with pytest.raises(ModelError, match=message):
        engine(tmp_path)


def lose(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        del held[name]
        save_file(held, folder / "model.safetensors")

    return change


def reshape(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["up_proj.bias"] = held["up_proj.bias"][:7].clone()
    save_file(held, folder / "model.safetensors")


def add(folder: Path) -> None:
    save_file({**load_file(folder / "model.safetensors"), "extra": torch.ones(1)}, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def edit(**entries: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose("down_proj.weight"), "missing: down_proj.weight"),
        (reshape, r"up_proj.bias has shape \[7\], not \[24\]"),
        (add, "unknown to this architecture: extra"),
        (truncate, "damaged or cut short"),
        (edit(intermediate_size=25), r"has shape \[24, 32\], not \[25, 32\]"),
        (edit(exit_layer="2"), "exit_layer must be whole numbers from 1 on"),
        (edit(num_hidden_layers=None, vocab_size=0), "num_hidden_layers, vocab_size must be whole numbers"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    ],
)
def test_spoilt_adapters_are_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        engine(folder)


def test_other_drafters_are_named() -> None:
    with pytest.raises(ModelError, match=r"holds Medusa, not an early-exit adapter.*--speculate medusa="):
        engine(ROOT / "demo" / "medusa")
    with pytest.raises(ModelError, match=r"exit_layer.* must be whole numbers"):
        engine(ROOT / "demo" / "target")


def test_an_adapter_is_no_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"an early-exit adapter.*--speculate early-exit="):
        check_model(config, folder)
    with pytest.raises(CheckpointError, match="--speculate early-exit="):
        load_model(folder)


def test_only_whole_adapters_are_written(tmp_path: Path) -> None:
    held = weights()
    del held["gate_proj.bias"]
    with pytest.raises(ValueError, match="has other weights"):
        write_adapter(tmp_path, CONFIG, held)
    assert not list(tmp_path.iterdir())
