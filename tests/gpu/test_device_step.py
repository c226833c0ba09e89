"""A step on a CUDA device: recorded passes against plain ones, noise and draws, one wait a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from decoding.engine import Engine
from decoding.noise import gumbel
from decoding.request import SamplingParams
from models.graphed_model import GraphedModel
from models.graphs import CudaCapture
from models.loader import load_model
from tests.paged import PagedRun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
DEMO = Path(__file__).parents[2] / "demo"
SPECULATE = (f"draft={DEMO / 'draft'}", "ngram")
PROMPTS = ["def fib(n):\n", "import os\n\n\ndef main():\n", "class Stack:\n    def __init__(self"]


@pytest.fixture
def strict() -> Iterator[None]:
    """Whatever waits for the device in a copy or a read is an error; waiting for an event is not."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_passes(dtype: str) -> None:
    model = load_model(DEMO / "target", dtype=dtype, device=DEVICE, attention="auto", max_model_len=None)
    graphed = GraphedModel(model, CudaCapture(DEVICE))
    runs = [PagedRun(each, rows=3) for each in (model, graphed)]
    with torch.inference_mode():
        for chains in ([[5, 6, 7, 8], [9], [3, 4]], [[1], [2], [3]], [[4], [5], [6]], [[7, 8], [9, 1], [2]]):
            plain, replayed = (torch.cat(run.extend(chains)) for run in runs)
            # linear layers choose their kernels by the number of rows, which padding changes
            torch.testing.assert_close(replayed, plain, rtol=0, atol=0.5 if dtype == "bfloat16" else 1e-2)


@pytest.mark.parametrize("name", ["device", "triton"])
def test_noise_and_draws(name: str) -> None:
    from decoding.sampling_ops import SAMPLING_OPS

    ops, count, vocab = SAMPLING_OPS[name](), 40, 50_000
    bank = torch.zeros(count, vocab, device=DEVICE)
    columns = [
        list(range(count)),
        [7 * i - 100 for i in range(count)],
        list(range(count)),
        [i % 3 for i in range(count)],
    ]
    ops.fill_noise(bank, *columns)
    expected = torch.empty(count, vocab)
    gumbel(expected, *(torch.tensor(each) for each in columns[1:]))
    distance = bank.cpu().view(torch.int32).long() - expected.view(torch.int32).long()
    assert int(distance.abs().max()) <= 2
    x, temperature = torch.randn(count, vocab, device=DEVICE), 0.5 + torch.rand(count, device=DEVICE)
    noise_row = torch.arange(count, device=DEVICE) - 1
    plain = SAMPLING_OPS["torch"]().draw(x, temperature, bank, noise_row)
    assert torch.equal(ops.draw(x, temperature, bank, noise_row), plain)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(60, 0.0, ignore_eos=True),
        SamplingParams(60, 0.8, seed=1, ignore_eos=True),
        SamplingParams(60, 0.8, seed=1, top_p=0.9, top_k=40, ignore_eos=True),
    ],
    ids=["greedy", "sampled", "filtered"],
)
@pytest.mark.usefixtures("strict")
def test_a_step_waits_once(params: SamplingParams) -> None:
    engine = Engine.load(str(DEMO / "target"), device="cuda", speculate=SPECULATE, dtype="float32")
    warm = engine.generate(PROMPTS, params)  # compiles and records
    torch.cuda.set_sync_debug_mode("error")
    again = engine.generate(PROMPTS, params)
    torch.cuda.set_sync_debug_mode("default")
    assert [each.token_ids for each in again] == [each.token_ids for each in warm]


def test_texts_with_and_without_graphs() -> None:
    """float32, so that rounding seldom matters; the flip rate is measured elsewhere."""
    params = SamplingParams(60, 0.8, seed=3, ignore_eos=True)
    texts = []
    for settings in ({"enforce_eager": True}, {}, {"speculate": SPECULATE}):
        engine = Engine.load(str(DEMO / "target"), device="cuda", dtype="float32", **settings)
        texts.append([each.token_ids for each in engine.generate(PROMPTS, params)])
    assert texts[0] == texts[1] == texts[2]
