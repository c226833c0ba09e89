"""Models of transformers, left after their first layer: they are transformers' model of that one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from decoding.drafters.early_exit import EarlyExitOptions, load_early_exit
from decoding.errors import ConfigError
from decoding.request import GenerateRequest, SamplingParams
from models.early_exit import ExitModel
from models.transformers_model import TransformersModel, load_transformers_model
from tests.engines import ALL_NODES, BuildDrafter, make_engine, run
from tests.paged import PagedRun
from tests.parity import zoo
from training.recipes.draft import cut_down

PROMPTS = [[7, 3, 9, 12, 40, 31, 8], [7 * i % 47 for i in range(53)]]  # the second is longer than the sliding windows


def load(name: str, folder: Path, dtype: str = "float32") -> TransformersModel:
    path = zoo.save(zoo.make(name), folder)
    return load_transformers_model(path, dtype=dtype, device=torch.device("cpu"), attention="auto", max_model_len=None)


@pytest.mark.parametrize("name", zoo.FAMILIES)
@torch.no_grad()
def test_the_first_layer_is_transformers_model_of_one(name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    theirs = cut_down(tmp_path, [0]).eval()
    logits = PagedRun(ExitModel(model, 1), rows=2).extend(PROMPTS, chunk=20)
    for prompt, row in zip(PROMPTS, logits, strict=True):
        expected = theirs(torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert len(model.layers) == 2, "the model itself is whole"
    torch.testing.assert_close(
        PagedRun(model).extend(PROMPTS[:1])[0], PagedRun(ExitModel(model, 2)).extend(PROMPTS[:1])[0]
    )


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("exit_layer", [0, 1, 2])
def test_they_draft_for_themselves(name: str, exit_layer: int, tmp_path: Path) -> None:
    model: Any = load(name, tmp_path, "float64")
    params = SamplingParams(24, 0.0, ignore_eos=True)
    request = GenerateRequest("r", tuple(PROMPTS[1]), params)
    options = EarlyExitOptions(exit_layer=exit_layer, depth=3, top_k=1, beam=1, min_confidence=0.0)
    drafters: dict[str, BuildDrafter] = {"early-exit": lambda context: load_early_exit(options, context)}
    engine = make_engine(model, drafters, plan=ALL_NODES, max_nodes=3)
    outcome = run(engine, [request])["r", 0]
    assert outcome.tokens == run(make_engine(model), [request])["r", 0].tokens
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.drafted > 0
    if exit_layer == 2:
        assert stats.accepted == stats.drafted


def test_a_decoder_that_does_not_run_cut_short_is_refused(tmp_path: Path) -> None:
    model: Any = load("gpt2", tmp_path)

    class Strict(type(model.decoder)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if len(self.h) != 2:
                raise RuntimeError("two layers are needed")
            return super().forward(*args, **kwargs)

    model.decoder.__class__ = Strict
    drafters: dict[str, BuildDrafter] = {
        "early-exit": lambda context: load_early_exit(EarlyExitOptions(exit_layer=1), context)
    }
    with pytest.raises(ConfigError, match="does not stop after layer 1: two layers are needed"):
        make_engine(model, drafters)
