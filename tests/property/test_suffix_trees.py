"""Suffix trees of the kernel against their definition on plain arrays, while texts grow, end and give way."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.drafters.suffix import FusedSuffixCache
from decoding.drafters.suffix_search import REQUEST_BYTES, TOKEN_BYTES, PlainSuffixCache, SearchSettings
from models import kernels
from models.tree import Trees

pytestmark = pytest.mark.skipif(not kernels.load(), reason="the kernels cannot be built here")

MADE_UP = 3  # the slot whose texts are not kept, and share a tree with nobody


def search_settings(
    depth: int, tokens: int, requests: int, factor: float = 1.0, least: float = 0.1, learn: int = 1
) -> SearchSettings:
    trust = tuple(1 - 0.6 * 0.8**match for match in range(depth))
    return SearchSettings(depth, tokens * TOKEN_BYTES + requests * REQUEST_BYTES, requests, factor, least, trust, learn)


@dataclass
class Twins:
    """Both caches, told and asked the same; every answer is compared."""

    setting: SearchSettings
    texts: dict[int, list[int]] = field(default_factory=dict)  # by slot
    numbers: dict[int, int] = field(default_factory=dict)
    begun: int = 0

    def __post_init__(self) -> None:
        self.plain, self.fused = PlainSuffixCache(self.setting), FusedSuffixCache(self.setting)

    def grow(self, slot: int, tokens: list[int]) -> None:
        """More tokens of a text; the first ones are its prompt."""
        if slot not in self.texts:
            self.begun += 1
            tree = -self.begun if slot == MADE_UP else slot % 2
            numbers = [cache.admit(tree, len(tokens)) for cache in (self.plain, self.fused)]
            assert numbers[0] == numbers[1]
            self.numbers[slot] = numbers[0]
        self.texts.setdefault(slot, []).extend(tokens)

    def draft(self, nodes: int, depth: int) -> None:
        slots = list(self.texts)
        if not slots:
            return
        numbers = [self.numbers[slot] for slot in slots]
        texts = [torch.tensor(self.texts[slot]) for slot in slots]
        limits = [nodes] * len(slots), [depth] * len(slots)
        found, expected = (cache.trees(numbers, texts, *limits, 3) for cache in (self.fused, self.plain))
        Trees(*found).validate()
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)

    def end(self, slot: int) -> None:
        if slot in self.texts:
            text, number = torch.tensor(self.texts.pop(slot)), self.numbers.pop(slot)
            for cache in (self.plain, self.fused):
                cache.forget(number, text, slot != MADE_UP)

    def check(self) -> None:
        requests, tokens, nodes, used = self.fused.usage()
        assert [requests, tokens] == self.plain.usage()
        assert requests <= self.setting.max_cached_requests
        assert tokens * TOKEN_BYTES + requests * REQUEST_BYTES <= self.setting.max_bytes
        trees = len(set(self.fused.texts()[0].tolist()))
        assert nodes <= 2 * tokens + trees
        assert used > 0
        for ours, theirs in zip(self.fused.texts(), self.plain.texts(), strict=True):
            assert torch.equal(ours, theirs)


words = st.lists(st.integers(0, 2), min_size=1, max_size=7)
actions = st.one_of(
    st.tuples(st.just("grow"), st.integers(0, 3), words),
    st.tuples(st.just("draft"), st.integers(0, 20), st.integers(0, 8)),
    st.tuples(st.just("end"), st.integers(0, 3)),
)


@settings(max_examples=150, deadline=None)
@given(
    script=st.lists(actions, max_size=60),
    depth=st.integers(2, 12),
    tokens=st.integers(1, 60),
    requests=st.integers(1, 6),
    factor=st.sampled_from([0.5, 1.0, 3.0]),
    least=st.sampled_from([0.01, 0.1, 0.4]),
    learn=st.sampled_from([1, 1, 5]),
)
def test_the_kernel_answers_as_defined(
    script: list[tuple[object, ...]], depth: int, tokens: int, requests: int, factor: float, least: float, learn: int
) -> None:
    twins = Twins(search_settings(depth, tokens, requests, factor, least, learn))
    for name, *arguments in script:
        getattr(twins, str(name))(*arguments)
        twins.check()
    twins.draft(20, 8)
    for slot in range(4):
        twins.end(slot)
        twins.check()


def draft_after(cache: FusedSuffixCache, tree: int, context: list[int]) -> list[list[float]]:
    """What is drafted, of a text that is not kept."""
    number, text = cache.admit(tree, len(context)), torch.tensor(context)
    trees = cache.trees([number], [text], [24], [8], 0)
    cache.forget(number, text, False)
    return [part[0].tolist() for part in trees]


@pytest.mark.parametrize("seed", range(5))
def test_after_eviction_all_is_as_if_the_evicted_had_never_been(seed: int) -> None:
    luck = random.Random(seed)
    setting = search_settings(depth=16, tokens=400, requests=12)
    cache = FusedSuffixCache(setting)
    live: dict[int, tuple[int, list[int]]] = {}
    for turn in range(600):  # up to five texts grow at the same time
        slot = luck.randrange(5)
        if slot not in live:
            live[slot] = cache.admit(slot % 2, 0), []
        number, text = live[slot]
        text.extend(luck.randrange(3) for _ in range(luck.randint(1, 9)))
        cache.trees([number], [torch.tensor(text)], [1], [1], 0)  # learns it so far
        if luck.random() < 0.15 or turn > 590:
            cache.forget(number, torch.tensor(text), True)
            del live[slot]
    for number, text in live.values():
        cache.forget(number, torch.tensor(text), True)
    trees, lengths, tokens = cache.texts()
    fresh = FusedSuffixCache(setting)
    for tree, text in zip(trees.tolist(), tokens.long().split(lengths.tolist()), strict=True):
        fresh.insert(tree, text)
    assert cache.usage()[:3] == fresh.usage()[:3]  # to the last node
    drafted = 0
    for _ in range(60):
        context = [luck.randrange(3) for _ in range(luck.randint(1, 12))]
        tree = luck.randrange(2)
        expected = draft_after(fresh, tree, context)
        assert draft_after(cache, tree, context) == expected
        drafted += len(expected[0]) - 1
    assert drafted > 60


def test_memory_stays_within_its_bound_over_10_000_requests() -> None:
    luck = random.Random(1)
    setting = search_settings(depth=64, tokens=4000, requests=200)
    cache, made = FusedSuffixCache(setting), 0
    phrases = [[luck.randrange(500) for _ in range(12)] for _ in range(20)]
    for request in range(10_000):
        tree = luck.choice([0, 1, 2, 1000 + request])  # some salts are used once
        output = [luck.randrange(500) for _ in range(luck.randint(1, 20))]
        if luck.random() < 0.5:
            output += luck.choice(phrases)
        number = cache.admit(tree, 0)
        text = torch.tensor(output)
        if request % 7 == 0:
            cache.trees([number], [text], [8], [8], 0)
        cache.forget(number, text, request % 11 != 0 or tree < 1000)
        made += len(output)
        requests, tokens, nodes, used = cache.usage()
        assert used <= setting.max_bytes
        assert nodes <= 2 * tokens + requests
    assert made > 20 * tokens, "most of it had to go"
    assert tokens > 1000, "what fits stays"


@pytest.mark.parametrize("words", [1, 2, 1000])
def test_a_token_of_a_tree_takes_no_more_than_it_is_charged(words: int) -> None:
    luck = random.Random(words)
    setting = search_settings(depth=64, tokens=20_000, requests=40)
    cache = FusedSuffixCache(setting)
    for _ in range(60):  # long texts: what is kept besides does not count
        cache.insert(0, torch.tensor([luck.randrange(words) for _ in range(luck.randint(1, 1000))]))
        assert cache.usage()[3] <= setting.max_bytes
    assert cache.usage()[1] > 15_000
