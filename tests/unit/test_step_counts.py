"""What the engine counts of its steps adds up."""

from __future__ import annotations

from decoding.engine import Engine
from decoding.request import SamplingParams, SpeculationParams
from decoding.step_counts import MOST_TOKENS, PARTS, QUEUE_SECONDS, SIZES, StepCounts, size_bounds
from tests.engines import ROOT

PROMPT = "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return"


def test_counts_of_an_engine_add_up() -> None:
    engine = Engine.load(
        str(ROOT / "demo" / "target"), speculate=("ngram",), num_pages=80, dtype="float32", plan="fixed"
    )
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    made = len(engine.generate(PROMPT, params)[0].token_ids)
    first = engine.stats()
    engine.generate(PROMPT, params, speculation=SpeculationParams(enabled=False))
    stats = engine.stats()

    assert stats.accepted > 0
    assert sum(stats.accepted_at) == stats.accepted
    assert stats.accepted_by == {"ngram": stats.accepted_at}, "nobody else drafts"
    assert list(stats.accepted_at) == sorted(stats.accepted_at, reverse=True)
    assert stats.accepted_at[0] <= stats.drafts <= first.steps
    assert stats.drafts == first.drafts, "plain rows have no drafts"
    assert sum(tokens * rows for tokens, rows in enumerate(stats.row_tokens)) == stats.generated_tokens == 2 * made
    assert sum(stats.step_sizes) == stats.steps
    assert stats.step_nodes == stats.drafted, "fixed plans verify no padding on a CPU"
    assert sum(stats.step_work) == stats.steps
    prompts = stats.prompt_tokens - stats.cached_prompt_tokens
    assert stats.step_tokens == prompts + (stats.generated_tokens - stats.accepted - 2) + stats.drafted, "a root a row"
    assert stats.steps_by_gear == {"fixed": stats.steps}
    assert sum(stats.queued) == 2
    assert tuple(stats.part_seconds) == PARTS
    assert all(seconds > 0 for seconds in stats.part_seconds.values())
    assert stats.step_seconds == sum(stats.part_seconds.values())
    assert 0 < stats.drafter_seconds["ngram"] <= stats.part_seconds["drafters"]


def test_gears_of_an_engine_that_weighs_are_counted() -> None:
    engine = Engine.load(str(ROOT / "demo" / "target"), speculate=("ngram",), num_pages=80, dtype="float32")
    engine.generate(PROMPT, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
    stats = engine.stats()
    assert set(stats.steps_by_gear) <= {"plain", "light", "full"}
    assert sum(stats.steps_by_gear.values()) == sum(stats.step_sizes) == stats.steps > 0


def test_steps_fall_into_the_classes_of_their_bounds() -> None:
    bounds = size_bounds()
    for nodes in (0, 1, 2, 3, 4, 63, 64, 2**14 - 1, 2**14, 10**6):
        counts = StepCounts()
        counts.step(1, nodes, "full")
        assert sum(counts.work) == 1
        assert counts.tokens == nodes + 1
        (place,) = (place for place, count in enumerate(counts.sizes) if count)
        assert place == len(bounds) or nodes <= bounds[place]
        assert place == 0 or nodes > bounds[place - 1]
    assert len(bounds) == SIZES - 1


def test_the_longest_path_and_the_longest_wait_are_counted() -> None:
    counts = StepCounts()
    counts.paths[MOST_TOKENS - 1] += 1
    counts.left_queue(10.0 * QUEUE_SECONDS[-1])
    counts.left_queue(QUEUE_SECONDS[0])
    assert counts.accepted_at == [1] * (MOST_TOKENS - 1)
    assert (counts.queued[0], counts.queued[-1]) == (1, 1)


def test_an_accepted_node_counts_for_each_that_had_proposed_it() -> None:
    counts = StepCounts()
    for depth, drafters in ((0, 0b01), (1, 0b11), (1, 0b10), (MOST_TOKENS - 1, 0b10)):
        counts.accept(depth, drafters)
    found = counts.accepted_by(("one", "two", "three"))
    assert found["one"] == (1, 1)
    assert found["two"] == (0, 2, *[0] * (MOST_TOKENS - 3), 1)
    assert "three" not in found
