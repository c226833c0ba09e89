"""The recipes for early exit: an adapter on a frozen target, and LayerSkip for the target itself."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding.engine import Engine
from decoding.request import SamplingParams
from decoding.text import Tokenizer
from models.heads.early_exit import load_adapter
from tests.engines import ALL_NODES
from tests.parity.tiny import SHAPE, load_reference, save_tiny
from tests.parity.zoo import make, save
from training.capture import FrozenTarget
from training.cli import main
from training.errors import TrainError
from training.recipe import TrainContext, Windows
from training.recipes.early_exit import AdapterModule, EarlyExitOptions, EarlyExitRecipe
from training.recipes.layerskip import (
    LayerSkipModule,
    LayerSkipOptions,
    LayerSkipRecipe,
    build_layerskip,
    dropout_rates,
    exit_weights,
)

DEMO = Path(__file__).parents[2] / "demo"
CPU = torch.device("cpu")
V, LAYERS = SHAPE["vocab_size"], 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS)


def windows(rows: int = 2, length: int = 24) -> Windows:
    tokens = torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(7))
    counts = torch.ones(rows, length, dtype=torch.bool)
    counts[0, :9] = False  # a prompt
    return Windows(tokens, counts)


def of_labels(values: Tensor, batch: Windows) -> Tensor:
    """[N, ..] of values [B, S, ..] after each token: those that are to be the next label's."""
    return values[:, :-1][batch.counts[:, 1:]]


# an adapter --------------------------------------------------------------------------------------------------------


def build(folder: Path, **options: object) -> EarlyExitRecipe:
    target = FrozenTarget.load(folder, device=CPU, dtype=torch.float32)
    return EarlyExitRecipe(EarlyExitOptions(**{"dtype": "float32", **options}), target)  # type: ignore[arg-type]


def stir(recipe: EarlyExitRecipe) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in recipe.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted(recipe: EarlyExitRecipe, hidden: Tensor) -> Tensor:
    assert isinstance(recipe.module, AdapterModule)
    made: Tensor = recipe.module(hidden)
    return made


@pytest.mark.parametrize("labels", ["target", "text"])
@pytest.mark.parametrize("exit_layer", [1, 3])
@torch.no_grad()
def test_the_loss_is_that_of_the_adapted_exit(folder: Path, exit_layer: int, labels: str) -> None:
    recipe, batch = build(folder, labels=labels, exit_layer=exit_layer), windows()
    stir(recipe)
    losses = recipe.loss(batch)
    reference = load_reference(folder)
    out = reference(batch.tokens, output_hidden_states=True)
    hidden = adapted(recipe, reference.base_model.norm(out.hidden_states[exit_layer]))
    guess = of_labels(reference.get_output_embeddings()(hidden).log_softmax(-1), batch)
    teacher = of_labels(out.logits.log_softmax(-1), batch)
    wanted = batch.tokens[:, 1:][batch.counts[:, 1:]]
    if labels == "target":
        expected, first = (teacher.exp() * (teacher - guess)).sum(-1).mean(), teacher.argmax(-1)
    else:
        expected, first = -guess.gather(1, wanted[:, None]).mean(), wanted
    torch.testing.assert_close(losses.total, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses.metrics["accuracy@1"], (guess.argmax(-1) == first).float().mean())


def test_it_begins_as_the_exit_itself_and_learns(folder: Path) -> None:
    recipe, batch = build(folder), windows()
    hidden = torch.randn(3, SHAPE["hidden_size"])
    assert torch.equal(adapted(recipe, hidden), hidden)
    optimizer = torch.optim.Adam(recipe.module.parameters(), lr=5e-3)
    before = recipe.loss(batch)
    for _ in range(60):
        optimizer.zero_grad()
        recipe.loss(batch).total.backward()
        optimizer.step()
    after = recipe.loss(batch)
    assert after.metrics["loss@1"] < 0.5 * before.metrics["loss@1"]
    assert after.metrics["accuracy@1"] > before.metrics["accuracy@1"]


def test_an_exit_after_all_layers_has_nothing_to_learn(folder: Path) -> None:
    losses = build(folder, exit_layer=LAYERS).loss(windows())
    assert losses.metrics["loss@1"].item() == pytest.approx(0, abs=1e-4)
    assert losses.metrics["accuracy@1"].item() == 1


def test_the_file_is_what_was_trained(folder: Path, tmp_path: Path) -> None:
    recipe = build(folder, exit_layer=2, mlp=40)
    stir(recipe)
    recipe.save(tmp_path)
    target = FrozenTarget.load(folder, device=CPU, dtype=torch.float32)
    adapter = load_adapter(tmp_path, target.model)
    assert (adapter.config.exit_layer, adapter.config.mlp_size) == (2, 40)
    hidden = torch.randn(5, SHAPE["hidden_size"])
    with torch.no_grad():
        torch.testing.assert_close(adapter(hidden), adapted(recipe, hidden), rtol=1e-4, atol=1e-4)


