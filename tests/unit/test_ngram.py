"""The n-gram drafter: what it proposes, its kernel against its definition, its index as a text grows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from decoding.drafters.base import DrafterContext
from decoding.drafters.ngram import FIRST_CAPACITY, NgramDrafter, NgramOptions
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models.tree import Trees

CONTEXT = DrafterContext(
    name="ngram",
    bit=2,
    target=cast(Any, None),
    tokenizer=cast(Any, None),
    dtype=torch.float32,
    device=torch.device("cpu"),
    attention="auto",
    max_model_len=4096,
    max_step_tokens=64,
    target_folder=Path("."),
)
ASKED = frozenset(["ngram"])


def sequence_of(text: Many[int], number: int = 0, room: int = 8) -> Sequence:
    return Sequence(GenerateRequest(str(number), tuple(text), SamplingParams(max_tokens=room)), 0, 1)


def plan_of(sequences: list[Sequence]) -> Plan:
    rows = tuple(PlannedRow(sequence, sequence.length - 1, 1) for sequence in sequences)
    return Plan(rows, rows)


def proposed(text: Many[int], nodes: int, depth: int, **options: int) -> list[tuple[int, int, float]]:
    """(parent, token, confidence) of each node that is drafted after a text."""
    drafter = NgramDrafter(NgramOptions(**options), CONTEXT)
    quota = Quota((RowQuota(nodes, depth, ASKED),))
    trees = drafter.propose(plan_of([sequence_of(text)]), quota, cast(Any, None))
    if trees is None:
        return []
    trees.validate()
    columns = (trees.parents[0].tolist(), trees.tokens[0].tolist(), trees.confidence[0].tolist())
    return list(zip(*columns, strict=True))[1:]


def assert_same(trees: Trees | None, expected: Trees | None) -> None:
    assert (trees is None) == (expected is None)
    if trees is not None and expected is not None:
        trees.validate()
        for name in ("tokens", "parents", "confidence", "source"):
            assert torch.equal(getattr(trees, name), getattr(expected, name)), name
        assert set(trees.source.unique().tolist()) <= {0, 4}


# what is proposed ----------------------------------------------------------------------------------------------------


def test_what_followed_before_is_a_chain_to_the_full_depth() -> None:
    text = [*range(10, 40), 1, 2, 10, 11, 12]
    chain = proposed(text, 63, 16)
    assert [token for _, token, _ in chain] == list(range(13, 29))
    assert [parent for parent, _, _ in chain] == list(range(16))
    chances = [chance for _, _, chance in chain]
    assert chances == sorted(chances), "each token that follows lengthens the match"


def test_a_text_that_repeats_itself_goes_on_doing_so() -> None:
    assert [token for _, token, _ in proposed([5, 6, 7, 5, 6], 63, 7, branches=1)] == [7, 5, 6, 7, 5, 6, 7]


def test_a_longer_match_is_surer_up_to_the_longest() -> None:
    def chance(match: int) -> float:
        common = list(range(50, 50 + match))
        return proposed([1, *common, 7, 2, *common], 1, 1)[0][2]

    chances = [chance(match) for match in (1, 2, 3, 5, 8, 12)]
    assert chances == sorted(set(chances))
    assert chance(40) == chance(32)


def test_the_longest_match_goes_first_though_others_are_later() -> None:
    text = [3, 1, 2, 9, 4, 1, 2, 8, 5, 2, 7, 3, 1, 2]
    nodes = proposed(text, 3, 1)
    assert [token for _, token, _ in nodes] == [9, 8, 7]


def test_of_matches_of_the_same_length_the_latest_goes_first() -> None:
    assert [token for _, token, _ in proposed([1, 7, 1, 8, 1, 9, 1], 3, 1)] == [9, 8, 7]


def test_occurrences_that_agree_support_each_other() -> None:
    once, twice, split = (proposed([*text, 1], 1, 1)[0][2] for text in ([1, 7, 2], [1, 7, 1, 7, 2], [1, 8, 1, 7, 2]))
    assert split < once < twice


def test_branches_stand_where_occurrences_disagree_and_sum_to_less_than_one() -> None:
    text = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2]
    nodes = proposed(text, 63, 2)
    assert [(parent, token) for parent, token, _ in nodes] == [(0, 3), (1, 5), (1, 4)]
    assert nodes[1][2] + nodes[2][2] < 1


def test_the_likeliest_nodes_are_kept_where_there_is_room_for_few() -> None:
    rng = random.Random(4)
    text = [rng.randrange(4) for _ in range(200)]
    all_of_them, few = proposed(text, 63, 6), proposed(text, 9, 6)
    paths: list[float] = [1.0]
    for parent, _, confidence in all_of_them:
        paths.append(paths[parent] * confidence)
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(paths)), "up to rounding"
    assert few == all_of_them[:9]


def test_shorter_matches_than_the_shortest_do_not_count() -> None:
    assert proposed([9, 1, 2, 7, 8, 1, 2], 8, 1, min_match=3) == []
    assert [token for _, token, _ in proposed([9, 1, 2, 7, 9, 1, 2], 8, 1, min_match=3)] == [7]


def test_text_that_never_repeats_has_no_proposal() -> None:
    assert proposed(range(300), 63, 16) == []
    assert proposed([1], 63, 16) == []


# the kernel and the index --------------------------------------------------------------------------------------------


def drawn_options(luck: random.Random) -> NgramOptions:
    most = luck.choice([1, 2, 3, 5, 6, 17, 32, 64])
    return NgramOptions(max_match=most, min_match=luck.randint(1, min(most, 4)), branches=luck.choice([1, 2, 3, 8, 64]))


def drawn_limits(luck: random.Random, count: int) -> Quota:
    names = [["ngram"], ["ngram", "x"], []]
    limits = [
        RowQuota(luck.choice([0, 1, 5, 24, 63]), luck.choice([1, 3, 8, 16, 63]), frozenset(luck.choice(names)))
        for _ in range(count)
    ]
    return Quota(tuple(limits))


@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_finds_what_the_definition_finds_while_texts_grow(seed: int) -> None:
    """Also after steps in which a row was not asked, and beyond the capacity that an index begins with."""
    luck = random.Random(seed)
    words = luck.choice([1, 2, 5, 50])
    drafter = NgramDrafter(drawn_options(luck), CONTEXT)
    texts = [[luck.randrange(words) for _ in range(luck.choice([1, 2, 3, 40, 200]))] for _ in range(luck.randint(1, 4))]
    sequences = [sequence_of(text, number, room=900) for number, text in enumerate(texts)]
    for _ in range(12):
        plan, quota = plan_of(sequences), drawn_limits(luck, len(sequences))
        assert_same(drafter.propose(plan, quota, cast(Any, None)), drafter.search_anywhere(plan, quota))
        for sequence in sequences:
            for _ in range(luck.choice([0, 1, 2, 7, 70])):
                repeats = sequence.length > 9 and luck.random() < 0.8
                sequence.append(int(sequence.tokens[-9]) if repeats else luck.randrange(words))


def test_an_index_has_room_for_the_text_and_no_more_than_it_can_become() -> None:
    drafter = NgramDrafter(NgramOptions(), CONTEXT)
    quota = Quota((RowQuota(8, 8, ASKED),))
    short, long = sequence_of(range(20), 0, room=30), sequence_of(range(20), 1, room=100_000)
    levels = 6  # 1, 2, 4, ... 32
    for sequence, capacity in ((short, 50), (long, FIRST_CAPACITY)):
        drafter.propose(plan_of([sequence]), quota, cast(Any, None))
        assert drafter._indexes[sequence.id].store.nbytes == 4 * (1 + 3 * levels * capacity)
    for token in range(2000):
        long.append(token % 11)
        drafter.propose(plan_of([long]), quota, cast(Any, None))
        assert drafter._indexes[long.id].capacity <= max(FIRST_CAPACITY, 2 * long.length)
    for sequence in (short, long):
        drafter.forget(sequence.id)
    assert not drafter._indexes


def test_a_name_that_comes_back_gets_an_index_of_its_own() -> None:
    drafter = NgramDrafter(NgramOptions(), CONTEXT)
    quota = Quota((RowQuota(8, 8, ASKED),))
    for text in ([1, 2, 3, 4, 1, 2], [4, 3, 2, 1, 4, 3, 7, 4], [5] * 30):
        sequence = sequence_of(text)
        plan = plan_of([sequence])
        assert_same(drafter.propose(plan, quota, cast(Any, None)), drafter.search_anywhere(plan, quota))
        drafter.forget(sequence.id)


def test_an_index_that_does_not_fit_is_refused() -> None:
    drafter = NgramDrafter(NgramOptions(), CONTEXT)
    text, weights = torch.arange(100), drafter._weight_table
    for store in (torch.zeros(1 + 18 * 50, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)):
        with pytest.raises(ValueError, match="an index has no room"):
            torch.ops.saccade.ngram_trees([text], [store], [8], [8], 32, 1, weights, 2)
    store = torch.zeros(1 + 18 * 200, dtype=torch.int32)
    torch.ops.saccade.ngram_trees([text], [store], [8], [8], 32, 1, weights, 2)
    with pytest.raises(ValueError, match="is not of a text of 60 tokens"):
        torch.ops.saccade.ngram_trees([text[:60]], [store], [8], [8], 32, 1, weights, 2)
    with pytest.raises(RuntimeError, match="Int"):
        torch.ops.saccade.ngram_trees([text], [torch.zeros(1 + 18 * 100)], [8], [8], 32, 1, weights, 2)
