"""Recorded passes: buckets, padding that nobody can tell, results that the next pass overwrites, refusal."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.batch import PAGE_SIZE, RaggedBatch
from models.graphed_model import GraphedFeatureModel, GraphedModel
from models.graphs import ROW_EDGES, TOKEN_EDGES, Bucket, EagerCapture, Replay, StaticInputs, Tensors
from models.kv_cache import KVCache
from models.target import CausalModel
from models.transfer import layout, pack
from tests.engines import VOCAB, tiny_decoder
from tests.feature_doubles import ToyFeatureModel
from tests.paged import PagedRun

CPU = torch.device("cpu")
decoder = cache(tiny_decoder)
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """The same bits; in float64 up to rounding, as its matrix products depend on the number of rows."""
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    else:
        assert torch.equal(ours, theirs)


class CountingCapture(EagerCapture):
    """Counts what is recorded."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Tensors]) -> Replay:
        self.recorded += 1
        return super().__call__(run)


def a_batch(run: PagedRun, rng: random.Random, lengths: list[int]) -> RaggedBatch:
    """A batch of the first rows of a run: chains and trees of these lengths over what is committed."""
    queries = {row: [rng.randrange(VOCAB) for _ in range(length)] for row, length in enumerate(lengths)}
    trees = {
        row: [-1, *(rng.randrange(node) for node in range(1, length))]
        for row, length in enumerate(lengths)
        if rng.random() < 0.6
    }
    return run.batch(queries, trees)


def a_run(model: CausalModel, contexts: list[int]) -> PagedRun:
    run = PagedRun(model, rows=len(contexts), capacity=256)
    rng = random.Random(1)
    run.extend([[rng.randrange(VOCAB) for _ in range(length)] for length in contexts])
    return run


@given(sizes)
@settings(max_examples=80, deadline=None)
def test_the_bucket_is_the_smallest_that_can_be_padded(lengths: list[int]) -> None:
    run = PagedRun(decoder(torch.float32), rows=len(lengths), capacity=64)
    batch = a_batch(run, random.Random(0), lengths)
    rows, tokens, bucket = len(lengths), sum(lengths), Bucket.of(batch)
    if bucket is None:
        assert tokens > TOKEN_EDGES[-1]
        return
    assert batch.max_query <= bucket.queries
    assert bucket.queries in (1, bucket.tokens)
    assert bucket.keys >= batch.max_keys
    assert bucket.keys % PAGE_SIZE == 0

    def fits(high: int, wide: int) -> bool:
        return (high, wide) == (rows, tokens) or (high > rows and wide - tokens >= high - rows)

    fitting = [(wide, high) for wide in TOKEN_EDGES for high in ROW_EDGES if high >= rows and fits(high, wide)]
    assert (bucket.tokens, bucket.rows) == min(fitting)


