"""EAGLE in training is EAGLE as served, every unrolled step of it, and what it learns is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads.eagle import load_eagle
from models.heads.eagle3_files import load_eagle3
from tests.engines import VOCAB
from tests.parity.tiny import random_prompt
from tests.rollouts import (
    TAPS,
    check_alignment,
    context,
    greedy_text,
    overfit,
    save_sure_target,
    save_target,
    serve,
    shake,
    tokens_per_step,
    windows,
)
from training.capture import FrozenTarget
from training.errors import TrainError
from training.modules import soft_labels
from training.modules.rollout import Pass, unroll
from training.modules.soft_labels import SoftLabels, soft_cross_entropy
from training.recipe import Windows
from training.recipes.eagle import EagleOptions, build_eagle, smooth_l1
from training.recipes.eagle3 import Eagle3Options, Eagle3Recipe, build_eagle3, frequent_tokens

EXACT = {"dtype": "float32", "taps": TAPS, "keep": 1.0}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def sure_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sure_target(tmp_path_factory.mktemp("sure"))


def eagle3(target: Path, corpus: np.ndarray | None = None, **options: Any) -> Eagle3Recipe:
    torch.manual_seed(3)
    return build_eagle3(Eagle3Options(**{**EXACT, "draft_vocab": 0, **options}), context(target, corpus))


# the same as served --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_output": False},
        {"norm_before_residual": False},
        {"layers": 2, "mlp": 40},
        {"draft_vocab": 20},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_every_unrolled_step_is_what_the_served_drafter_computes(target: Path, tmp_path: Path, options: Any) -> None:
    recipe = eagle3(target, np.arange(VOCAB) ** 2 % VOCAB, unroll=4, **options)
    shake(recipe.module)
    recipe.save(tmp_path)
    frozen = FrozenTarget(serve(target), target)
    with torch.no_grad():
        run = recipe._rollouts.run(windows())
    served = load_eagle3(tmp_path, frozen.model)
    if options.get("draft_vocab"):
        assert torch.equal(served.token_ids, recipe._vocabulary)  # type: ignore[arg-type]
    check_alignment(run.passes, recipe.module.lm_head.weight, served, frozen, windows(), (1, 2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["qwen3", "llama-tied-biased"])
def test_the_drafter_of_other_kinds_of_layers_is_the_served_one(tmp_path: Path, variant: str) -> None:
    target = save_target(tmp_path / "target", variant)
    recipe = eagle3(target, unroll=3)
    shake(recipe.module)
    (tmp_path / "drafter").mkdir()
    recipe.save(tmp_path / "drafter")
    frozen = FrozenTarget(serve(target), target)
    with torch.no_grad():
        run = recipe._rollouts.run(windows())
    served = load_eagle3(tmp_path / "drafter", frozen.model)
    check_alignment(run.passes, recipe.module.lm_head.weight, served, frozen, windows(), (1, 2, 3))  # type: ignore[arg-type]


def test_eagle_1_is_the_served_one(target: Path, tmp_path: Path) -> None:
    recipe = build_eagle(EagleOptions(unroll=3, keep=1.0, dtype="float32", noise=0.0), context(target))
    shake(recipe.module)
    recipe.save(tmp_path)
    frozen = FrozenTarget(serve(target), target)
    with torch.no_grad():
        run = recipe._rollouts.run(windows())
    check_alignment(run.passes, frozen.head(), load_eagle(tmp_path, frozen.model), frozen, windows(), ())


def test_eagle_3_begins_with_its_eyes_on_its_own_token(target: Path) -> None:
    module = eagle3(target, unroll=1).module
    first = module.layers[0].self_attn  # type: ignore[union-attr, index]
    inputs = torch.randn(1, 20, 2 * 64, generator=torch.Generator().manual_seed(0))
    own = first.o_proj(first.v_proj(inputs).unflatten(-1, (2, -1)).repeat_interleave(2, dim=2).flatten(2))
    with torch.no_grad():
        attended, _ = first(inputs, module._rope[:20], None, None)  # type: ignore[index]
    assert float(F.cosine_similarity(attended, own.detach(), dim=-1).min()) > 0.6
    assert float(F.cosine_similarity(attended, own.detach().roll(1, dims=1), dim=-1).mean()) < 0.3


# what is learnt ------------------------------------------------------------------------------------------------------


def test_a_text_learnt_by_heart_is_drafted_and_accepted(sure_target: Path, tmp_path: Path) -> None:
    text = greedy_text(sure_target, random_prompt(8, vocab=VOCAB), 40)
    recipe = build_eagle3(Eagle3Options(**{**EXACT, "unroll": 3}), context(sure_target, window=len(text)))
    losses = overfit(recipe, text, prompt=8, steps=150)
    assert [float(losses.metrics[f"accuracy@{depth}"]) for depth in (1, 2, 3)] == [1, 1, 1]
    recipe.save(tmp_path)
    # 40 tokens: the first comes with the prompt and the second with no draft, then 3 drafts and a bonus a step
    rate = tokens_per_step(sure_target, lambda model: load_eagle3(tmp_path, model), text, 8, depth=3)
    assert rate == pytest.approx(40 / (2 + 10), abs=0.4)


def test_eagle_1_learns_features_and_tokens(sure_target: Path, tmp_path: Path) -> None:
    text = greedy_text(sure_target, random_prompt(8, vocab=VOCAB), 40)
    recipe = build_eagle(EagleOptions(dtype="float32", noise=0.0), context(sure_target, window=len(text)))
    losses = overfit(recipe, text, prompt=8, steps=200)
    assert float(losses.metrics["accuracy@1"]) == 1
    assert float(losses.metrics["regression"]) < 0.2
    recipe.save(tmp_path)
    assert tokens_per_step(sure_target, lambda model: load_eagle(tmp_path, model), text, 8, depth=1) > 1.8


def test_a_resumed_run_draws_the_same_positions_and_noise(target: Path) -> None:
    first, second = (
        build_eagle(EagleOptions(unroll=3, keep=0.5, noise=0.5), context(target, window=WINDOW)) for WINDOW in (14, 14)
    )
    second.module.load_state_dict(first.module.state_dict())
    torch.manual_seed(1)
    ours = first.loss(windows())
    torch.manual_seed(2)
    torch.testing.assert_close(ours.total, second.loss(windows()).total, rtol=0, atol=0)


# the rollout ---------------------------------------------------------------------------------------------------------


def gradients(recipe: Eagle3Recipe, batch: Windows) -> list[Tensor]:
    recipe.module.zero_grad()
    recipe.loss(batch).total.backward()
    return [weight.grad.clone() for weight in recipe.module.parameters() if weight.grad is not None]


def test_checkpointing_changes_no_gradient(target: Path) -> None:
    plain = eagle3(target, unroll=3, keep=0.6)
    torch.manual_seed(3)
    options = Eagle3Options(**{**EXACT, "draft_vocab": 0, "unroll": 3, "keep": 0.6})
    saving = build_eagle3(options, context(target, checkpointing=True))
    saving.module.load_state_dict(plain.module.state_dict())
    wanted = gradients(plain, windows())
    assert len(wanted) == len(list(plain.module.parameters()))
    for ours, theirs in zip(gradients(saving, windows()), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fewer_anchors_compute_the_same_at_those(target: Path) -> None:
    recipe = eagle3(target, unroll=4)
    shake(recipe.module)
    module = recipe.module
    generator = torch.Generator().manual_seed(5)
    features, embedded = (torch.randn(2, 11, size, generator=generator) for size in (3 * 64, 64))
    with torch.no_grad():
        all_of_them = unroll(module, features, embedded, 4)  # type: ignore[arg-type]
        some = unroll(module, features, embedded, 4, 0.5, generator)  # type: ignore[arg-type]
    assert [len(each.anchors) for each in all_of_them] == [11, 10, 9, 8]
    assert [len(each.anchors) for each in some] == [11, 5, 2, 1]
    for whole, part in zip(all_of_them, some, strict=True):
        torch.testing.assert_close(part.hidden, whole.hidden[:, part.anchors])


def test_validation_sees_every_position(target: Path) -> None:
    recipe = eagle3(target, unroll=2, keep=0.3)
    recipe.module.eval()
    assert [len(each.anchors) for each in recipe._rollouts.run(windows()).passes] == [12, 11]


# the loss ------------------------------------------------------------------------------------------------------------

B, L, H, HT, V = 2, 9, 6, 5, 12


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soft_labels.PORTION, "cpu", 4 * B * V)  # labels fall into several, the last one shorter


def make_passes(generator: torch.Generator) -> list[Pass]:
    anchors = [torch.arange(L), torch.tensor([0, 1, 4, 5, 7]), torch.tensor([1, 5])]
    hidden = [torch.randn(B, len(a), H, generator=generator, dtype=torch.float64).requires_grad_() for a in anchors]
    return [Pass(a, h, h) for a, h in zip(anchors, hidden, strict=True)]


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([0, 2, 3, 7, 8, 11])])
def test_the_loss_is_the_formula(vocabulary: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    passes, weights = make_passes(generator), (1.0, 0.5, 0.25)
    target_head = 2 * torch.randn(V, HT, generator=generator, dtype=torch.float64)
    head = torch.randn(V if vocabulary is None else 6, H, generator=generator, dtype=torch.float64).requires_grad_()
    hidden = torch.randn(B, L, HT, generator=generator, dtype=torch.float64)
    counts = torch.rand(B, L, generator=generator) < 0.8
    labels = SoftLabels(hidden, counts, lambda h: h @ target_head.T, vocabulary)
    total, sums = soft_cross_entropy(passes, head, labels, weights)
    (3 * total).backward()
    inputs = [head, *(each.hidden for each in passes)]
    ours = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None

    ids = torch.arange(V) if vocabulary is None else vocabulary
    wanted = torch.zeros((), dtype=torch.float64)
    for step, (each, weight) in enumerate(zip(passes, weights, strict=True)):
        at = each.anchors + step
        logits, kept = hidden[:, at] @ target_head.T, counts[:, at]
        best = logits.argmax(-1)
        covered = kept & torch.isin(best, ids)
        entropy = F.cross_entropy(
            (each.hidden @ head.T).flatten(0, 1), logits[..., ids].softmax(-1).flatten(0, 1), reduction="none"
        )
        entropy = (entropy * covered.flatten()).sum()
        wanted = wanted + weight * entropy / kept.sum()
        guess = ids[(each.hidden @ head.T).argmax(-1)]
        assert int(sums[step].labels) == int(kept.sum())
        assert int(sums[step].covered) == int(covered.sum())
        assert int(sums[step].right) == int(((guess == best) & kept).sum())
        torch.testing.assert_close(sums[step].cross_entropy, entropy)
    assert vocabulary is None or 0 < int(sums[0].covered) < int(sums[0].labels)
    torch.testing.assert_close(total, wanted)
    (3 * wanted).backward()
    for got, tensor in zip(ours, inputs, strict=True):
        torch.testing.assert_close(got, tensor.grad)


def test_a_frozen_head_gets_no_gradient_and_validation_none_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    passes, head = make_passes(generator), torch.randn(V, H, generator=generator, dtype=torch.float64)
    hidden = torch.randn(B, L, HT, generator=generator, dtype=torch.float64)
    labels = SoftLabels(hidden, torch.ones(B, L, dtype=torch.bool), lambda h: h.repeat(1, 3)[:, :V])
    soft_cross_entropy(passes, head, labels, (1.0, 1.0, 1.0))[0].backward()
    assert head.grad is None
    assert all(each.hidden.grad is not None for each in passes)
    with torch.no_grad():
        assert not soft_cross_entropy(passes, head, labels, (1.0, 1.0, 1.0))[0].requires_grad


def test_windows_without_labels_give_no_loss(target: Path) -> None:
    recipe, batch = eagle3(target, unroll=2), windows()
    losses = recipe.loss(Windows(batch.tokens, torch.zeros_like(batch.counts)))
    losses.total.backward()
    assert float(losses.total.detach()) == 0
    assert all(torch.isfinite(value) for value in losses.metrics.values())


def test_labels_that_do_not_count_do_not_move_eagle_1(target: Path) -> None:
    guess, counts = torch.zeros(1, 3, 4), torch.tensor([[True, False, True]])
    wanted = torch.tensor([0.5, 100.0, 3.0])[None, :, None].expand(1, 3, 4)
    assert float(smooth_l1(guess, wanted, counts)) == pytest.approx((0.5 * 0.5**2 + 2.5) / 2)


# options -------------------------------------------------------------------------------------------------------------


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    corpus = np.array([7, 7, 7, 2, 2, 9, 4, 4, 0])
    assert frequent_tokens(corpus, 3, 10).tolist() == [2, 4, 7]  # type: ignore[union-attr]
    assert frequent_tokens(corpus, 0, 10) is None
    assert frequent_tokens(corpus, 10, 10) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": "1,9"}, "each from 0 to 3"),
        ({"taps": "a"}, "give --taps"),
        ({"unroll": 13}, "--unroll must be from 1 to 12"),
        ({"keep": 0.0}, "--keep"),
        ({"layers": 0}, "--layers"),
        ({"dtype": "int8"}, "--dtype must be one of"),
    ],
)
def test_options_that_cannot_work_are_named(target: Path, options: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        eagle3(target, **options)


def test_a_target_too_shallow_for_the_default_taps_says_what_to_give() -> None:
    assert Eagle3Options().chosen_taps(8) == (2, 4, 5)
    with pytest.raises(TrainError, match="taps 2,1,-1 do not fit a target of 2 layers; give --taps"):
        Eagle3Options().chosen_taps(2)
