"""The Medusa recipe: what it learns, and that what it writes is what it trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.engine import Engine
from decoding.request import SamplingParams
from models.heads.medusa import HEADS_FILE, load_medusa, open_medusa
from tests.engines import ALL_NODES
from tests.parity.tiny import SHAPE, load_reference, save_tiny
from training.capture import FrozenTarget
from training.cli import main
from training.errors import TrainError
from training.optim import OptimizerOptions, Optimizers
from training.recipe import Windows
from training.recipes.medusa import MedusaModule, MedusaOptions, MedusaRecipe

DEMO = Path(__file__).parents[2] / "demo"
CPU = torch.device("cpu")
V, HEADS = SHAPE["vocab_size"], 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("target"))


def build(folder: Path, **options: object) -> MedusaRecipe:
    target = FrozenTarget.load(folder, device=CPU, dtype=torch.float32)
    return MedusaRecipe(MedusaOptions(**{"heads": HEADS, "dtype": "float32", **options}), target)  # type: ignore[arg-type]


def stir(recipe: MedusaRecipe) -> None:
    """Weights as after a training that went astray."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in recipe.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def windows(rows: int = 2, length: int = 24) -> Windows:
    """A text in which every token follows from the one before."""
    tokens = [torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(7))]
    while len(tokens) < length:
        tokens.append((tokens[-1] * 5 + 3) % V)
    counts = torch.ones(rows, length, dtype=torch.bool)
    counts[0, :9] = False  # a prompt
    return Windows(torch.stack(tokens, dim=1), counts)


def heads_by_hand(tensors: dict[str, Tensor], hidden: Tensor, head: int, layers: int, output: Tensor) -> Tensor:
    """The formula of section 2.1.1."""
    state = hidden
    for block in range(layers):
        name = f"{head}.{block}.linear"
        state = state + F.silu(state @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])
    return state @ output.T


@pytest.mark.parametrize("share_head", [False, True])
def test_heads_are_trained_on(folder: Path, tmp_path: Path, share_head: bool) -> None:
    first = build(folder, share_head=share_head)
    stir(first)
    first.save(tmp_path)
    again = build(folder, share_head=share_head, init=str(tmp_path)).module.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in first.module.state_dict().items())
    with pytest.raises(TrainError, match="--heads"):
        build(folder, share_head=share_head, init=str(tmp_path), heads=HEADS + 1)
    with pytest.raises(TrainError, match="--init"):
        build(folder, share_head=share_head, init=str(folder))


@pytest.mark.parametrize("labels", ["target", "text"])
@pytest.mark.parametrize("share_head", [False, True])
def test_the_loss_is_that_of_each_head_at_its_own_distance(folder: Path, labels: str, share_head: bool) -> None:
    recipe, batch = build(folder, labels=labels, layers=2, share_head=share_head), windows()
    stir(recipe)
    with torch.no_grad():
        losses = recipe.loss(batch)
    reference = load_reference(folder)
    with torch.no_grad():
        out = reference(batch.tokens, output_hidden_states=True)
    hidden, log_probs = out.hidden_states[-1], out.logits.log_softmax(-1)
    assert isinstance(recipe.module, MedusaModule)
    tensors = {name: tensor.detach() for name, tensor in recipe.module.tensors().items()}
    wanted = []
    for head in range(HEADS):
        ahead = head + 2
        output = reference.get_output_embeddings().weight if share_head else tensors[f"{head}.2.weight"]
        guess = heads_by_hand(tensors, hidden[:, :-ahead], head, 2, output).log_softmax(-1)
        counts = batch.counts[:, ahead:]
        if labels == "text":
            each = F.nll_loss(guess[counts], batch.tokens[:, ahead:][counts])
        else:
            teacher = log_probs[:, ahead - 1 : -1][counts]
            each = (teacher.exp() * (teacher - guess[counts])).sum(-1).mean()
        torch.testing.assert_close(losses.metrics[f"loss@{head + 1}"], each, rtol=1e-3, atol=1e-4)
        wanted.append(0.8**head * each)
    torch.testing.assert_close(losses.total, sum(wanted) / sum(0.8**head for head in range(HEADS)), rtol=1e-3, atol=0)