def test_adapters_are_trained_on(folder: Path, tmp_path: Path) -> None:
    first = build(folder, exit_layer=2)
    stir(first)
    first.save(tmp_path)
    again = build(folder, exit_layer=2, init=str(tmp_path)).module.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in first.module.state_dict().items())
    for options in ({"exit_layer": 1}, {"exit_layer": 2, "mlp": 9}):
        with pytest.raises(TrainError, match="give the --exit-layer and --mlp that made it"):
            build(folder, init=str(tmp_path), **options)
    with pytest.raises(TrainError, match=r"--init .* cannot be trained on"):
        build(folder, init=str(folder))


def test_models_of_transformers_are_left_early_too(tmp_path: Path) -> None:
    recipe, batch = build(save(make("gpt2"), tmp_path), exit_layer=1), windows()
    with torch.no_grad():
        losses = recipe.loss(batch)
    reference = load_reference(tmp_path)
    with torch.no_grad():
        out = reference(batch.tokens, output_hidden_states=True)
        hidden = reference.base_model.ln_f(out.hidden_states[1])
    guess = of_labels(reference.get_output_embeddings()(hidden).log_softmax(-1), batch)
    teacher = of_labels(out.logits.log_softmax(-1), batch)
    expected = (teacher.exp() * (teacher - guess)).sum(-1).mean()
    torch.testing.assert_close(losses.total, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": 0}, "--mlp must be at least 1"),
        ({"labels": "teacher"}, "--labels must be one of target, text"),
        ({"dtype": "int8"}, "--dtype must be one of float32"),
        ({"exit_layer": LAYERS + 1}, f"no exit after layer {LAYERS + 1}"),
        ({"exit_layer": 0}, "no exit after layer 0"),
    ],
)
def test_options_that_cannot_work_say_so(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        build(folder, **options)


def text_file(folder: Path) -> str:
    path = folder / "text.py"
    path.write_text("def add(a, b):\n    return a + b\n\n" * 200)
    return str(path)


RUN = ["--steps", "3", "--window", "64", "--batch", "2", "--device", "cpu"]
GREEDY = SamplingParams(max_tokens=12, temperature=0)


def test_one_command_makes_an_adapter_that_is_served(tmp_path: Path) -> None:
    target, out = str(DEMO / "target"), tmp_path / "adapter"
    data = ["--data", text_file(tmp_path), "--out", str(out)]
    assert main(["early-exit", "--target", target, *data, "--exit-layer", "2", "--mlp", "32", *RUN]) == 0
    assert {"model.safetensors", "config.json", "training.jsonl"} <= {path.name for path in out.iterdir()}
    plain = Engine.load(target, device="cpu").generate("def add(", GREEDY)
    engine = Engine.load(target, device="cpu", speculate=(f"early-exit={out}",), plan=ALL_NODES)
    (drafted,) = engine.generate("def add(", GREEDY)
    assert drafted.token_ids == plain[0].token_ids
    assert drafted.speculation.drafted > 0


# LayerSkip ---------------------------------------------------------------------------------------------------------


def layerskip(folder: Path, **options: object) -> LayerSkipRecipe:
    context = TrainContext(
        target=folder,
        tokenizer=Tokenizer.load(DEMO / "target"),
        tokenizer_folder=DEMO / "target",
        device=CPU,
        autocast=None,
        window=24,
        seed=0,
        corpus=torch.arange(V).numpy(),
        checkpointing=bool(options.pop("checkpointing", False)),
    )
    return build_layerskip(LayerSkipOptions(**options), context)  # type: ignore[arg-type]


def test_dropout_rises_exponentially_with_depth() -> None:
    rates = dropout_rates(8, 0.2)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)
    grown = [1 + rate / 0.2 for rate in rates]
    assert all(b / a == pytest.approx(2 ** (1 / 7)) for a, b in itertools.pairwise(grown))
    assert dropout_rates(1, 0.2) == [0.0]


def test_later_exits_weigh_more() -> None:
    assert exit_weights(5, 0.5) == [0, 0.5, 1.5, 3.0, 4 + 3.0]
    assert exit_weights(1, 0.5) == [1]


def test_curricula() -> None:
    rotating = LayerSkipOptions(interval=3)
    assert [rotating.exits_on(step, 8) for step in range(4)] == [[0, 3, 6, 7], [1, 4, 7], [2, 5, 7], [0, 3, 6, 7]]
    assert {layer for step in range(3) for layer in rotating.exits_on(step, 8)} == set(range(8))
    gradual = LayerSkipOptions(curriculum="gradual", gradual_steps=80)
    assert [gradual.exits_on(step, 8)[0] for step in (0, 4, 5, 10, 34, 35, 80)] == [7, 7, 6, 5, 1, 0, 0]
    assert gradual.exits_on(40, 8) == list(range(8))


