"""The native decoder computes what transformers computes, however the tokens are fed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import kernels
from models.attention import AttentionSpec
from models.attention.reference import attend
from models.batch import RaggedBatch
from models.decoder import Decoder
from models.families import NATIVE_FAMILIES
from models.layers.linear import exact_packing
from models.layers.ops import TorchOps
from models.loader import Checkpoint, fill, load_model, read_config
from tests.paged import PagedRun, greedy, greedy_rows
from tests.parity.tiny import VARIANTS, load_reference, random_prompt, save_tiny

PROMPT_LENGTHS = (1, 15, 16, 17, 300)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {variant: save_tiny(variant, root / variant) for variant in VARIANTS}


def reference_logits(folder: Path, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        return load_reference(folder)(torch.tensor([prompt])).logits[0]


def native(folder: Path, **options: Any) -> Decoder:
    model = load_model(folder, **options)
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ops", [None, TorchOps()], ids=["auto", "torch"])
def test_logits_agree_with_transformers(folders: dict[str, Path], variant: str, ops: TorchOps | None) -> None:
    prompt, attention = random_prompt(300), "reference" if ops else "auto"
    (logits,) = PagedRun(native(folders[variant], ops=ops, attention=attention)).extend([prompt])
    expected = reference_logits(folders[variant], prompt)
    assert expected.std() > 0.5  # the comparison below is about something
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_is_that_of_transformers(folders: dict[str, Path], variant: str) -> None:
    prompts = [random_prompt(length) for length in PROMPT_LENGTHS]
    texts = greedy_rows(native(folders[variant]), prompts, 200)
    reference = load_reference(folders[variant])
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)  # else generate takes token 0 for padding
        out = reference.generate(ids, attention_mask=mask, max_new_tokens=200, do_sample=False, pad_token_id=0)
        assert text == out[0, len(prompt) :].tolist(), f"prompt of {len(prompt)}"
        assert len(set(text)) > 20  # not one token over and over


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tree_node_has_the_logits_of_its_path(folders: dict[str, Path], variant: str) -> None:
    model = native(folders[variant], dtype="float64")
    for in_tree, plain in tree_and_paths(model, random_prompt(37)):
        torch.testing.assert_close(in_tree, plain, rtol=0, atol=1e-9)


def tree_and_paths(model: Decoder, context: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [depth, V] of every root-to-leaf path of a random tree of 64 nodes: within the tree, and run plainly."""
    chance = random.Random(0)
    tokens, parents = (
        random_prompt(64, seed=1),
        [-1] + [chance.randrange(max(0, node - 9), node) for node in range(1, 64)],
    )
    run = PagedRun(model)
    run.extend([context])
    logits = run.tree(0, tokens, parents)
    for leaf in set(range(64)) - set(parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        plain = PagedRun(model).extend([context + [tokens[node] for node in path]])[0]
        yield logits[path], plain[len(context) :]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", ["llama-tied-biased", "mistral", "qwen3-sliding"])
def test_on_a_cpu_chunks_and_trees_do_not_change_a_bit(folders: dict[str, Path], variant: str, dtype: str) -> None:
    model, prompt = native(folders[variant], dtype=dtype), random_prompt(90)
    if exact_packing(model.device, model.dtype) is None or not kernels.serves(model.device, model.dtype):
        pytest.skip("neither packed linears nor compiled kernels here: equal up to rounding only")
    (whole,) = PagedRun(model).extend([prompt])
    for chunk in (1, 5, 16, 33):
        assert torch.equal(PagedRun(model).extend([prompt], chunk)[0], whole)
    for in_tree, plain in tree_and_paths(model, prompt[:37]):
        assert torch.equal(in_tree, plain)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_equals_whole_prefill(folders: dict[str, Path], variant: str, chunk: int) -> None:
    model, prompt = native(folders[variant], dtype="float64"), random_prompt(50)
    (whole,) = PagedRun(model).extend([prompt])
    (chunked,) = PagedRun(model).extend([prompt], chunk)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-9)


