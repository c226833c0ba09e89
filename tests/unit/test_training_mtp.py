"""The module for multi-token prediction in training is the one served, at every recursion; its drafts are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.attention import load_backend
from models.checkpoint import Checkpoint
from models.decoder import Decoder
from models.heads.mtp import MTPModel
from models.heads.mtp_files import load_mtp
from models.layers.ops import load_ops
from tests.engines import VOCAB
from tests.parity.tiny import random_prompt
from tests.rollouts import (
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
from training.recipes.mtp import MTPOptions, MTPRecipe, build_mtp


def mtp(target: Path, window: int = 14, **options: Any) -> MTPRecipe:
    torch.manual_seed(3)
    return build_mtp(MTPOptions(**{"dtype": "float32", "keep": 1.0, **options}), context(target, window=window))


def load(folder: Path, target: Decoder) -> MTPModel:
    cpu = torch.device("cpu")
    ops, attention = load_ops(cpu, target.dtype), load_backend("auto", cpu, target.dtype)
    return load_mtp(folder, target, ops, attention, "")


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "llama-tied-biased"])
@pytest.mark.parametrize("recycle", ["post", "pre"])
def test_every_recursion_is_what_the_served_module_computes(tmp_path: Path, variant: str, recycle: str) -> None:
    target = save_target(tmp_path / "target", variant)
    recipe = mtp(target, unroll=4, recycle=recycle)
    shake(recipe.module)
    (tmp_path / "drafter").mkdir()
    recipe.save(tmp_path / "drafter")
    frozen = FrozenTarget(serve(target), target)
    with torch.no_grad():
        run = recipe._rollouts.run(windows())
    served = load(tmp_path / "drafter", frozen.model)  # type: ignore[arg-type]
    assert served.config.recycle == recycle
    check_alignment(run.passes, frozen.head(), served, frozen, windows(), ())


def test_a_text_learnt_by_heart_is_drafted_and_accepted(tmp_path: Path) -> None:
    target = save_sure_target(tmp_path / "target")
    text = greedy_text(target, random_prompt(8, vocab=VOCAB), 40)
    recipe = mtp(target, window=len(text), unroll=3)
    losses = overfit(recipe, text, prompt=8, steps=150)
    assert [float(losses.metrics[f"accuracy@{depth}"]) for depth in (1, 2, 3)] == [1, 1, 1]
    (tmp_path / "drafter").mkdir()
    recipe.save(tmp_path / "drafter")
    # 40 tokens: the first comes with the prompt and the second with no draft, then 3 drafts and a bonus a step
    rate = tokens_per_step(target, lambda model: load(tmp_path / "drafter", model), text, 8, depth=3)
    assert rate == pytest.approx(40 / (2 + 10), abs=0.4)


def test_the_norms_begin_as_those_of_the_targets_end(tmp_path: Path) -> None:
    target = save_target(tmp_path, "qwen3")
    module = mtp(target, mlp=40).module
    names = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    stored = dict(Checkpoint.open(target).read(f"model.layers.3.{name}.weight" for name in names))
    for name in names:
        assert torch.equal(module.get_parameter(f"{name}.weight"), stored[f"model.layers.3.{name}.weight"])
    ((_, norm),) = Checkpoint.open(target).read(["model.norm.weight"])
    assert torch.equal(module.get_parameter("final_layernorm.weight"), norm)
    assert module.get_parameter("mlp.down_proj.weight").shape == (64, 40)


def test_the_weights_of_the_steps_add_up_to_one(tmp_path: Path) -> None:
    recipe = mtp(save_target(tmp_path), unroll=3, beta=0.6)
    assert recipe._rollouts._weights == pytest.approx((0.51, 0.306, 0.184), abs=1e-3)  # FastMTP's
    losses = recipe.loss(windows())
    wanted = sum(w * losses.metrics[f"loss@{d}"] for d, w in enumerate(recipe._rollouts._weights, start=1))
    torch.testing.assert_close(losses.total.detach(), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "--beta"),
        ({"recycle": "both"}, "--recycle must be one of post, pre"),
        ({"unroll": 0}, "--unroll must be from 1 to 12"),
        ({"dtype": "int4"}, "--dtype must be one of"),
    ],
)
def test_options_that_cannot_work_are_named(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        mtp(save_target(tmp_path), **options)
