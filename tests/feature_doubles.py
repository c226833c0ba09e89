"""Feature models for tests: a small decoder that also reads features, and one that is right if it is fed right."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from models.attention.reference import key_slots
from models.batch import MAX_TREE, RaggedBatch
from models.decoder import Decoder
from models.heads.feature_model import Drafted, FeatureSource
from models.kv_cache import KVCache, KVSpec
from models.target import ForwardOutput
from tests.engines import VOCAB, tiny_decoder

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class ToyFeatureModel:
    """A blurred copy of ``tiny_decoder``'s target over tokens and, weakly, features: a realistic drafter.

    Args:
        continues: it also reads what it made of the entry before, as a second module would.
        token_ids: a draft vocabulary; of ids beyond the target's it is surest.
    """

    dtype, device = torch.float64, CPU

    def __init__(
        self,
        target: Decoder,
        taps: tuple[int, ...] = (0, 2),
        continues: bool = False,
        token_ids: tuple[int, ...] | None = None,
    ) -> None:
        size = target.hidden_size
        self.source = FeatureSource(taps)
        self.feature_size = max(1, len(taps)) * size
        self.continues = continues
        self.carry_size = 2 * size
        self.max_positions = target.max_model_len
        self.token_ids = None if token_ids is None else torch.tensor(token_ids)
        self.body = tiny_decoder(torch.float64, blur=0.05)
        for layer in self.body.layers:
            layer.spec = replace(layer.spec, first_key=1)
        self.kv_spec = self.body.kv_spec
        self._shrink = 0.1 * drawn(self.feature_size, size, seed=1)
        self._mix = 0.1 * drawn(size, size, seed=2)

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        first = features @ self._shrink  # what a first module would make of it
        earlier = first.roll(1, dims=0)
        if self.continues:
            assert before is not None
            earlier[batch.row_starts[:-1].long()] = before[:, : first.shape[1]]
        return self._run(batch, first, earlier, cache)

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        assert depth >= 1
        earlier, made = carry.chunk(2, dim=1)
        return self._run(batch, 0.1 * made, earlier, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.body.logits(hidden)
        if self.token_ids is None:
            return logits
        padding = logits.amax(dim=1, keepdim=True) + 1
        return torch.cat([logits, padding], dim=1)[:, self.token_ids.clamp(max=VOCAB)]

    def _run(self, batch: RaggedBatch, first: Tensor, earlier: Tensor, cache: KVCache) -> Drafted:
        batch.validate(cache.scratch_page)
        stream = self.body.embed(batch.token_ids) + 0.1 * first
        if self.continues:
            stream = stream + earlier @ self._mix
        hidden, stream, _ = self.body._stack.run(stream, batch, cache)
        return Drafted(hidden, torch.cat([first, stream], dim=1))


# the oracle ----------------------------------------------------------------------------------------------------------
#
# The target's hidden state of token t is made of five blocks: the token, the one before, the position, a sum over the
# tokens 1 .. t, and a fading sum over them. The feature model has each block from another place: its token, the
# feature, its RoPE position, its own K/V, its carry. It guesses the target's logits exactly, or one of them is wrong.

BLOCK = 8
FADING = 0.7
TOKEN, EARLIER, PLACE, SUM, FADED = (slice(BLOCK * block, BLOCK * (block + 1)) for block in range(5))


class OracleWeights:
    """What both models know.

    Args:
        remembers: the sum over all tokens counts, and the position. Behind a gap nobody can know either.
        fades: the fading sum counts.
    """

    def __init__(self, remembers: bool, fades: bool) -> None:
        self.token, self.summed, self.faded = (drawn(VOCAB, BLOCK, seed=seed) for seed in range(3))
        self.frequency = torch.linspace(0.1, 1.7, BLOCK, dtype=torch.float64) * remembers
        self.summed = self.summed * remembers
        self.faded = self.faded * fades
        self._inner, self._outer = drawn(5 * BLOCK, 64, seed=3), drawn(64, VOCAB, seed=4)

    def logits(self, hidden: Tensor) -> Tensor:
        return 0.7 * torch.tanh(hidden @ self._inner) @ self._outer

    def place(self, position: Tensor) -> Tensor:
        return torch.sin(position[:, None] * self.frequency)


def write_tokens(batch: RaggedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Store each token's id as its key; the ids of a row's keys by query [T, K], -1 for those that it does not see,

    and how far back they lie [T, K].
    """
    batch.validate()
    ids = batch.token_ids.double().view(-1, 1, 1)
    cache.write(0, batch.slots, ids, ids)
    row, key = batch.row_of.long(), torch.arange(batch.max_keys)
    node = key - batch.tree_base.long()[row][:, None]
    in_tree = (node >= 0) & (node < MAX_TREE)
    ancestor = ((batch.tree_mask[:, None] >> node.clamp(0, MAX_TREE - 1)) & 1).bool() & in_tree
    seen = (key < batch.visible[:, None]) | ancestor
    rank = seen.long().cumsum(dim=1) - 1  # what is seen is a path: keys in the order of their positions
    distance = rank[:, -1:] - rank
    tokens = cache.keys[0, :, 0, 0][key_slots(batch)[row]].long()
    return torch.where(seen, tokens, -1), distance


