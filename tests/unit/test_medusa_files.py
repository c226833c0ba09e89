"""Medusa heads on disk: the reference's layouts, our writer, and what is wrong with a folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoint import CheckpointError
from models.heads.medusa import HEADS_FILE, PICKLED_HEADS_FILE, MedusaConfig, load_medusa, open_medusa, write_medusa

H, V = 12, 40
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block as the paper writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return x + y * torch.sigmoid(y)


def reference(heads: int, blocks: int, outputs: bool = True) -> nn.ModuleList:
    """Heads as modules, whose names in a state dict are those of published files."""
    torch.manual_seed(heads + 10 * blocks)
    last = [nn.Linear(H, V, bias=False)] if outputs else []
    return nn.ModuleList(
        nn.Sequential(*(Block() for _ in range(blocks)), *(nn.Linear(H, V, bias=False) for _ in last))
        for _ in range(heads)
    )


def folder_of(path: Path, config: dict[str, Any], weights: dict[str, Tensor], name: str = HEADS_FILE) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file(weights, path / name)
    else:
        torch.save(weights, path / name)
    return path


def config_of(heads: int, blocks: int = 1) -> dict[str, Any]:
    return {"medusa_num_heads": heads, "medusa_num_layers": blocks, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}


def logits(folder: Path, hidden: Tensor, depth: int, shared: Tensor | None = None) -> Tensor:
    def target_logits(states: Tensor) -> Tensor:
        assert shared is not None, "the heads have outputs of their own"
        return states @ shared.T

    heads = load_medusa(open_medusa(folder), target_logits, CPU, torch.float32)
    with torch.inference_mode():
        return heads.logits(hidden, depth)


@pytest.mark.parametrize("name", [HEADS_FILE, PICKLED_HEADS_FILE])
@pytest.mark.parametrize(("heads", "blocks"), [(1, 1), (5, 1), (3, 2), (2, 0)])
def test_version_1(tmp_path: Path, name: str, heads: int, blocks: int) -> None:
    modules = reference(heads, blocks)
    folder = folder_of(tmp_path, config_of(heads, blocks), modules.state_dict(), name)
    config = open_medusa(folder).config
    assert config == MedusaConfig(H, heads, blocks, V, "lmsys/vicuna-7b-v1.3")
    hidden = torch.randn(7, H)
    for depth in range(1, heads + 1):
        expected = torch.stack([head(hidden) for head in modules][:depth], dim=1)
        actual = logits(folder, hidden, depth)
        assert actual.shape == (7, depth, V)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("heads", "blocks"), [(3, 1), (2, 2)])
def test_version_2_shares_the_target_s_head(tmp_path: Path, heads: int, blocks: int) -> None:
    modules = reference(heads, blocks, outputs=False)
    folder = folder_of(tmp_path, {**config_of(heads, blocks), "version": "2"}, modules.state_dict())
    assert open_medusa(folder).config.vocab_size is None
    hidden, shared = torch.randn(5, H), torch.randn(V, H)
    expected = torch.stack([head(hidden) @ shared.T for head in modules], dim=1)
    torch.testing.assert_close(logits(folder, hidden, heads, shared), expected)


def test_tied_blocks_of_the_reference(tmp_path: Path) -> None:
    """The reference repeats one block object, so its file has the same weights under several names."""
    modules = nn.ModuleList(nn.Sequential(*[Block()] * 2, nn.Linear(H, V, bias=False)) for _ in range(2))
    folder = folder_of(tmp_path / "tied", config_of(2, 2), modules.state_dict(), PICKLED_HEADS_FILE)
    hidden = torch.randn(3, H)
    torch.testing.assert_close(logits(folder, hidden, 2), torch.stack([head(hidden) for head in modules], dim=1))
    file = open_medusa(folder)
    write_medusa(tmp_path / "again", file.config, dict(file.read()))
    torch.testing.assert_close(logits(tmp_path / "again", hidden, 2), logits(folder, hidden, 2))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_within_a_whole_model(tmp_path: Path, name: str) -> None:
    modules = reference(4, 1)
    weights = {f"medusa_head.{key}": value for key, value in modules.state_dict().items()}
    others = {"model.embed_tokens.weight": torch.zeros(V, H), "lm_head.weight": torch.zeros(V, H)}
    folder = folder_of(tmp_path, {"model_type": "mistral", "architectures": ["X"]}, {**weights, **others}, name)
    hidden = torch.randn(2, H)
    expected = torch.stack([head(hidden) for head in modules], dim=1)
    torch.testing.assert_close(logits(folder, hidden, 4), expected)


def test_the_file_counts_the_heads_not_its_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config_of(2), reference(5, 1).state_dict())
    assert open_medusa(folder).config.num_heads == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [V, None])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, vocab: int | None) -> None:
    config = MedusaConfig(H, 3, 2, vocab, "some/model")
    weights = {name: torch.randn(shape).to(dtype) for name, shape in config.shapes().items()}
    write_medusa(tmp_path / "heads", config, weights)
    file = open_medusa(tmp_path / "heads")
    assert file.config == config
    read = dict(file.read())
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], weight), name
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == ["config.json", HEADS_FILE]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MedusaConfig(H, 2, 1, V)
    old = {name: torch.randn(shape) for name, shape in config.shapes().items()}
    write_medusa(tmp_path, config, old)

    def full(*args: object, **kwargs: object) -> None:
        (tmp_path / f".{HEADS_FILE}.part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.heads.head_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_medusa(tmp_path, config, {name: torch.zeros_like(weight) for name, weight in old.items()})
    assert all(torch.equal(weight, old[name]) for name, weight in open_medusa(tmp_path).read())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", HEADS_FILE]


def test_the_writer_refuses_other_tensors(tmp_path: Path) -> None:
    config = MedusaConfig(H, 1, 1, V)
    weights = {name: torch.zeros(shape) for name, shape in config.shapes().items()}
    with pytest.raises(ValueError, match=r"0\.1\.weight"):
        write_medusa(tmp_path, config, {**weights, "0.1.weight": torch.zeros(V + 1, H)})
    with pytest.raises(ValueError, match=r"0\.0\.linear\.bias"):
        write_medusa(tmp_path, config, {name: w for name, w in weights.items() if "bias" not in name})
    assert not list(tmp_path.iterdir())


# what can be wrong ---------------------------------------------------------------------------------------------------


def test_a_folder_without_heads(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no Medusa heads.*give the folder of the heads"):
        open_medusa(tmp_path)
    folder = folder_of(tmp_path, {}, {"model.norm.weight": torch.zeros(H)}, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no Medusa heads"):
        open_medusa(folder)


def test_no_config(tmp_path: Path) -> None:
    folder_of(tmp_path, {}, reference(1, 1).state_dict())
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_medusa(tmp_path)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("1.0.linear.weight", r"missing: 1\.0\.linear\.weight"),
        ("1.0.linear.bias", r"missing: 1\.0\.linear\.bias"),
        ("1.1.weight", r"missing: 1\.1\.weight"),
    ],
)
def test_missing_tensors_are_named(tmp_path: Path, drop: str, message: str) -> None:
    weights = reference(3, 1).state_dict()
    del weights[drop]
    with pytest.raises(CheckpointError, match=message):
        open_medusa(folder_of(tmp_path, config_of(3), weights))


def test_wrong_shapes_and_counts(tmp_path: Path) -> None:
    weights = reference(2, 1).state_dict()
    weights["1.0.linear.weight"] = torch.zeros(H + 1, H)
    with pytest.raises(CheckpointError, match=r"1\.0\.linear\.weight has shape \[13, 12\], not \[12, 12\]"):
        open_medusa(folder_of(tmp_path / "shape", config_of(2), weights))
    weights = reference(2, 1).state_dict()
    with pytest.raises(CheckpointError, match="medusa_num_heads 4, there are 2"):
        open_medusa(folder_of(tmp_path / "heads", config_of(4), weights))
    with pytest.raises(CheckpointError, match="medusa_num_layers 2, there are 1"):
        open_medusa(folder_of(tmp_path / "layers", config_of(2, 2), weights))
    with pytest.raises(CheckpointError, match="medusa_num_heads two"):
        open_medusa(folder_of(tmp_path / "words", {**config_of(2), "medusa_num_heads": "two"}, weights))


def test_another_architecture(tmp_path: Path) -> None:
    weights = {"fc.weight": torch.zeros(H, H), "layers.0.norm.weight": torch.zeros(H)}
    config = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 9}
    with pytest.raises(CheckpointError, match=r"EAGLE-3, not Medusa"):
        open_medusa(folder_of(tmp_path / "eagle", config, weights))
    with pytest.raises(CheckpointError, match=r"no Medusa heads.*\['Strange'\].*fc\.weight"):
        open_medusa(folder_of(tmp_path / "strange", {"architectures": ["Strange"]}, weights))


@pytest.mark.parametrize("name", [HEADS_FILE, PICKLED_HEADS_FILE])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, config_of(3), reference(3, 1).state_dict(), name)
    whole = (folder / name).read_bytes()
    for share in (0.1, 0.9):
        (folder / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match=r"damaged or cut short.*download it again"):
            load_medusa(open_medusa(folder), lambda states: states, CPU, torch.float32)


def test_a_file_that_is_none_of_pytorch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"damaged or cut short \(it is no file of PyTorch\)"):
        open_medusa(tmp_path)


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    folder_of(tmp_path, config_of(1), reference(1, 1).state_dict())
    (tmp_path / HEADS_FILE).unlink()
    with (tmp_path / PICKLED_HEADS_FILE).open("wb") as file:
        pickle.dump({"0.0.linear.weight": Trap()}, file, protocol=2)
    with pytest.raises(CheckpointError, match="could run code, so it is not loaded"):
        open_medusa(tmp_path)
    assert not ran.exists()
