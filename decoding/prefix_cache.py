"""Full pages found again by what they hold.

The key of a page is a SHA-256 over (key of the page before it, its token ids, and at the start the salt): a page is
shared only with a prompt that is equal from the first token on, within one salt, and nobody can forge a collision.
Drafter K/V lies in the same pages; ``valid`` tells for which drafters it was written, since requests may run without.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from decoding.page_pool import PagePool
from models.batch import PAGE_SIZE

Key = bytes


@dataclass(frozen=True)
class PrefixHit:
    """Pages that hold the beginning of a prompt; the caller owns one reference to each."""

    pages: list[int]
    keys: list[Key]
    valid: list[int]  # per page, bit d set: drafter number d has its K/V there


class PrefixCache:
    """Keys of full pages. Owns no references: a page that nobody holds stays in the pool as cached until evicted."""

    def __init__(self, num_pages: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.pool = PagePool(num_pages, on_evict=self._forget)
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._valid: dict[int, int] = {}
        self._process_salt = secrets.token_bytes(16)

    def root_key(self, salt: str) -> Key:
        """Parent key of a sequence's first page."""
        return hashlib.sha256(self._process_salt + salt.encode()).digest()

    @staticmethod
    def child_key(parent: Key, token_ids: np.ndarray) -> Key:
        """Key of the page that holds ``token_ids`` [PAGE_SIZE] after the page of key ``parent``."""
        return hashlib.sha256(parent + token_ids.astype("<i8").tobytes()).digest()

    def match(self, token_ids: np.ndarray, salt: str) -> PrefixHit:
        """The longest run of cached full pages at the start of ``token_ids``, short of its last token.

        (The last token is always computed: its hidden state gives the first logits.) Takes a reference to each page.
        """
        hit = PrefixHit([], [], [])
        if not self.enabled:
            return hit
        key = self.root_key(salt)
        for start in range(0, shareable_tokens(len(token_ids)), PAGE_SIZE):
            key = self.child_key(key, token_ids[start : start + PAGE_SIZE])
            page = self._page_of.get(key)
            if page is None:
                break
            self.pool.share(page)
            hit.pages.append(page)
            hit.keys.append(key)
            hit.valid.append(self._valid[page])
        return hit

    def has(self, key: Key | None) -> bool:
        """Whether a page of this key is there."""
        return key in self._page_of

    def register(self, page: int, key: Key, valid: int) -> None:
        """A held page is full and has this key. If another page has the key already, this one stays private."""
        if self.enabled and key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key
            self._valid[page] = valid

    def mark_valid(self, page: int, valid: int) -> None:
        """More drafters have written their K/V into this page."""
        if page in self._valid:
            self._valid[page] |= valid

    def release(self, pages: list[int]) -> None:
        """Give up one reference to each page, last page first so that prefixes outlive what follows them."""
        self.pool.release(reversed(pages), lambda page: page in self._key_of)

    def forget(self, pages: Iterable[int]) -> None:
        """Let nobody find these pages any more; who holds them goes on holding them."""
        for page in pages:
            if page in self._key_of:
                self._forget(page)
                self.pool.uncache(page)

    def clear(self) -> None:
        """Forget every page."""
        self.forget(list(self._key_of))

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page)
        del self._page_of[key]
        del self._valid[page]


def shareable_tokens(length: int) -> int:
    """How much of a text of this length can be found in a prefix cache: full pages, short of its last token."""
    return (length - 1) // PAGE_SIZE * PAGE_SIZE
