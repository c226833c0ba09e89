"""The prefix cache against a model that remembers whole texts instead of hashes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decoding.prefix_cache import PrefixCache
from models.batch import PAGE_SIZE

PAGES = 6
SALTS = ("", "tenant")
Words = tuple[int, ...]  # a page's content is named by a number: all its tokens are that number


@dataclass
class Holder:
    """A sequence: what it says, where it lies."""

    salt: str
    words: Words
    pages: list[int]
    keys: list[bytes] = field(default_factory=list)


def tokens_of(words: Words, tail: int = 1) -> np.ndarray:
    return np.concatenate([np.repeat(np.array(words, dtype=np.int64), PAGE_SIZE), np.full(tail, 99)])


class PrefixMachine(RuleBasedStateMachine):
    """Sequences come, find pages, take more, fill and register them, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(PAGES)
        self.page_of: dict[tuple[str, Words], int] = {}  # every text up to the end of a registered page
        self.valid: dict[int, int] = {}
        self.cached: list[int] = []  # held by nobody, oldest first
        self.free = set(range(PAGES))
        self.holders: list[Holder] = []

    def forget(self, page: int) -> None:
        self.page_of = {key: other for key, other in self.page_of.items() if other != page}
        self.valid.pop(page, None)

    @rule(
        words=st.lists(st.integers(0, 1), max_size=4).map(tuple),
        salt=st.sampled_from(SALTS),
        tail=st.integers(0, PAGE_SIZE - 1),
    )
    def join(self, words: Words, salt: str, tail: int) -> None:
        tokens = tokens_of(words, tail)
        hit = self.cache.match(tokens, salt)
        expected = []
        # a hit always leaves a token to compute, so without a tail the last full page is not looked up
        for length in range(1, len(words) + (1 if tail else 0)):
            page = self.page_of.get((salt, words[:length]))
            if page is None:
                break
            expected.append(page)
        assert hit.pages == expected
        assert len(hit.pages) * PAGE_SIZE < max(1, len(tokens))
        assert hit.valid == [self.valid[page] for page in expected]
        self.cached = [page for page in self.cached if page not in expected]
        holder = Holder(salt, words, list(hit.pages), list(hit.keys))
        self.holders.append(holder)
        self.extend(holder)

    def extend(self, holder: Holder) -> None:
        missing = len(holder.words) - len(holder.pages)
        taken = self.cache.pool.take(missing)
        if missing > len(self.free) + len(self.cached):
            assert taken is None
            holder.words = holder.words[: len(holder.pages)]
            return
        assert taken is not None
        fresh = [page for page in taken if page in self.free]
        evicted = self.cached[: missing - len(fresh)]
        assert [page for page in taken if page not in self.free] == evicted, "the oldest is evicted"
        self.free -= set(fresh)
        self.cached = self.cached[len(evicted) :]
        for page in evicted:
            self.forget(page)
        holder.pages += taken

    @precondition(lambda self: any(len(h.keys) < len(h.pages) for h in self.holders))
    @rule(data=st.data(), valid=st.integers(0, 3), count=st.integers(1, 4))
    def register(self, data: st.DataObject, valid: int, count: int) -> None:
        holder = data.draw(st.sampled_from([h for h in self.holders if len(h.keys) < len(h.pages)]))
        for _ in range(min(count, len(holder.pages) - len(holder.keys))):
            self.register_next(holder, valid)

    def register_next(self, holder: Holder, valid: int) -> None:
        number = len(holder.keys)
        parent = holder.keys[-1] if number else self.cache.root_key(holder.salt)
        key = self.cache.child_key(parent, tokens_of(holder.words[number : number + 1], 0))
        page = holder.pages[number]
        self.cache.register(page, key, valid)
        holder.keys.append(key)
        # (a page that was found stays registered; one whose text is known from another page stays private)
        if self.page_of.setdefault((holder.salt, holder.words[: number + 1]), page) == page:
            self.valid[page] = valid

    @rule(page=st.integers(0, PAGES - 1), valid=st.integers(1, 3))
    def mark(self, page: int, valid: int) -> None:
        self.cache.mark_valid(page, valid)
        if page in self.valid:
            self.valid[page] |= valid

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.cache.release(holder.pages)
        for page in reversed(holder.pages):  # so that the beginning of a text is evicted last
            if not any(page in other.pages for other in self.holders):
                if page in self.valid:
                    self.cached.append(page)
                else:
                    self.free.add(page)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.page_of.clear()
        self.valid.clear()
        self.free |= set(self.cached)
        self.cached.clear()

    @invariant()
    def books_balance(self) -> None:
        assert self.cache.pool.num_cached == len(self.cached)
        assert self.cache.pool.num_free == len(self.free)
        self.cache.pool.check(holder.pages for holder in self.holders)


TestPrefixCache = PrefixMachine.TestCase
TestPrefixCache.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def registered(words: Words, salt: str = "") -> PrefixCache:
    """A cache that knows one text, held by nobody."""
    cache = PrefixCache(len(words) + 1)
    pages = cache.pool.take(len(words)) or []
    key = cache.root_key(salt)
    for page, word in zip(pages, words, strict=True):
        key = cache.child_key(key, tokens_of((word,), 0))
        cache.register(page, key, 0)
    cache.release(pages)
    return cache


def test_the_last_token_is_always_left_to_compute() -> None:
    for tail, pages in ((0, 1), (1, 2), (5, 2)):
        assert len(registered((3, 4)).match(tokens_of((3, 4), tail), "").pages) == pages
    assert registered((3,)).match(tokens_of((3,), 0), "").pages == []


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    cache = registered((3, 4, 5))
    cache.pool.take(2)  # a free page, and one of the text's
    assert len(cache.match(tokens_of((3, 4, 5)), "").pages) == 2


def test_one_different_token_ends_the_match() -> None:
    for at in (0, PAGE_SIZE - 1, PAGE_SIZE, 2 * PAGE_SIZE - 1):
        tokens = tokens_of((3, 4))
        tokens[at] = 0
        assert len(registered((3, 4)).match(tokens, "").pages) == at // PAGE_SIZE


def test_a_page_counts_only_after_the_same_beginning() -> None:
    cache = registered((3, 4))
    assert cache.match(tokens_of((4,)), "").pages == []
    assert cache.match(tokens_of((5, 4)), "").pages == []


def test_salts_and_processes_do_not_share() -> None:
    cache = registered((3,), salt="a")
    assert cache.match(tokens_of((3,)), "b").pages == []
    assert len(cache.match(tokens_of((3,)), "a").pages) == 1
    assert cache.root_key("a") != PrefixCache(1).root_key("a"), "keys cannot be guessed from outside"


def test_a_short_page_has_another_key() -> None:
    cache = registered((3,))
    root = cache.root_key("")
    keys = {cache.child_key(root, tokens_of((3,), 0)[:length]) for length in range(PAGE_SIZE + 1)}
    assert len(keys) == PAGE_SIZE + 1


def test_switched_off_it_finds_and_keeps_nothing() -> None:
    cache = PrefixCache(2, enabled=False)
    pages = cache.pool.take(1) or []
    cache.register(pages[0], cache.child_key(cache.root_key(""), tokens_of((3,), 0)), 0)
    cache.release(pages)
    assert cache.pool.num_free == 2
    assert cache.match(tokens_of((3,)), "").pages == []