@given(sizes, sizes)
@settings(max_examples=40, deadline=None)
def test_a_padded_batch_is_a_valid_one(first: list[int], second: list[int]) -> None:
    """Also when another batch was there before."""
    run = PagedRun(decoder(torch.float32), rows=12, capacity=64)
    rng = random.Random(len(first))
    batches = [a_batch(run, rng, lengths) for lengths in (first, second)]
    buckets = [Bucket.of(batch) for batch in batches]
    if None in buckets:
        return
    for bucket in buckets:
        assert bucket is not None
        inputs = StaticInputs(bucket, run.cache.scratch_page, CPU)
        for batch, own in zip(batches, buckets):
            if own != bucket:
                continue
            inputs.fill(batch, (), ())
            inputs.batch.validate(run.cache.scratch_page)
            tokens, rows = batch.num_tokens, batch.num_rows
            for name in ("token_ids", "positions", "slots", "visible", "tree_mask", "row_of"):
                assert torch.equal(getattr(inputs.batch, name)[:tokens], getattr(batch, name)), name
            assert torch.equal(inputs.batch.row_starts[: rows + 1], batch.row_starts)
            assert torch.equal(inputs.batch.tree_base[:rows], batch.tree_base)
            assert (inputs.batch.slots[tokens:] // PAGE_SIZE == run.cache.scratch_page).all()
            assert (inputs.batch.page_table[rows:] == run.cache.scratch_page).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_changes_no_bit(dtype: torch.dtype) -> None:
    model, capture, rng = decoder(dtype), CountingCapture(), random.Random(3)
    graphed = GraphedModel(model, capture)
    for _ in range(15):
        contexts = [rng.randrange(1, 100) for _ in range(rng.randrange(1, 7))]
        plain, padded = a_run(model, contexts), a_run(graphed, contexts)
        taps = rng.choice([(), (0, 2), (1,)])
        lengths = [rng.choice([1, 1, 2, 7, 20]) for _ in contexts]
        batch = a_batch(plain, rng, lengths)
        ours, theirs = padded.forward(batch, taps), plain.forward(batch, taps)
        assert_same(ours.hidden, theirs.hidden)
        assert set(ours.taps) == set(theirs.taps) == set(taps)
        for tap in taps:
            assert_same(ours.taps[tap], theirs.taps[tap])
        slots = plain.cache.scratch_page * PAGE_SIZE  # those before the scratch page
        assert_same(padded.cache.keys[:, :slots], plain.cache.keys[:, :slots])
        assert_same(padded.cache.values[:, :slots], plain.cache.values[:, :slots])
    assert capture.recorded > 10


def test_a_graph_serves_every_batch_of_its_bucket_and_overwrites_its_results() -> None:
    capture = CountingCapture()
    run = a_run(GraphedModel(decoder(torch.float64), capture), [9, 30, 17])
    before, rng = capture.recorded, random.Random(5)
    one = run.forward(a_batch(run, rng, [5, 2, 4])).hidden
    kept = one.clone()
    two = run.forward(a_batch(run, rng, [3, 3, 7])).hidden
    assert capture.recorded == before + 1
    assert not torch.equal(one, kept), "results live in the graph's own memory"
    assert torch.equal(one, two[: len(one)])


def test_batches_beyond_the_buckets_run_as_they_are() -> None:
    capture = CountingCapture()
    model = decoder(torch.float32)
    run, plain = PagedRun(GraphedModel(model, capture), 1), PagedRun(model, 1)
    chain = [i % VOCAB for i in range(TOKEN_EDGES[-1] - 12)]
    [ours], [theirs] = run.extend([[*chain, *range(20)]]), plain.extend([[*chain, *range(20)]])
    assert capture.recorded == 0
    assert torch.equal(ours, theirs)


def test_a_refusal_is_said_once_and_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def refuse(run: Callable[[], Tensors]) -> Replay:
        asked.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    model = decoder(torch.float32)
    run, plain = PagedRun(GraphedModel(model, refuse)), PagedRun(model)
    with caplog.at_level(logging.WARNING):
        for chain in ([1, 2, 3], [4], [5, 6]):
            assert torch.equal(run.extend([chain])[0], plain.extend([chain])[0])
    assert len(asked) == 1
    [record] = caplog.records
    assert "launched by itself" in record.message
    assert "not permitted" in record.message


@pytest.mark.parametrize("continues", [False, True])
def test_feature_models(continues: bool) -> None:
    """What comes with tokens (features, carry) and with rows (the carry before them) is padded, too."""
    model, rng = ToyFeatureModel(decoder(torch.float64), continues=continues), random.Random(7)
    capture = CountingCapture()
    graphed = GraphedFeatureModel(model, capture)
    caches = [KVCache(model.kv_spec, 200, model.dtype, model.device) for _ in range(2)]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    for _ in range(12):
        run = PagedRun(decoder(torch.float64), rows=5, capacity=512)
        run.lengths = [rng.randrange(1, 60) for _ in range(5)]
        chains = {row: [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))] for row in range(rng.randrange(1, 6))}
        batch = run.batch(chains)
        features = drawn(batch.num_tokens, model.feature_size)
        before = drawn(batch.num_rows, model.carry_size) if continues else None
        ours, theirs = (m.catch_up(batch, features, before, c) for m, c in zip((graphed, model), caches))
        assert_same(ours.hidden, theirs.hidden)
        assert_same(ours.carry, theirs.carry)
        carry = drawn(batch.num_tokens, model.carry_size)
        for depth in (1, 2):
            ours, theirs = (m.extend(batch, carry, depth, c) for m, c in zip((graphed, model), caches))
            assert_same(ours.hidden, theirs.hidden)
    assert_same(caches[0].keys[:, : 200 * PAGE_SIZE], caches[1].keys[:, : 200 * PAGE_SIZE])
    assert capture.recorded > 3


def test_a_graphed_model_is_a_causal_model() -> None:
    model = decoder(torch.float64)
    graphed: CausalModel = GraphedModel(model, EagerCapture())
    hidden = torch.randn(3, model.hidden_size, dtype=torch.float64)
    assert torch.equal(graphed.logits(hidden), model.logits(hidden))
    ids = torch.tensor([1, 5])
    assert torch.equal(graphed.embed(ids), model.embed(ids))
    for field in ("vocab_size", "hidden_size", "num_layers", "max_model_len", "kv_spec", "dtype", "device"):
        assert getattr(graphed, field) == getattr(model, field)


def test_static_inputs_keep_their_addresses() -> None:
    run = a_run(decoder(torch.float64), [9, 30])
    rng = random.Random(2)
    batches = [a_batch(run, rng, lengths) for lengths in ([3, 4], [4, 3])]
    bucket = Bucket.of(batches[0])
    assert bucket is not None
    assert bucket == Bucket.of(batches[1])
    inputs = StaticInputs(bucket, run.cache.scratch_page, CPU)

    def addresses() -> list[int]:
        fields = [getattr(inputs.batch, field.name) for field in dataclasses.fields(inputs.batch)]
        tensors = [each for each in fields if isinstance(each, Tensor)] + [*inputs.by_token, *inputs.by_row]
        return [each.data_ptr() for each in tensors]

    seen = set()
    for batch in batches * 2:
        inputs.fill(batch, (torch.randn(batch.num_tokens, 3),), (torch.randn(batch.num_rows, 2),))
        seen.add(tuple(addresses()))
    assert len(seen) == 1


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["int32", "int64", "float32", "bool"])))
)
def test_packed_copies(wanted: list[tuple[list[int], str]]) -> None:
    """Any shapes and dtypes, empty ones included, come out of the bytes as they went in."""
    if not wanted:
        return
    tensors = [torch.randint(0, 2, shape).to(getattr(torch, dtype)) for shape, dtype in wanted]
    parts, total = layout(tensors)
    packed = torch.empty(total, dtype=torch.uint8)
    pack(tensors, parts, packed)
    for part, tensor in zip(parts, tensors, strict=True):
        assert part.of(packed).dtype == tensor.dtype
        assert torch.equal(part.of(packed), tensor)
