"""A target that runs no model, and texts that are dictated to it: an engine whose drafters alone do any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.sampling import Sampling
from decoding.verify import Rule, Verdict
from models.batch import MAX_TREE, RaggedBatch
from models.kv_cache import KVCache, KVSpec
from models.target import ForwardOutput
from models.tree import Trees

NEW = 0.3  # share of a text's pieces that are new
PIECE = (8, 40)  # tokens of a piece


class SilentTarget:
    """See ``CausalModel``. Logits are noise: always the same rows, beginning at another one in each step."""

    hidden_size = num_layers = 1
    dtype = torch.float32
    device = torch.device("cpu")
    kv_spec = KVSpec(num_layers=1, num_kv_heads=1, key_dim=8, value_dim=8)

    def __init__(self, vocab_size: int, max_model_len: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        noise = torch.Generator().manual_seed(seed)
        self._logits = torch.randn(8 * MAX_TREE, vocab_size, generator=noise)
        self._steps = 0

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        return ForwardOutput(torch.zeros(batch.num_tokens, 1))

    def new_cache(self, num_pages: int) -> KVCache:
        return KVCache(self.kv_spec, num_pages, self.dtype, self.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        return torch.zeros(len(token_ids), 1)

    def logits(self, hidden: Tensor) -> Tensor:
        self._steps += 1
        first = self._steps * 13 % (len(self._logits) - MAX_TREE)
        return self._logits[first : first + len(hidden)]


class Dictated:
    """A rule that draws the tokens of a known text, whatever the logits say; for one request at a time.

    Args:
        rule: judges the drafts against what is drawn.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._text = torch.zeros(0, dtype=torch.int64)
        self.length = 0  # tokens of the text that are committed

    def begin(self, text: Sequence[int], length: int) -> None:
        """A new text, of which ``length`` tokens are the prompt."""
        behind = [0] * MAX_TREE  # what the deepest nodes of the last step are judged by
        self._text, self.length = torch.tensor([*text, *behind]), length

    def __call__(self, trees: Trees, nodes: Nodes, x: Tensor, sampling: Sampling, deepest: int) -> Verdict:
        """See ``Rule``."""
        due = self._text[self.length + nodes.depth]
        drawn = torch.zeros_like(x).scatter_(1, due[:, None], 1.0)
        return self._rule(trees, nodes, drawn, sampling, deepest)


def spliced_texts(corpus: Sequence[int], length: int, vocab_size: int, seed: int = 0) -> Iterator[list[int]]:
    """Texts without end: pieces of a corpus, which come again now and then, and new ones of random tokens."""
    lots, known = np.random.default_rng(seed), np.asarray(corpus)
    while True:
        text: list[int] = []
        while len(text) < length:
            size = int(lots.integers(*PIECE))
            if lots.random() < NEW:
                text += lots.integers(vocab_size, size=size).tolist()
            else:
                first = int(lots.integers(max(1, len(known) - size)))
                text += known[first : first + size].tolist()
        yield text[:length]
