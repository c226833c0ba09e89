"""The one owner of pages. A page is PAGE_SIZE slots in every model's K/V; this class hands out ids, never tensors.

A page is in exactly one state:

    free      --take-->  held (reference count >= 1)  --release to 0-->  free, or cached if the prefix cache knows it
    cached    --share--> held again;  or evicted by take, oldest first, when nothing is free
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from decoding.errors import SaccadeError


class PoolError(SaccadeError):
    """The pool's books do not balance: a bug, never a client's mistake."""


class PagePool:
    """Reference-counted page ids.

    Args:
        num_pages: pages in all.
        on_evict: told of a cached page that is about to be reused, so that its key is forgotten.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] = lambda page: None) -> None:
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._references = [0] * num_pages

    @property
    def num_available(self) -> int:
        """Pages that ``take`` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def take(self, count: int) -> list[int] | None:
        """``count`` pages with one reference each, or None (and nothing taken) if there are not as many."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._on_evict(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def share(self, page: int) -> None:
        """One more reference to a held or cached page."""
        if self._references[page] == 0:
            if page not in self._cached:
                raise PoolError(f"page {page} is free and cannot be shared")
            del self._cached[page]
        self._references[page] += 1

    def release(self, pages: Iterable[int], is_cached: Callable[[int], bool] = lambda page: False) -> None:
        """One reference less to each page; a page without references is cached if ``is_cached``, else free."""
        for page in pages:
            if self._references[page] <= 0:
                raise PoolError(f"page {page} was released more often than it was taken")
            self._references[page] -= 1
            if self._references[page] == 0:
                if is_cached(page):
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def uncache(self, page: int) -> None:
        """The prefix cache forgot a page: if nobody holds it, it is free."""
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def check_idle(self) -> None:
        """``check`` for when nobody holds a page, in no time.

        Raises:
            PoolError: pages are held or lost.
        """
        if self.num_available != self.num_pages:
            raise PoolError(f"{self.num_pages - self.num_available} pages are held or lost, and nobody is there")

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Compare the books with the page lists of everyone who holds pages.

        Raises:
            PoolError: a page lost, in two states, or with a wrong reference count.
        """
        counted = Counter(page for pages in holders for page in pages)
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise PoolError("a page is on the free list twice")
        held = {page for page, count in enumerate(self._references) if count}
        if free & cached or free & held or cached & held:
            raise PoolError("a page is in two states at once")
        if len(free) + len(cached) + len(held) != self.num_pages:
            raise PoolError(f"{self.num_pages - len(free) - len(cached) - len(held)} pages are lost")
        for page in held | set(counted):
            if self._references[page] != counted[page]:
                raise PoolError(f"page {page} has {self._references[page]} references, but {counted[page]} holders")