@torch.no_grad()
def test_validation_looks_at_every_exit(folder: Path) -> None:
    recipe, batch = layerskip(folder, dropout=0.9), windows()
    recipe.module.eval()
    losses = recipe.loss(batch)
    reference = load_reference(folder)
    out = reference(batch.tokens, output_hidden_states=True)
    labels = batch.tokens[:, 1:][batch.counts[:, 1:]]
    total = 0.0
    weights = exit_weights(LAYERS, 0.2)
    for layer in range(1, LAYERS + 1):
        normed = out.hidden_states[layer] if layer == LAYERS else reference.base_model.norm(out.hidden_states[layer])
        guess = of_labels(reference.get_output_embeddings()(normed).log_softmax(-1), batch)
        loss = -guess.gather(1, labels[:, None]).mean()
        torch.testing.assert_close(losses.metrics[f"loss@{layer}"], loss, rtol=1e-3, atol=1e-4)
        total += weights[layer - 1] * float(loss)
    assert float(losses.total) == pytest.approx(total / sum(weights), rel=1e-3)


@torch.no_grad()
def test_a_layer_that_is_left_out_hands_texts_on_as_they_came(folder: Path) -> None:
    recipe = layerskip(folder)
    assert isinstance(recipe.module, LayerSkipModule)
    tokens = windows(rows=40).tokens
    torch.manual_seed(0)
    whole = recipe.module.streams(tokens, None)
    some = recipe.module.streams(tokens, [0.0, 0.5, 0.0, 0.0])
    assert torch.equal(some[0], whole[0])
    kept = torch.stack([(a == b).all() for a, b in zip(some[1], whole[1], strict=True)])
    dropped = torch.stack([(a == b).all() for a, b in zip(some[1], whole[0], strict=True)])
    assert (kept ^ dropped).all()
    assert 8 < int(dropped.sum()) < 32
    for layer in (2, 3):
        torch.testing.assert_close(some[layer][kept], whole[layer][kept])
        assert not torch.equal(some[layer][dropped], whole[layer][dropped])


def test_training_moves_early_exits_and_counts_steps(folder: Path) -> None:
    recipe, batch = layerskip(folder, dropout=0.05, interval=1, e_scale=1.0), windows(rows=4)
    optimizer = torch.optim.Adam(recipe.module.parameters(), lr=2e-3)

    def validate() -> dict[str, Tensor]:
        recipe.module.eval()
        with torch.no_grad():
            return recipe.loss(batch).metrics

    before = validate()
    recipe.module.train()
    for _ in range(40):
        optimizer.zero_grad()
        losses = recipe.loss(batch)
        losses.total.backward()
        optimizer.step()
    assert not losses.metrics, "which exits are on changes, so nothing can be averaged"
    after = validate()
    for layer in range(2, LAYERS + 1):
        assert after[f"loss@{layer}"] < 0.7 * before[f"loss@{layer}"]
    state: dict[str, Any] = recipe.module.state_dict()
    assert int(state["step"]) == 40, "a run that goes on later knows where its curriculum is"


def test_one_command_makes_a_model_that_is_left_early(tmp_path: Path) -> None:
    out = tmp_path / "model"
    data = ["--data", text_file(tmp_path), "--out", str(out)]
    assert main(["layerskip", "--target", str(DEMO / "target"), *data, *RUN]) == 0
    engine = Engine.load(str(out), device="cpu", speculate=("early-exit:exit_layer=2",), plan=ALL_NODES)
    (drafted,) = engine.generate("def add(", GREEDY)
    assert drafted.token_ids == Engine.load(str(out), device="cpu").generate("def add(", GREEDY)[0].token_ids
    assert drafted.speculation.drafted > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "--dropout must be at least 0"),
        ({"dropout": math.nan}, "--dropout must be"),
        ({"e_scale": -1.0}, "--e-scale must be 0 or more"),
        ({"curriculum": "random"}, "--curriculum must be one of rotational, gradual"),
        ({"interval": 0}, "--interval and --gradual-steps"),
        ({"dtype": "int8"}, "--dtype must be one of float32"),
        ({"checkpointing": True}, "leave --checkpointing out"),
    ],
)
def test_layerskip_options_that_cannot_work_say_so(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        layerskip(folder, **options)


def test_layerskip_says_which_models_it_is_not_for(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="a gpt2 model has no 'layers' followed by a 'norm'"):
        layerskip(save(make("gpt2"), tmp_path))
