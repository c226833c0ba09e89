"""The draft model: a draft that is the target guesses everything; how often the demo pair agrees; vocabularies."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from decoding.assemble import LoadedModel, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters.base import DrafterContext
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions, load_draft_model
from decoding.engine import Engine
from decoding.errors import ModelError
from decoding.noise import gumbel
from decoding.plan import Plan, Quota
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from models.decoder import Decoder
from models.tree import Trees
from tests.doubles import AlternatingDrafter
from tests.engines import ALL_NODES, ROOT, BuildDrafter, Outcome, make_engine, run, tiny_decoder

# a draft that is the target ------------------------------------------------------------------------------------------
#
# It guesses every token, at every temperature, or its positions, its K/V or its noise are off by one somewhere.


@cache
def model() -> Decoder:
    return tiny_decoder(torch.float64)


def mirror(depth: int, **options: object) -> BuildDrafter:
    """The target as its own draft model; by default a chain of ``depth``."""
    chosen: dict[str, object] = {"top_k": 1, "beam": 1, "min_confidence": 0.0, **options}
    return lambda context: DraftModelDrafter(DraftModelOptions("", depth=depth, **chosen), context, model())  # type: ignore[arg-type]


def engine_with(depth: int, drafters: dict[str, BuildDrafter] | None = None, **settings: object) -> Engine:
    settings = {"max_nodes": depth, "max_depth": depth, "plan": ALL_NODES, **settings}
    return make_engine(model(), drafters or {"draft": mirror(depth)}, **settings)


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0.9, seed=4, top_k=6, top_p=0.8, min_p=0.02),
    SamplingParams(
        temperature=0.9,
        seed=5,
        repetition_penalty=1.3,
        presence_penalty=0.8,
        frequency_penalty=0.4,
        logit_bias={7: 1.5},
        min_tokens=30,
    ),
    SamplingParams(temperature=1.5, seed=6, top_p=0.9),
]
UNFILTERED = [number for number, params in enumerate(PARAMS) if params.top_p == 1]


def request(number: int, prompt_len: int, max_tokens: int = 40, n: int = 1) -> GenerateRequest:
    params = PARAMS[number % len(PARAMS)]
    changed = SamplingParams(**{**vars(params), "max_tokens": max_tokens, "ignore_eos": True, "n": n})
    return GenerateRequest(f"r{number}", tuple((5 * i * i + number) % 48 for i in range(prompt_len)), changed)


def assert_all_accepted(outcome: Outcome) -> None:
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.drafted == stats.accepted > 0


@pytest.mark.parametrize("number", UNFILTERED)
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_every_step_yields_depth_plus_one_tokens(number: int, depth: int) -> None:
    engine = engine_with(depth)
    for prompt_len in (1, 16, 37):
        for _ in range(2):  # the second time, the prompt's pages are found, the drafter's K/V in them
            outcome = run(engine, [request(number, prompt_len)])[f"r{number}", 0]
            assert [len(event.token_ids) for event in outcome.events[:-1]] == [depth + 1] * (39 // (depth + 1))
            assert_all_accepted(outcome)
        assert outcome.events[0].cached_tokens == (prompt_len - 1) // 16 * 16


@pytest.mark.parametrize("number", sorted(set(range(len(PARAMS))) - set(UNFILTERED)))
def test_filtered_guesses_are_right_or_not_made(number: int) -> None:
    """Among the few best of the noisy logits there may be none that the filters keep; what is kept first is drawn."""
    engine = engine_with(4)
    for prompt_len in (1, 16, 37):
        outcome = run(engine, [request(number, prompt_len)])[f"r{number}", 0]
        assert_all_accepted(outcome)
        assert len(outcome.events) <= 10  # 8 steps of 5 tokens, and two without a guess somewhere


def test_a_beam_holds_the_right_path() -> None:
    """The target's own token is the first of the children at every depth, whatever stands beside it."""
    depth = 4
    engine = engine_with(depth, {"draft": mirror(depth, top_k=3, beam=3)}, max_nodes=63)
    for number in range(len(PARAMS)):
        outcome = run(engine, [request(number, 21)])[f"r{number}", 0]
        assert outcome.last.speculation is not None
        # a path may leave the beam where others are more probable, but not often
        assert len(outcome.tokens) / outcome.last.speculation.steps > 0.8 * depth


def test_in_a_batch_with_chunked_prompts() -> None:
    engine = engine_with(3, max_num_batched_tokens=23)
    outcomes = run(engine, [request(number, 9 * number + 2, n=1 + number % 2) for number in range(7)])
    for outcome in outcomes.values():
        assert_all_accepted(outcome)


