"""``--speculate eagle=PATH`` and ``eagle3=PATH`` in an engine."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from decoding.assemble import LoadedModel, build_drafters, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from decoding.request import GenerateRequest, SamplingParams
from tests.eagle import demo_eagle, demo_eagle3
from tests.engines import ROOT, run
from tests.parity.eagle_files import LLAMA, save

PATHS = {"eagle": demo_eagle, "eagle3": demo_eagle3}


@cache
def demo() -> LoadedModel:
    return load_target(EngineConfig(f"{ROOT}/demo/target", dtype="float32"))


def prompts() -> list[tuple[int, ...]]:
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:8]
    return [tuple(demo().tokenizer.encode(json.loads(line)["prompt"]))[:100] for line in lines]


def built(*speculate: str) -> Engine:
    folder = f"{ROOT}/demo/target"
    config = EngineConfig(folder, dtype="float32", speculate=speculate, num_pages=400, max_nodes=16, plan="fixed")
    return Engine(config, demo(), build_stepper(config, demo(), build_drafters(config, demo())))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_its_guesses_are_often_right(name: str, temperature: float) -> None:
    engine = built(f"{name}={PATHS[name]()}:tau=0.5,min_confidence=0.0,depth=3")
    params = SamplingParams(40, temperature, seed=4, ignore_eos=True)
    requests = [GenerateRequest(f"r{i}", prompt, params) for i, prompt in enumerate(prompts())]
    outcomes, plain = run(engine, requests), run(built(), requests)
    assert {key: outcome.tokens for key, outcome in outcomes.items()} == {key: o.tokens for key, o in plain.items()}
    stats = [outcome.last.speculation for outcome in outcomes.values()]
    accepted = sum(each.accepted for each in stats if each is not None)
    assert accepted == sum(each.by_drafter[name].accepted for each in stats if each is not None)
    assert accepted >= 0.15 * sum(each.steps for each in stats if each is not None)


def test_eagle3_reads_the_targets_taps_and_eagle1_its_output() -> None:
    config = EngineConfig(f"{ROOT}/demo/target", dtype="float32")
    for text, taps in ((f"eagle3={demo_eagle3()}", (2, 5, 7)), (f"eagle={demo_eagle()}", ())):
        (drafter,) = build_drafters(EngineConfig(config.model, speculate=(text,)), demo())
        assert isinstance(drafter, FeatureDrafter)
        assert drafter.needs.taps == taps
        assert drafter.needs.kv is not None
    text = f"eagle3={demo_eagle3()}:tap_shift=-1"
    (drafter,) = build_drafters(EngineConfig(config.model, speculate=(text,)), demo())
    assert drafter.needs.taps == (1, 4, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eagle=/no/such/folder", "eagle: there is no folder '/no/such/folder'"),
        ("eagle3=/no/such/folder", "eagle3: there is no folder '/no/such/folder'"),
        ("eagle={three}", "eagle: .* holds EAGLE-3, not EAGLE-1: load it with --speculate eagle3={three}"),
        ("eagle3={one}", "eagle3: .* holds an EAGLE-1 drafter: load it with --speculate eagle={one}"),
        (f"eagle={ROOT}/demo/draft", r"is no EAGLE-1 drafter: it has no fc\.weight"),
        (f"eagle3={ROOT}/demo/draft", "holds no drafter"),
        ("eagle3={three}:tap_shift=1", "enter layers 3, 6, 8, and the target has layers 0 to 7"),
    ],
)
def test_checkpoints_that_do_not_fit(text: str, message: str) -> None:
    paths = {"one": demo_eagle(), "three": demo_eagle3()}
    with pytest.raises(ModelError, match=message.format(**paths)):
        built(text.format(**paths))


@pytest.mark.parametrize("name", PATHS)
def test_options_out_of_range(name: str) -> None:
    for options, message in (("depth=0", "at least 1"), ("tau=0", "tau must be positive"), ("beam=40", "under 64")):
        with pytest.raises(ConfigError, match=f"{name}: .*{message}"):
            built(f"{name}={PATHS[name]()}:{options}")


def test_a_smaller_targets_drafter_is_refused(tmp_path: Path) -> None:
    config = LLAMA | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 7}
    save(tmp_path, config, {"fc.weight": torch.ones(32, 96)})
    with pytest.raises(ModelError, match="for a target of hidden size 32, and this one has 256"):
        built(f"eagle3={tmp_path}")