def test_rows_of_a_batch_do_not_touch_each_other(folders: dict[str, Path]) -> None:
    model = native(folders["qwen3-sliding"], dtype="float64")
    prompts = [random_prompt(length, seed=2) for length in (3, 40, 17)]
    assert greedy_rows(model, prompts, 30, chunk=8) == [greedy(model, prompt, 30) for prompt in prompts]


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16.0,
        "truncate": False,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 100,
    },
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("length", [90, 300])
def test_rope_scaling_agrees_with_transformers(tmp_path: Path, kind: str, length: int) -> None:
    rope = {"rope_theta": 10_000.0, **ROPES[kind]}
    folder = save_tiny(
        "llama", tmp_path, max_position_embeddings=512 if kind != "dynamic" else 128, rope_parameters=rope
    )
    prompt = random_prompt(length)
    # transformers takes length-dependent frequencies from the text at hand, we from the longest text served
    (logits,) = PagedRun(native(folder, max_model_len=length)).extend([prompt])
    assert (logits - reference_logits(folder, prompt)).abs().max() < TOLERANCE


@pytest.mark.parametrize("served", [90, 500])
def test_frequencies_do_not_depend_on_the_text(tmp_path: Path, served: int) -> None:
    """One text, fed whole to a server of long texts and token by token: the same logits on both."""
    rope = {"rope_theta": 10_000.0, **ROPES["longrope"]}
    model = native(save_tiny("llama", tmp_path, rope_parameters=rope), max_model_len=served, dtype="float64")
    prompt = random_prompt(80)
    (whole,), (single,) = PagedRun(model).extend([prompt]), PagedRun(model).extend([prompt], chunk=1)
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-9)


class InPlaceOps(TorchOps):
    """Reuses the residual's memory, as fused operations may."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual += x
        return self.rms_norm(residual, weight, eps), residual


@pytest.mark.parametrize("ops", [TorchOps(), InPlaceOps()], ids=["torch", "in-place"])
def test_taps_are_the_residual_stream(folders: dict[str, Path], ops: TorchOps) -> None:
    model, prompt = native(folders["qwen2-sliding"], ops=ops), random_prompt(40)
    run = PagedRun(model)
    out = run.forward(run.batch({0: prompt}), taps=(0, 2, 3))
    with torch.inference_mode():
        expected = load_reference(folders["qwen2-sliding"])(torch.tensor([prompt]), output_hidden_states=True)
        normed = ops.rms_norm(out.taps[3], model.final_norm, model.config.norm_eps)
    assert sorted(out.taps) == [0, 2, 3]
    for tap in (0, 2):
        torch.testing.assert_close(out.taps[tap], expected.hidden_states[tap][0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(out.hidden, normed)
    torch.testing.assert_close(out.hidden, expected.hidden_states[-1][0], rtol=0, atol=TOLERANCE)


def test_soft_caps_and_scale_reach_attention_and_logits(folders: dict[str, Path]) -> None:
    specs: list[AttentionSpec] = []

    def record(
        query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch, spec: AttentionSpec, sinks: None = None
    ) -> Tensor:
        specs.append(spec)
        return attend(query, keys, values, batch, spec, sinks)

    family, folder = NATIVE_FAMILIES["llama"], folders["llama"]
    capped = replace(
        family.configure(read_config(folder)), attention_soft_cap=20.0, logit_soft_cap=2.0, attention_scale=0.2
    )
    model = Decoder(capped, TorchOps(), record, torch.device("cpu"), torch.float32)
    fill(model.weights(), Checkpoint.open(folder), family, folder)
    run = PagedRun(model)
    hidden = run.forward(run.batch({0: random_prompt(9)})).hidden
    assert [(spec.soft_cap, spec.scale) for spec in specs] == [(20.0, 0.2)] * 2
    logits = hidden @ model.head.weight.T
    torch.testing.assert_close(model.logits(hidden), 2.0 * torch.tanh(logits / 2.0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_stay_near_transformers(folders: dict[str, Path], dtype: str) -> None:
    prompt = random_prompt(60)
    model = native(folders["qwen3"], dtype=dtype)
    (logits,) = PagedRun(model).extend([prompt])
    expected = reference_logits(folders["qwen3"], prompt)
    assert model.dtype == getattr(torch, dtype)
    assert logits.dtype == torch.float32
    error = (logits - expected).abs().mean() / expected.std()
    assert error < (0.03 if dtype == "bfloat16" else 0.004)