def test_after_preemption() -> None:
    engine = engine_with(3, num_pages=8)
    outcomes = run(engine, [request(number, 20 + number, max_tokens=50) for number in range(4)])
    assert engine.stats().preemptions > 0
    for outcome in outcomes.values():
        assert_all_accepted(outcome)


def test_after_the_drafter_paused() -> None:
    """Pages that were filled without the drafter are found by a request that wants it: it catches up on them."""
    engine = engine_with(3)
    without = GenerateRequest(
        "without",
        request(0, 40).prompt_ids,
        SamplingParams(40, 0.0, ignore_eos=True),
        SpeculationParams(enabled=False),
    )
    text = run(engine, [without])["without", 0].tokens
    wanted = GenerateRequest("wanted", (*without.prompt_ids, *text[:20]), SamplingParams(30, 0.0, ignore_eos=True))
    outcome = run(engine, [wanted])["wanted", 0]
    assert outcome.events[0].cached_tokens == 48
    assert [len(event.token_ids) for event in outcome.events[:-1]] == [4] * (29 // 4)


class Admissions(DraftModelDrafter):
    """Keeps how many tokens' K/V it was told to find in the pages of each newcomer."""

    found: dict[str, int]

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        self.found[sequence.id[0]] = cached_tokens
        super().admit(sequence, cached_tokens)


def test_its_k_v_in_found_pages_counts_as_far_as_it_was_written() -> None:
    found: dict[str, int] = {}

    def build(context: DrafterContext) -> Admissions:
        drafter = Admissions(DraftModelOptions("", depth=3, top_k=1, beam=1, min_confidence=0.0), context, model())
        drafter.found = found
        return drafter

    engine = engine_with(3, {"draft": build})

    def ask(name: str, prompt: tuple[int, ...], drafting: bool = True) -> list[int]:
        params = SamplingParams(20, 0.0, ignore_eos=True)
        asked = GenerateRequest(name, prompt, params, SpeculationParams(enabled=drafting))
        return run(engine, [asked])[name, 0].tokens

    first = request(0, 40).prompt_ids
    text = ask("first", first)
    ask("again", first)
    ask("longer", (*first, *text, 1))
    other = request(1, 40).prompt_ids
    ask("without", other, drafting=False)
    ask("with", other)
    ask("now", other)
    assert found == {"first": 0, "again": 32, "longer": 48, "without": 0, "with": 0, "now": 32}


@pytest.mark.parametrize("number", [0, 1, 3])
def test_beside_a_drafter_that_is_right_and_wrong_by_turns(number: int) -> None:
    asked = request(number, 19)
    texts: dict[SequenceId, list[int]] = {}
    truth = run(make_engine(model()), [asked])[asked.request_id, 0].tokens
    texts[asked.request_id, 0] = [*asked.prompt_ids, *truth]
    drafters: dict[str, BuildDrafter] = {
        "draft": mirror(2),
        "alternating": lambda context: AlternatingDrafter(context, texts),
    }
    outcome = run(engine_with(5, drafters, max_nodes=63), [asked])[asked.request_id, 0]
    assert outcome.tokens == truth
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.by_drafter["draft"].accepted == stats.by_drafter["draft"].drafted > 0
    assert 0 < stats.by_drafter["alternating"].accepted < stats.by_drafter["alternating"].drafted
    sizes = [len(event.token_ids) for event in outcome.events[:-1]]
    assert sizes == [6 if turn % 2 == 0 else 3 for turn in range(len(sizes))], "5 deep when right, else the draft's 2"


# the demo pair -------------------------------------------------------------------------------------------------------


class Recorder(DraftModelDrafter):
    """Keeps what it would have proposed, and proposes nothing: so every position is asked about."""

    proposed: dict[tuple[SequenceId, int], list[int]]

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = super().propose(plan, quota, sampling)
        if trees is not None:
            for row, tokens in zip(plan.deciding, trees.tokens.tolist(), strict=True):
                self.proposed[row.sequence.id, row.sequence.length] = tokens[1:]
        return None


def test_the_demo_pair_guesses_as_its_weights_say() -> None:
    """Text sampled at temperature 1: guesses are transformers' logits plus the request's noise, at every position.

    The target's token is the best guess half the time (demo/CARD.md: .509 of it, .786 of the best four; on these
    prompts it is .48 and .76).
    """
    config = EngineConfig(f"{ROOT}/demo/target", dtype="float32", max_nodes=4, max_depth=1, plan=ALL_NODES)
    loaded = load_target(config)
    drafter = _recorder(loaded)
    engine = Engine(config, loaded, build_stepper(config, loaded, [drafter]))
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:12]
    prompts = [tuple(loaded.tokenizer.encode(json.loads(line)["prompt"]))[:120] for line in lines]
    outcomes = run(
        engine,
        [
            GenerateRequest(f"r{i}", prompt, SamplingParams(120, 1.0, seed=i, ignore_eos=True))
            for i, prompt in enumerate(prompts)
        ],
    )
    reference = LlamaForCausalLM.from_pretrained(ROOT / "demo/draft", dtype=torch.float32)
    best = four = same = count = 0
    for i, prompt in enumerate(prompts):
        text = torch.tensor([*prompt, *outcomes[f"r{i}", 0].tokens])
        places = torch.arange(len(prompt), len(text) - 1)  # the last token is drawn without speculation
        noise = torch.empty(len(places), loaded.vocab_size)
        gumbel(noise, torch.full_like(places, i), places, torch.zeros_like(places))
        with torch.inference_mode():
            expected = (reference(text[None]).logits[0, places - 1] + noise).topk(4).indices
        for place, guesses in zip(places.tolist(), expected.tolist(), strict=True):
            proposed = drafter.proposed[(f"r{i}", 0), place]
            same += proposed == guesses
            best += int(text[place]) == proposed[0]
            four += int(text[place]) in proposed
            count += 1
    assert same / count > 0.995  # rounding may swap two of nearly the same value
    assert best / count >= 0.44
    assert four / count >= 0.72


