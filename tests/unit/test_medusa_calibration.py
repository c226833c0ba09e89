"""``saccade calibrate``: accuracies of heads whose guesses are known, the tree, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.calibrate import CalibrationText, Options, calibrate, score
from decoding.assemble import LoadedModel
from decoding.drafters.static_tree import expected_tokens, read_choices
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from decoding.request import GenerateRequest, SamplingParams
from models.decoder import Decoder
from models.heads.medusa import MedusaHeads
from server.cli import main
from tests.engines import ROOT, VOCAB, demo_tokenizer, make_engine, run
from tests.medusa import blind_decoder, demo_heads, make_heads

TARGET = str(ROOT / "demo/target")


def loaded(target: Decoder) -> LoadedModel:
    return LoadedModel(target, demo_tokenizer(), VOCAB, (), {})


def heads_with(outputs: list[torch.Tensor], target: Decoder) -> MedusaHeads:
    hidden = target.hidden_size
    weights = {f"{k}.1.weight": output for k, output in enumerate(outputs)}
    weights |= {f"{k}.0.linear.weight": torch.zeros(hidden, hidden) for k in range(len(outputs))}
    return make_heads(target, weights | {f"{k}.0.linear.bias": torch.zeros(hidden) for k in range(len(outputs))})


def test_ranks_are_those_of_the_token_that_comes() -> None:
    """Token x is followed by x + 1. Head 0 knows it, head 1 has it third, head 2 does not have it."""
    ahead = [torch.eye(VOCAB).roll(shift, dims=0) for shift in (2, 3, 4)]  # [V, H]: what comes 2, 3 and 4 later
    better = torch.eye(VOCAB).roll(10, dims=0) + torch.eye(VOCAB).roll(11, dims=0)
    outputs = [ahead[0], ahead[1] + 2 * better, -ahead[2]]
    target = blind_decoder(torch.eye(VOCAB), torch.eye(VOCAB))
    text = CalibrationText(tuple(range(20)), 5, 0, 0.0)
    hits = score(text, loaded(target), heads_with(outputs, target))
    expected = torch.zeros(3, 21)
    # roots are tokens 5 to 18, guessed behind them are 6 to 19, 7 to 19 and 8 to 19
    expected[0, 0], expected[1, 2], expected[2, 20] = 14, 13, 12
    assert torch.equal(hits, expected)


def test_sampled_texts_are_scored_with_the_noise_of_their_draws() -> None:
    """All tokens have the same logits: coupled guesses are always right, others rarely."""
    state, head = torch.zeros(VOCAB, 16), torch.zeros(VOCAB, 16)
    state[:, 0] = 1.0
    head[:, 0] = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) / 4
    target = blind_decoder(state, head)
    params = SamplingParams(40, temperature=0.7, seed=11, ignore_eos=True)
    tokens = run(make_engine(target), [GenerateRequest("r", (1, 2, 3), params)])["r", 0].tokens
    heads = heads_with([head, head], target)
    coupled = score(CalibrationText((1, 2, 3, *tokens), 3, 11, 0.7), loaded(target), heads)
    assert coupled[:, 0].tolist() == [39, 38]
    assert coupled.sum() == 39 + 38
    other = score(CalibrationText((1, 2, 3, *tokens), 3, 12, 0.7), loaded(target), heads)
    assert other.sum() == 39 + 38
    assert other[0, 0] < 30


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_heads(), tmp_path / "heads"))


def words(heads: Path, *more: str) -> list[str]:
    prompts = ["--prompts", str(ROOT / "demo/prompts.jsonl"), "--limit", "2", "--max-tokens", "40"]
    return ["calibrate", TARGET, "--speculate", f"medusa={heads}", *prompts, "--dtype", "float32", *more]


@pytest.mark.parametrize("how", [["--temperature", "0.8"], ["--real-text"]])
def test_the_command_makes_a_tree_that_is_served(
    heads: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    assert main(words(heads, "--nodes", "12", *how)) == 0
    printed = capsys.readouterr().out
    content = json.loads((heads / "medusa_choices.json").read_text())
    assert f"a tree of 12 nodes; {content['expected_tokens']:.2f} tokens a step" in printed
    assert f"written to {heads / 'medusa_choices.json'}" in printed
    choices = read_choices(heads / "medusa_choices.json", 4, 8192)
    assert len(choices) == 12
    accuracy = content["accuracy"]
    assert [len(shares) for shares in accuracy] == [20] * 4
    assert all(0 <= sum(shares) <= 1.0001 for shares in accuracy)
    assert expected_tokens(accuracy, choices) == pytest.approx(content["expected_tokens"], abs=1e-3)
    assert content["provenance"]["command"].startswith("saccade calibrate")
    assert len(content["provenance"]["places"]) == 4

    settings = {"dtype": "float32", "max_nodes": 63, "num_pages": 64}
    engine = Engine.load(TARGET, speculate=(f"medusa={heads}:tree=calibrated",), plan="fixed", **settings)
    params = SamplingParams(24, temperature=0.0, ignore_eos=True)
    (made,) = engine.generate("def main():\n", params)
    (plain,) = Engine.load(TARGET, **settings).generate("def main():\n", params)
    assert made.token_ids == plain.token_ids
    assert made.speculation.drafted > 0


def test_out_names_another_file(heads: Path, tmp_path: Path) -> None:
    out = tmp_path / "tree.json"
    calibrate(Options(TARGET, f"medusa={heads}", ROOT / "demo/prompts.jsonl", limit=1, max_tokens=20, out=out), [])
    assert read_choices(out, 4, 8192)
    assert not (heads / "medusa_choices.json").exists()


def failing(heads: Path, **changes: object) -> Options:
    settings = {"model": TARGET, "speculate": f"medusa={heads}", "prompts": ROOT / "demo/prompts.jsonl", "limit": 1}
    return Options(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"nodes": 64}, ConfigError, "--nodes must be in 1 .. 63, not 64"),
        ({"out": Path("/no/such/folder/tree.json")}, ConfigError, "there is no folder /no/such/folder"),
        ({"speculate": "ngram"}, ConfigError, "only medusa has a tree to calibrate; give medusa=PATH"),
        ({"speculate": "medusa"}, ModelError, "holds no Medusa heads"),
        ({"speculate": "medusa=/no/such"}, ModelError, "medusa: there is no folder '/no/such'"),
        ({"model": "/no/such"}, ModelError, "there is no folder '/no/such'"),
        ({"prompts": Path("/no/such.jsonl")}, ConfigError, r"/no/such\.jsonl cannot be read"),
        ({"max_tokens": 2}, ConfigError, "no text is long enough to score every head"),
    ],
)
def test_what_cannot_work(heads: Path, changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(failing(heads, **changes), [])


def test_prompts_that_are_none(heads: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"text": "not"}\n')
    with pytest.raises(ConfigError, match='line 2 has no text in "prompt"'):
        calibrate(failing(heads, prompts=prompts, limit=None), [])


def test_a_wrong_word(heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words(heads, "--node", "3"))
    assert "did you mean '--nodes'" in capsys.readouterr().err
