"""The Medusa drafter in an engine: what it reads, when, and which trees are verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding.batcher import Nodes
from decoding.config import EngineConfig
from decoding.drafters.base import DrafterContext
from decoding.drafters.medusa import MedusaDrafter, MedusaOptions, load_medusa_drafter
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from decoding.plan import Plan
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.verify import Verdict
from models.batch import RaggedBatch
from models.decoder import Decoder
from models.heads.medusa import HEADS_FILE, MedusaConfig, write_medusa
from models.target import ForwardOutput
from tests.engines import ALL_NODES, ROOT, VOCAB, BuildDrafter, make_engine, run, tiny_decoder
from tests.medusa import blind_decoder, demo_heads

STEP = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
ENDS = SamplingParams(max_tokens=41, temperature=0.0, ignore_eos=True)


def write(folder: Path, outputs: list[Tensor], hidden: int) -> Path:
    """Heads whose blocks do nothing."""
    tensors = {f"{k}.1.weight": output.contiguous() for k, output in enumerate(outputs)}
    for k in range(len(outputs)):
        tensors[f"{k}.0.linear.weight"], tensors[f"{k}.0.linear.bias"] = (
            torch.zeros(hidden, hidden),
            torch.zeros(hidden),
        )
    write_medusa(folder, MedusaConfig(hidden, len(outputs), 1, len(outputs[0])), tensors)
    return folder


def from_folder(folder: Path, **options: object) -> BuildDrafter:
    return lambda context: load_medusa_drafter(MedusaOptions(str(folder), **options), context)  # type: ignore[arg-type]


def permuting(tmp_path: Path, heads: int, scale: float = 4.0) -> tuple[Decoder, Path]:
    """A target in whose text token x is followed by STEP[x], and heads that know it."""
    one_hot = torch.eye(VOCAB)
    after = torch.zeros(VOCAB, VOCAB)
    after[STEP, torch.arange(VOCAB)] = scale  # logits of what follows, from the last token's state
    outputs, ahead = [], after
    for _ in range(heads):
        ahead = after @ ahead / scale
        outputs.append(ahead)
    return blind_decoder(one_hot, after), write(tmp_path / "exact", outputs, VOCAB)


def lengths(engine: Engine, params: SamplingParams, prompt: tuple[int, ...] = (3, 1, 4, 1, 5)) -> list[int]:
    outcome = run(engine, [GenerateRequest("r", prompt, params)])["r", 0]
    return [len(event.token_ids) for event in outcome.events]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_heads_that_know_the_text_yield_depth_plus_one_tokens(tmp_path: Path, heads: int, temperature: float) -> None:
    target, folder = permuting(tmp_path, heads)
    engine = make_engine(target, {"medusa": from_folder(folder)}, plan=ALL_NODES)
    params = SamplingParams(max_tokens=1 + 5 * (heads + 1), temperature=temperature, seed=1, ignore_eos=True)
    assert lengths(engine, params) == [1] + [heads + 1] * 5, "nothing is known before the first step"


def test_guesses_are_coupled_to_the_draws_of_their_own_positions(tmp_path: Path) -> None:
    """Every token has the same logits, so only the noise of its position decides which one comes."""
    generator = torch.Generator().manual_seed(0)
    state = torch.zeros(VOCAB, 16)
    state[:, 0] = 1.0  # whatever the token
    head = torch.zeros(VOCAB, 16)
    head[:, 0] = torch.randn(VOCAB, generator=generator) / 4  # the norm makes 4 of the state's 1
    folder = write(tmp_path, [head] * 4, 16)
    engine = make_engine(blind_decoder(state, head), {"medusa": from_folder(folder, top_k=1)}, plan=ALL_NODES)
    params = SamplingParams(max_tokens=41, temperature=1.0, seed=5, ignore_eos=True)
    outcome = run(engine, [GenerateRequest("r", (3, 1, 4), params)])["r", 0]
    assert [len(event.token_ids) for event in outcome.events] == [1] + [5] * 8
    assert len(set(outcome.tokens)) > 10


def test_a_prompt_in_chunks_gives_the_first_step_its_feature(tmp_path: Path) -> None:
    target, folder = permuting(tmp_path, 3)
    engine = make_engine(target, {"medusa": from_folder(folder)}, plan=ALL_NODES, max_num_batched_tokens=8)
    prompt = [3]
    while len(prompt) < 17:
        prompt.append(int(STEP[prompt[-1]]))
    # chunks of 8, 8 and 1 token: the last step of the prompt is a root whose predecessor is known
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    assert lengths(engine, params, tuple(prompt)) == [4, 4]


def test_after_a_preemption_it_goes_on(tmp_path: Path) -> None:
    target, folder = permuting(tmp_path, 3)
    requests = [GenerateRequest(f"r{i}", (i, 1, 2, 3), SamplingParams(60, 0.0, ignore_eos=True)) for i in range(4)]
    plain = run(make_engine(target), requests)
    engine = make_engine(target, {"medusa": from_folder(folder)}, num_pages=10, plan=ALL_NODES)
    outcomes = run(engine, requests)
    assert engine.stats().preemptions > 0
    assert {key: outcome.tokens for key, outcome in outcomes.items()} == {k: o.tokens for k, o in plain.items()}
    assert engine.stats().steps < 60


def test_penalties_are_heeded_up_to_the_root(tmp_path: Path) -> None:
    """The text is a cycle; a strong penalty bans what came, and guesses heed it for what they know to have come."""
    target, folder = permuting(tmp_path, 2, scale=1.0)
    engine = make_engine(target, {"medusa": from_folder(folder)}, plan=ALL_NODES)
    params = SamplingParams(24, 0.0, presence_penalty=2.0, ignore_eos=True)
    plain = run(make_engine(target), [GenerateRequest("r", (3,), params)])["r", 0].tokens
    assert run(engine, [GenerateRequest("r", (3,), params)])["r", 0].tokens == plain
    assert engine.stats().accepted > 0


def test_requests_without_it_cost_nothing(tmp_path: Path) -> None:
    target, folder = permuting(tmp_path, 3)
    engine = make_engine(target, {"medusa": from_folder(folder)})
    run(engine, [GenerateRequest("r", (1, 2, 3), ENDS, SpeculationParams(drafters=()))])
    assert engine.stats().drafted == 0
    drafter = engine._stepper.drafters.members[0]
    assert isinstance(drafter, MedusaDrafter)
    assert drafter._features.first(("r", 0)) is None


# trees ---------------------------------------------------------------------------------------------------------------


class Spy(MedusaDrafter):
    """Notes the trees that were verified."""

    seen: list[set[tuple[int, ...]]]

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        super().observe(plan, batch, nodes, out, verdict)
        paths: list[tuple[int, ...]] = []
        tokens = batch.token_ids[batch.wanted].tolist()
        for index, mask in enumerate(nodes.masks[nodes.row, nodes.column].tolist()):
            path = tuple(tokens[column] for column in range(64) if mask >> column & 1 and column > 0)
            paths += [path] if index else []
        self.seen.append(set(paths))


def spy(folder: Path, **options: object) -> Callable[[DrafterContext], Spy]:
    def build(context: DrafterContext) -> Spy:
        drafter = load_medusa_drafter(MedusaOptions(str(folder), **options), context)  # type: ignore[arg-type]
        drafter.__class__ = Spy
        assert isinstance(drafter, Spy)
        drafter.seen = []
        return drafter

    return build


def ranked_heads(folder: Path, heads: int) -> Path:
    """Heads whose guess of rank r at depth d + 1 is token 10 * d + r, whatever the text; the first is almost sure."""
    outputs = []
    for depth in range(heads):
        output = torch.full((VOCAB, 16), -10.0)  # the state is ones, so logits are 16 times these
        for rank in range(8):
            output[10 * depth + rank] = -float(rank)
        outputs.append(output)
    return write(folder, outputs, 16)


CHOICES = [(0,), (3,), (0, 2), (3, 1), (0, 0), (0, 0, 4), (0, 2, 7)]


def steady() -> Decoder:
    state = torch.ones(VOCAB, 16)
    return blind_decoder(state, torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(1)))


def test_the_tree_verified_is_exactly_the_list(tmp_path: Path) -> None:
    folder = ranked_heads(tmp_path / "heads", 3)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([list(path) for path in CHOICES]))
    engine = make_engine(
        steady(), {"medusa": spy(folder, tree=str(file))}, max_nodes=63, plan="fixed:min_probability=0.5"
    )
    run(engine, [GenerateRequest("r", (1, 2, 3), ENDS)])
    drafter = engine._stepper.drafters.members[0]
    assert isinstance(drafter, Spy)
    expected = {tuple(10 * depth + rank for depth, rank in enumerate(path)) for path in CHOICES}
    assert drafter.seen[0] == set()
    assert len(drafter.seen) > 10
    for step, seen in enumerate(drafter.seen[1:-4], start=1):
        assert seen == expected, step
    assert all(len(path) <= 2 for path in drafter.seen[-2]), "no deeper than the text has room"


@pytest.mark.parametrize(("limits", "kept"), [({"max_nodes": 3}, 3), ({"max_nodes": 63, "max_depth": 1}, 2)])
def test_limits_hold_for_a_fixed_tree(tmp_path: Path, limits: dict[str, int], kept: int) -> None:
    folder = ranked_heads(tmp_path, 3)
    (folder / "medusa_choices.json").write_text(json.dumps({"medusa_choices": [list(path) for path in CHOICES]}))
    engine = make_engine(
        steady(), {"medusa": spy(folder, tree="calibrated")}, plan="fixed:min_probability=0.5", **limits
    )
    run(engine, [GenerateRequest("r", (1, 2, 3), ENDS)])
    drafter = engine._stepper.drafters.members[0]
    assert isinstance(drafter, Spy)
    assert all(len(seen) == kept for seen in drafter.seen[1:-4])


def test_the_tree_by_probability_leaves_out_what_does_not_pay(tmp_path: Path) -> None:
    engine = make_engine(steady(), {"medusa": spy(ranked_heads(tmp_path, 3))}, plan="fixed:min_probability=0.5")
    run(engine, [GenerateRequest("r", (1, 2, 3), ENDS)])
    drafter = engine._stepper.drafters.members[0]
    assert isinstance(drafter, Spy)
    assert drafter.seen[1] == {(0,), (0, 10), (0, 10, 20)}


# the formats, end to end ---------------------------------------------------------------------------------------------


def demo_prompt() -> str:
    text: str = json.loads((ROOT / "demo/prompts.jsonl").read_text().splitlines()[3])["prompt"]
    return text


def generated(engine: Engine) -> tuple[str, int]:
    (made,) = engine.generate(demo_prompt(), SamplingParams(48, temperature=0.8, seed=2, ignore_eos=True))
    return made.text, made.speculation.accepted


def demo_engine(model: Path, *speculate: str) -> Engine:
    return Engine.load(EngineConfig(str(model), dtype="float32", speculate=speculate, num_pages=64, plan="fixed"))


def test_every_format_serves_the_demo_target(tmp_path: Path) -> None:
    """Version 1 and a Medusa-2 model of the same heads accept the same; version 2 is served; the text is always one."""
    target, heads = ROOT / "demo/target", demo_heads()
    plain, _ = generated(demo_engine(target))
    text, accepted = generated(demo_engine(target, f"medusa={heads}:tau=0.3"))
    assert text == plain
    assert accepted > 0

    whole = tmp_path / "whole"
    whole.mkdir()
    for file in target.iterdir():
        if file.name != "model.safetensors":
            (whole / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    weights |= {f"medusa_head.{name}": weight for name, weight in load_file(heads / HEADS_FILE).items()}
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    assert generated(demo_engine(whole, "medusa:tau=0.3")) == (plain, accepted)

    shared = MedusaConfig(256, 4, 1, None)
    write_medusa(tmp_path / "v2", shared, {name: torch.zeros(shape) for name, shape in shared.shapes().items()})
    text, _ = generated(demo_engine(target, f"medusa={tmp_path / 'v2'}"))
    assert text == plain


# what does not fit ---------------------------------------------------------------------------------------------------


def test_heads_of_another_target(tmp_path: Path) -> None:
    target = tiny_decoder(torch.float32)
    wide = write(tmp_path / "wide", [torch.zeros(VOCAB, 40)], 40)
    with pytest.raises(ModelError, match=r"hidden states of size 40, and the target's are 32 wide\. Use heads"):
        make_engine(target, {"medusa": from_folder(wide)})
    for vocab in (VOCAB - 1, VOCAB + 1):
        other = write(tmp_path / f"vocab{vocab}", [torch.zeros(vocab, 32)], 32)
        with pytest.raises(ModelError, match=rf"guess among {vocab} tokens, and the target has {VOCAB}"):
            make_engine(target, {"medusa": from_folder(other)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be in 1 .. 64, not 0"),
        ({"top_k": 65}, "top_k must be in 1 .. 64"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"tau": float("nan")}, "tau must be positive"),
        ({"tree": "calibrated"}, r"no tree file .*medusa_choices\.json; `saccade calibrate` makes it"),
        ({"tree": "probable"}, "no tree file probable"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, options: dict[str, object], message: str) -> None:
    folder = write(tmp_path, [torch.zeros(VOCAB, 32)], 32)
    with pytest.raises(ConfigError, match=message):
        make_engine(tiny_decoder(torch.float32), {"medusa": from_folder(folder, **options)})


def test_no_heads(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="medusa: there is no folder"):
        make_engine(tiny_decoder(torch.float32), {"medusa": from_folder(tmp_path / "none")})
    with pytest.raises(ModelError, match=r"medusa: .* holds no Medusa heads"):
        Engine.load(str(ROOT / "demo/target"), speculate=("medusa",), num_pages=64)
    with pytest.raises(ConfigError, match="no folder to look for heads in; give theirs: medusa=PATH"):
        make_engine(tiny_decoder(torch.float32), {"medusa": lambda c: load_medusa_drafter(MedusaOptions(), c)})