def _recorder(loaded: LoadedModel) -> Recorder:
    options = DraftModelOptions(f"{ROOT}/demo/draft", depth=1, top_k=4)
    built = load_draft_model(options, context_of(loaded))
    recorder = Recorder(options, context_of(loaded), built._model)
    recorder.proposed = {}
    return recorder


def context_of(loaded: LoadedModel) -> DrafterContext:
    return DrafterContext(
        name="draft",
        bit=0,
        target=loaded.target,
        tokenizer=loaded.tokenizer,
        dtype=loaded.target.dtype,
        device=loaded.target.device,
        attention="auto",
        max_model_len=loaded.target.max_model_len,
        max_step_tokens=2048,
    )


# vocabularies --------------------------------------------------------------------------------------------------------


def copied(name: str, folder: Path, rows: int) -> Path:
    """A demo model with ``rows`` rows in its (tied) embedding: cut, or padded with noise."""
    shutil.copytree(ROOT / "demo" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (key for key in weights if "embed" in key)
    old = weights[embedding]
    more = torch.randn(max(0, rows - len(old)), old.shape[1]).to(old.dtype)
    weights[embedding] = torch.cat([old[:rows], 9 * more]).contiguous()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return folder


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(8192, 8200), (8200, 8192), (8256, 8200)])
def test_padding_of_either_vocabulary_does_not_matter(tmp_path: Path, target_rows: int, draft_rows: int) -> None:
    target = copied("target", tmp_path / "target", target_rows)
    draft = copied("draft", tmp_path / "draft", draft_rows)
    prompt, params = "def main():\n    import", SamplingParams(40, 0.8, seed=2, logprobs=3, prompt_logprobs=2)
    plain = Engine.load(f"{ROOT}/demo/target", dtype="float32").generate(prompt, params)[0]
    engine = Engine.load(str(target), dtype="float32", speculate=(f"draft={draft}",), plan="fixed")
    padded = engine.generate(prompt, params)[0]
    assert padded.token_ids == plain.token_ids
    for ours, theirs in (
        (padded.logprobs or [], plain.logprobs or []),
        (padded.prompt_logprobs or [], plain.prompt_logprobs or []),
    ):
        assert len(ours) == len(theirs) > 3
        assert [e and [token for token, _ in e.top] for e in ours] == [
            e and [token for token, _ in e.top] for e in theirs
        ]
        assert [e and e.logprob for e in ours] == pytest.approx([e and e.logprob for e in theirs], abs=1e-5)
    assert padded.speculation.accepted > 0


def test_a_draft_without_embeddings_of_all_tokens_is_refused(tmp_path: Path) -> None:
    draft = copied("draft", tmp_path / "draft", 8000)
    with pytest.raises(ModelError, match=r"embeddings of 8000 tokens.*ids up to 8191"):
        Engine.load(f"{ROOT}/demo/target", dtype="float32", speculate=(f"draft={draft}",))


def test_another_vocabulary_is_refused_with_an_example(tmp_path: Path) -> None:
    draft = copied("draft", tmp_path / "draft", 8192)
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    token = next(token for token, number in vocab.items() if number == 3000)
    other = next(token for token, number in vocab.items() if number == 3001)
    vocab[token], vocab[other] = 3001, 3000
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError) as caught:
        Engine.load(f"{ROOT}/demo/target", dtype="float32", speculate=(f"draft={draft}",))
    message = str(caught.value)
    assert "2 of 8192 tokens differ" in message
    assert repr(token) in message or repr(other) in message
    assert "Use a draft model with the target's tokenizer" in message
