"""Suffix decoding (Oliaro et al., 2411.04975): what followed the row's last tokens before, in it or in past outputs.

Two suffix trees with counts are asked: that of the row's own text, and that of all outputs of this server under the
request's ``cache_salt``. The more tokens match, the more are drafted.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from decoding.drafters.base import DrafterContext, Needs, TokenDrafter
from decoding.drafters.suffix_file import Kept, SuffixFile, fingerprint
from decoding.drafters.suffix_search import PlainSuffixCache, Saved, SearchSettings
from decoding.drafters.tries import TreeArrays
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from models import kernels
from models.tree import Trees

logger = logging.getLogger("saccade.engine")

KEY_BYTES = 32


def trust_of(match: int) -> float:
    """What is left of a share of the occurrences after a match of this length; each drafted token lengthens it.

    Fitted to the demo target's text at temperature 0.8, where one continuation alone was right in .35, .49, .65, .79,
    .83 and .86 of the cases after matches of 1 to 6, and in .93 after much longer ones.
    """
    return 0.95 - 0.61 * 0.7 ** (match - 1)


@dataclass(frozen=True)
class SuffixOptions:
    """Names as in vLLM and ArcticInference, without their ``suffix_decoding_``."""

    path: str = ""  # file that keeps outputs beyond the end of the server; "": nothing is kept
    max_tree_depth: int = 64  # tokens of a match and of what follows it, together
    max_cached_requests: int = 10_000  # whose outputs are kept, and
    max_cache_mb: int = 256  # what they may take; the oldest go first
    max_spec_factor: float = 1.0  # nodes drafted per matched token
    min_token_prob: float = 0.1  # of a node's path, by counts
    save_interval: int = 300  # seconds between two writes of the file, at least

    def memory_bound(self, vocab_size: int) -> int:
        """Bytes that the outputs take at most."""
        return self.max_cache_mb * 2**20


class SuffixCache(Protocol):
    """What ``PlainSuffixCache`` and the kernel have in common."""

    def admit(self, tree: int, known: int) -> int: ...

    def forget(self, number: int, text: Tensor, keep: bool) -> None: ...

    def insert(self, tree: int, tokens: Tensor) -> None: ...

    def texts(self) -> Saved: ...

    def usage(self) -> list[int]: ...

    def trees(
        self, numbers: list[int], texts: list[Tensor], max_nodes: list[int], max_depth: list[int], bit: int
    ) -> TreeArrays: ...


class FusedSuffixCache:
    """``PlainSuffixCache`` in suffix trees: see models/kernels/suffix.cpp."""

    def __init__(self, settings: SearchSettings) -> None:
        kernels.required()
        self._cache: Any = torch.classes.saccade.SuffixCache(*settings.numbers())
        self.admit, self.forget, self.trees = self._cache.admit, self._cache.forget, self._cache.trees
        self.insert, self.texts = self._cache.insert, self._cache.texts

    def usage(self) -> list[int]:
        """[requests, tokens, nodes, bytes] of the outputs."""
        return list(self._cache.usage())


class SuffixDrafter(TokenDrafter):
    """Follows every text from its admission on; reads it when it is asked, and to its end when it ends."""

    needs = Needs(host=True, recalls=True)

    def __init__(self, options: SuffixOptions, context: DrafterContext) -> None:
        check(options)
        self.name = context.name
        self._bit = context.bit
        self._save_interval = options.save_interval
        self.cache = new_cache(settings_of(options))
        self._followed: dict[SequenceId, tuple[Sequence, int]] = {}  # with the cache's number for it
        self._key = secrets.token_bytes(KEY_BYTES)
        self._file: SuffixFile | None = None
        self._saved_at = time.monotonic()
        if options.path:
            self._file = SuffixFile(options.path, fingerprint(context.tokenizer))
            self._load(self._file)

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        """Begin to follow. Prompts are not learned; outputs from before a preemption are known already."""
        tree = secrets.randbits(62) if sequence.made_up else self._tree_of(sequence.request.cache_salt)
        self._followed[sequence.id] = sequence, self.cache.admit(tree, sequence.length)

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        nodes = [limit.nodes if self.name in limit.drafters else 0 for limit in quota.rows]
        if not any(nodes):
            return None
        numbers = [self._followed[row.sequence.id][1] for row in plan.deciding]
        texts = [torch.from_numpy(row.sequence.tokens) for row in plan.deciding]
        arrays = self.cache.trees(numbers, texts, nodes, [limit.depth for limit in quota.rows], self._bit)
        return Trees(*arrays) if arrays[0].shape[1] > 1 else None

    def forget(self, sequence: SequenceId) -> None:
        """Learn what is not yet learned of its output."""
        if sequence not in self._followed:
            return  # it ended while it waited
        ended, number = self._followed.pop(sequence)
        self.cache.forget(number, torch.from_numpy(ended.tokens), not ended.made_up)
        if self._file is not None and time.monotonic() - self._saved_at >= self._save_interval:
            self._saved_at = time.monotonic()
            self._file.write_soon(self._kept())

    def close(self) -> None:
        """Write the file."""
        if self._file is not None:
            self._file.write(self._kept())

    def _kept(self) -> Kept:
        return Kept(self._key, self.cache.texts())

    def _load(self, file: SuffixFile) -> None:
        kept = file.read()
        if kept is None:
            return
        self._key = kept.key
        trees, lengths, tokens = kept.texts
        for tree, text in zip(trees.tolist(), torch.split_with_sizes(tokens.long(), lengths.tolist()), strict=True):
            self.cache.insert(tree, text)
        requests, count, *_ = self.cache.usage()
        logger.info("suffix decoding goes on with %d outputs (%d tokens) of %s", requests, count, file.path)

    def _tree_of(self, salt: str) -> int:
        """Requests that share a salt share a tree. Without the key nobody can find a salt that has another's."""
        digest = hashlib.blake2b(salt.encode(), key=self._key, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def new_cache(settings: SearchSettings) -> SuffixCache:
    """The kernel's where there is one."""
    fused = kernels.serves(torch.device("cpu"), torch.float32)
    return FusedSuffixCache(settings) if fused else PlainSuffixCache(settings)


def settings_of(options: SuffixOptions) -> SearchSettings:
    """What the search needs to know of the options."""
    return SearchSettings(
        max_tree_depth=options.max_tree_depth,
        max_bytes=options.max_cache_mb * 2**20,
        max_cached_requests=options.max_cached_requests,
        max_spec_factor=options.max_spec_factor,
        min_token_prob=options.min_token_prob,
        trust=tuple(trust_of(max(match, 1)) for match in range(options.max_tree_depth)),
    )


def check(options: SuffixOptions) -> None:
    """Check ranges.

    Raises:
        ConfigError: naming the option.
    """
    if not 2 <= options.max_tree_depth <= 1024:
        raise ConfigError("suffix: max_tree_depth must be in 2 .. 1024")
    if options.max_cached_requests < 1:
        raise ConfigError("suffix: max_cached_requests must be at least 1")
    if not 1 <= options.max_cache_mb <= 2**20:
        raise ConfigError("suffix: max_cache_mb must be in 1 .. 1048576")
    if not 0.0 < options.max_spec_factor <= 64.0:
        raise ConfigError("suffix: max_spec_factor must be in (0, 64]")
    if not 0.01 <= options.min_token_prob <= 1.0:
        raise ConfigError("suffix: min_token_prob must be in [0.01, 1]")
    if options.save_interval < 0:
        raise ConfigError("suffix: save_interval must not be negative")