class OracleTarget:
    """A ``CausalModel``. Tap i is the hidden state times i + 1."""

    vocab_size, hidden_size, num_layers, max_model_len = VOCAB, 5 * BLOCK, 2, 512
    kv_spec = KVSpec(1, 1, 1, 1)
    dtype, device = torch.float64, CPU

    def __init__(self, weights: OracleWeights) -> None:
        self.weights = weights

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        weights = self.weights
        tokens, distance = write_tokens(batch, cache)
        inside = (tokens >= 0) & (batch.positions[:, None] - distance >= 1)  # token 0 is in no sum
        known = tokens.clamp(min=0)
        hidden = torch.empty(batch.num_tokens, self.hidden_size, dtype=self.dtype)
        hidden[:, TOKEN] = weights.token[batch.token_ids]
        just_before = (tokens >= 0) & (distance == 1)
        hidden[:, EARLIER] = (weights.token[known] * just_before[:, :, None]).sum(dim=1)
        hidden[:, PLACE] = weights.place(batch.positions)
        hidden[:, SUM] = (weights.summed[known] * inside[:, :, None]).sum(dim=1)
        hidden[:, FADED] = (weights.faded[known] * (inside * FADING**distance)[:, :, None]).sum(dim=1)
        return ForwardOutput(hidden, {tap: hidden * (tap + 1) for tap in taps})

    def new_cache(self, num_pages: int) -> KVCache:
        return KVCache(self.kv_spec, num_pages, self.dtype, self.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        embedded = torch.zeros(len(token_ids), self.hidden_size, dtype=self.dtype)
        embedded[:, TOKEN] = self.weights.token[token_ids]
        return embedded

    def logits(self, hidden: Tensor) -> Tensor:
        return self.weights.logits(hidden)


class OracleFeatureModel:
    """A ``FeatureModel`` that knows the target's next token wherever it is called as it should be."""

    source = FeatureSource((2, 0))
    feature_size, carry_size = 2 * 5 * BLOCK, 5 * BLOCK
    kv_spec = KVSpec(1, 1, 1, 1)
    max_positions = 512
    token_ids: Tensor | None = None
    dtype, device = torch.float64, CPU

    def __init__(self, weights: OracleWeights, continues: bool) -> None:
        self.weights = weights
        self.continues = continues

    def catch_up(self, batch: RaggedBatch, features: Tensor, before: Tensor | None, cache: KVCache) -> Drafted:
        late, early = features.chunk(2, dim=1)
        torch.testing.assert_close(late, 3 * early)
        assert (before is not None) == self.continues
        hidden = self._hidden(batch, early[:, TOKEN], cache)
        faded = self.weights.faded[batch.token_ids]
        starts = batch.row_starts.tolist()
        for row, (start, end) in enumerate(pairwise(starts)):
            last = before[row, FADED] if before is not None else torch.zeros(BLOCK, dtype=self.dtype)
            for at in range(start, end):
                last = hidden[at, FADED] = FADING * last + faded[at]
        return Drafted(hidden, hidden)

    def extend(self, batch: RaggedBatch, carry: Tensor, depth: int, cache: KVCache) -> Drafted:
        assert (batch.tree_mask.bitwise_and(-2) != 0).all()
        hidden = self._hidden(batch, carry[:, TOKEN], cache)
        hidden[:, FADED] = FADING * carry[:, FADED] + self.weights.faded[batch.token_ids]
        return Drafted(hidden, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.weights.logits(hidden)

    def _hidden(self, batch: RaggedBatch, earlier: Tensor, cache: KVCache) -> Tensor:
        tokens, _ = write_tokens(batch, cache)
        tokens[:, 0] = -1  # key 0 does not exist
        hidden = torch.empty(batch.num_tokens, 5 * BLOCK, dtype=self.dtype)
        hidden[:, TOKEN] = self.weights.token[batch.token_ids]
        hidden[:, EARLIER] = earlier
        hidden[:, PLACE] = self.weights.place(batch.positions + 1)
        hidden[:, SUM] = (self.weights.summed[tokens.clamp(min=0)] * (tokens >= 0)[:, :, None]).sum(dim=1)
        return hidden
