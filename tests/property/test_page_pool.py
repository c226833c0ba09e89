"""The page pool against a model of sets, and whether its own check finds planted errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decoding.page_pool import PagePool, PoolError

PAGES = 7


class PoolMachine(RuleBasedStateMachine):
    """Holders are lists of pages; a page is cached when its last holder lets it go while it is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = PagePool(PAGES, self.evicted.append)
        self.free = set(range(PAGES))
        self.cached: list[int] = []  # oldest first
        self.holders: list[list[int]] = []
        self.marked: set[int] = set()

    @rule(count=st.integers(0, PAGES + 1))
    def take(self, count: int) -> None:
        self.evicted.clear()
        pages = self.pool.take(count)
        if count > len(self.free) + len(self.cached):
            assert pages is None
            assert not self.evicted
            return
        assert pages is not None
        assert len(set(pages)) == len(pages) == count
        fresh = [page for page in pages if page in self.free]
        assert len(fresh) == min(count, len(self.free)), "free pages go before cached ones"
        oldest = self.cached[: count - len(fresh)]
        assert [page for page in pages if page not in self.free] == oldest == self.evicted, "the oldest is evicted"
        self.free -= set(fresh)
        self.cached = self.cached[len(oldest) :]
        self.marked -= set(oldest)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        pages = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        if keep:
            self.marked |= set(pages)
        self.pool.release(pages, self.marked.__contains__)
        for page in pages:
            if not any(page in held for held in self.holders):
                if page in self.marked:
                    self.cached.append(page)
                else:
                    self.free.add(page)

    @rule(page=st.integers(0, PAGES - 1))
    def share(self, page: int) -> None:
        if page in self.free:
            with pytest.raises(PoolError, match="is free and cannot be shared"):
                self.pool.share(page)
            return
        self.pool.share(page)
        if page in self.cached:
            self.cached.remove(page)
        self.holders.append([page])

    @rule(page=st.integers(0, PAGES - 1))
    def uncache(self, page: int) -> None:
        self.pool.uncache(page)
        self.marked.discard(page)
        if page in self.cached:
            self.cached.remove(page)
            self.free.add(page)

    @rule(page=st.integers(0, PAGES - 1))
    def release_what_nobody_holds(self, page: int) -> None:
        if not any(page in held for held in self.holders):
            with pytest.raises(PoolError, match="released more often"):
                self.pool.release([page])

    @invariant()
    def books_balance(self) -> None:
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_available == len(self.free) + len(self.cached)
        self.pool.check(self.holders)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def _lose_a_page(pool: PagePool) -> None:
    pool._free.pop()


def _free_twice(pool: PagePool) -> None:
    pool._free.append(pool._free[0])


def _free_a_held_page(pool: PagePool) -> None:
    pool._free.append(0)


def _cache_a_held_page(pool: PagePool) -> None:
    pool._cached[0] = None


def _cache_a_free_page(pool: PagePool) -> None:
    pool._cached[pool._free[0]] = None


def _forget_a_reference(pool: PagePool) -> None:
    pool._references[1] -= 1


def _hold_for_nobody(pool: PagePool) -> None:
    pool.take(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_a_page, "1 pages are lost"),
        (_free_twice, "on the free list twice"),
        (_free_a_held_page, "in two states"),
        (_cache_a_held_page, "in two states"),
        (_cache_a_free_page, "in two states"),
        (_forget_a_reference, "page 1 has 1 references, but 2 holders"),
        (_hold_for_nobody, "1 references, but 0 holders"),
    ],
)
def test_check_finds_planted_errors(damage: Callable[[PagePool], None], message: str) -> None:
    pool = PagePool(6)
    held = pool.take(2)
    assert held == [0, 1]
    pool.share(1)
    holders = [held, [1]]
    pool.check(holders)
    damage(pool)
    with pytest.raises(PoolError, match=message):
        pool.check(holders)


def test_check_finds_a_holder_of_a_free_page() -> None:
    pool = PagePool(3)
    with pytest.raises(PoolError, match="0 references, but 1 holders"):
        pool.check([[2]])