def test_heads_begin_as_the_targets(folder: Path) -> None:
    recipe = build(folder)
    reference = load_reference(folder)
    hidden = torch.randn(1, 4, SHAPE["hidden_size"])
    assert isinstance(recipe.module, MedusaModule)
    for state, weight in zip(recipe.module(hidden), recipe.module.lm_heads, strict=True):
        assert torch.equal(state, hidden)
        assert torch.equal(weight, reference.get_output_embeddings().weight)


def test_muon_takes_the_blocks_and_leaves_the_outputs_to_adamw(folder: Path) -> None:
    module = build(folder).module
    muon, adamw = (part for part, _ in Optimizers(module, OptimizerOptions(optimizer="muon")).parts)
    assert isinstance(module, MedusaModule)
    outputs = {id(weight) for weight in module.lm_heads}
    assert {id(p) for group in muon.param_groups for p in group["params"]}.isdisjoint(outputs)
    assert {id(p) for group in adamw.param_groups for p in group["params"]} >= outputs


@pytest.mark.parametrize("share_head", [False, True])
def test_all_depths_learn(folder: Path, share_head: bool) -> None:
    recipe, batch = build(folder, labels="text", share_head=share_head), windows(rows=4)
    optimizer = torch.optim.Adam(recipe.module.parameters(), lr=0.02)
    before = recipe.loss(batch)
    for _ in range(60):
        optimizer.zero_grad()
        recipe.loss(batch).total.backward()
        optimizer.step()
    after = recipe.loss(batch)
    for depth in range(1, HEADS + 1):
        assert before.metrics[f"accuracy@{depth}"] < 0.3
        assert after.metrics[f"accuracy@{depth}"] > 0.9


@pytest.mark.parametrize(("share_head", "layers"), [(False, 1), (False, 2), (True, 1)])
def test_the_file_is_what_was_trained(folder: Path, tmp_path: Path, share_head: bool, layers: int) -> None:
    recipe = build(folder, share_head=share_head, layers=layers)
    stir(recipe)
    recipe.save(tmp_path)
    file = open_medusa(tmp_path)
    assert isinstance(recipe.module, MedusaModule)
    trained = recipe.module.tensors()
    for name, tensor in file.read():
        assert torch.equal(tensor, trained.pop(name))
    assert not trained
    target = FrozenTarget.load(folder, device=CPU, dtype=torch.float32)
    hidden = torch.randn(5, SHAPE["hidden_size"])
    with torch.no_grad():
        heads = recipe.module.lm_heads if not share_head else [target.head()] * HEADS
        wanted = torch.stack([s @ h.T for s, h in zip(recipe.module(hidden), heads, strict=True)], dim=1)
    served = load_medusa(file, target.logits, CPU, torch.float32).logits(hidden, HEADS)
    torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-4)


def test_one_command_makes_a_drafter_that_is_served(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n\n" * 200)
    flags = ["--steps", "3", "--window", "64", "--batch", "2", "--heads", "2", "--device", "cpu"]
    out = tmp_path / "heads"
    assert main(["medusa", "--target", str(DEMO / "target"), "--data", str(text), "--out", str(out), *flags]) == 0
    assert {HEADS_FILE, "config.json", "training.png", "training.jsonl"} <= {path.name for path in out.iterdir()}
    params = SamplingParams(max_tokens=12, temperature=0)
    plain = Engine.load(str(DEMO / "target"), device="cpu").generate("def add(", params)
    engine = Engine.load(str(DEMO / "target"), device="cpu", speculate=(f"medusa={out}",), plan=ALL_NODES)
    (drafted,) = engine.generate("def add(", params)
    assert drafted.token_ids == plain[0].token_ids
    assert drafted.speculation.drafted > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "--heads and --layers"),
        ({"layers": 0}, "--heads and --layers"),
        ({"labels": "teacher"}, "--labels must be one of target, text"),
        ({"depth_decay": 0.0}, "--depth-decay"),
        ({"dtype": "int8"}, "--dtype must be one of float32"),
    ],
)
def test_options_that_cannot_work_say_so(options: dict[str, object], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        MedusaOptions(**options)  # type: ignore[arg-type]
