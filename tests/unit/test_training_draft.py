"""The draft recipe: the target cut down, distilled, and served."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoding.engine import Engine
from decoding.request import SamplingParams
from decoding.text import Tokenizer
from tests.engines import ALL_NODES
from tests.parity.tiny import SHAPE, load_reference, save_tiny
from tests.parity.zoo import make, save, special
from training.cli import main
from training.errors import TrainError
from training.recipe import TrainContext, Windows
from training.recipes.draft import DraftOptions, build_draft, cut_down

DEMO = Path(__file__).parents[2] / "demo"
V = SHAPE["vocab_size"]


def context(folder: Path) -> TrainContext:
    return TrainContext(
        target=folder,
        tokenizer=Tokenizer.load(DEMO / "target"),
        tokenizer_folder=DEMO / "target",
        device=torch.device("cpu"),
        autocast=None,
        window=24,
        seed=0,
        corpus=torch.arange(V).numpy(),
        checkpointing=False,
    )


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


def windows() -> Windows:
    return Windows(tokens(), torch.ones(2, 24, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["llama", "llama-tied-biased", "qwen2", "qwen3-sliding", "gpt2"])
def test_with_all_layers_it_is_the_target(kind: str, tmp_path: Path) -> None:
    folder = save(make("gpt2"), tmp_path) if kind == "gpt2" else save_tiny(kind, tmp_path)
    reference = load_reference(folder)
    draft = cut_down(folder, list(range(reference.config.num_hidden_layers))).eval()
    with torch.no_grad():
        torch.testing.assert_close(draft(tokens()).logits, reference(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_the_chosen_layers_are_kept_in_order(tmp_path: Path) -> None:
    folder = save_tiny("qwen3-sliding", tmp_path)  # its layers are not all of one kind
    whole, cut = load_reference(folder), cut_down(folder, [0, 2])
    assert cut.config.num_hidden_layers == 2
    assert cut.config.layer_types == [whole.config.layer_types[layer] for layer in (0, 2)]
    theirs, ours = whole.state_dict(), cut.state_dict()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name.replace("layers.1.", "layers.2.")])


def test_a_draft_that_is_the_target_has_nothing_to_learn(tmp_path: Path) -> None:
    """Its losses compare the draft and the target at the same token, and count agreement."""
    folder = save_tiny("llama", tmp_path)
    recipe = build_draft(DraftOptions(layers=2, from_layers="0,1"), context(folder))
    losses = recipe.loss(windows())
    assert losses.metrics["loss@1"].item() == pytest.approx(0, abs=1e-4)
    assert losses.metrics["accuracy@1"].item() == 1
    one = build_draft(DraftOptions(layers=1), context(folder)).loss(windows())
    assert one.metrics["loss@1"] > 0.1


def test_a_draft_model_is_trained_on(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "target")
    first = build_draft(DraftOptions(), context(folder))
    (tmp_path / "draft").mkdir()
    first.save(tmp_path / "draft")
    again = build_draft(DraftOptions(init=str(tmp_path / "draft"), dtype="float32"), context(folder))
    ours = again.module.state_dict()
    assert all(torch.equal(ours[name], w.bfloat16().float()) for name, w in first.module.state_dict().items())
    other = save_tiny("qwen2", tmp_path / "other", vocab_size=V + 1)
    with pytest.raises(TrainError, match="vocabulary"):
        build_draft(DraftOptions(init=str(other)), context(folder))


def test_distillation_brings_the_draft_closer(tmp_path: Path) -> None:
    recipe = build_draft(DraftOptions(), context(save_tiny("llama", tmp_path)))
    optimizer = torch.optim.Adam(recipe.module.parameters(), lr=3e-3)
    before = recipe.loss(windows())
    for _ in range(40):
        optimizer.zero_grad()
        recipe.loss(windows()).total.backward()
        optimizer.step()
    after = recipe.loss(windows())
    assert after.metrics["loss@1"] < 0.3 * before.metrics["loss@1"]
    assert after.metrics["accuracy@1"] > before.metrics["accuracy@1"]


def test_one_command_makes_a_drafter_that_is_served(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.py"
    prompts.write_text("".join(f"def add_{n}(a, b):\n    return a + b * {n}\n\n" for n in range(40)))
    flags = ["--steps", "2", "--window", "64", "--batch", "2", "--device", "cpu", "--distill-tokens", "24"]
    out = tmp_path / "draft"
    target = ["--target", str(DEMO / "target")]
    assert main(["draft", *target, "--self-distill", str(prompts), "--out", str(out), *flags]) == 0
    engine = Engine.load(str(DEMO / "target"), device="cpu", speculate=(f"draft={out}",), plan=ALL_NODES)
    (drafted,) = engine.generate("def add(", SamplingParams(max_tokens=12, temperature=0))
    assert drafted.speculation.drafted > 0


def test_layers_are_spread_from_the_first_on() -> None:
    assert DraftOptions().chosen(8) == [0]
    assert DraftOptions(layers=2).chosen(8) == [0, 4]
    assert DraftOptions(layers=3).chosen(8) == [0, 2, 5]
    assert DraftOptions(layers=2, from_layers="0, 7").chosen(8) == [0, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 8}, "no smaller than the target, which has 8"),
        ({"layers": 2, "from_layers": "1"}, "as many layers of the target as --layers says"),
        ({"from_layers": "8"}, "each from 0 to 7"),
        ({"from_layers": "first"}, "such as 0"),
    ],
)
def test_layers_that_the_target_lacks(options: dict[str, object], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        dataclasses.replace(DraftOptions(), **options).chosen(8)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gemma2", "granite", "phi"])
def test_logits_that_are_not_the_heads_product_are_refused(kind: str, tmp_path: Path) -> None:
    folder = save(make(kind) if kind == "gemma2" else special(kind), tmp_path)
    with pytest.raises(TrainError, match="after the LM head"):
        build_draft(DraftOptions(), context(folder))
