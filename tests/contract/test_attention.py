"""Every attention backend against the visible keys of each query, listed one by one in Python.

All slots that no row owns are NaN, so that a backend that reads them shows it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention import BACKENDS, AttentionBackend, AttentionSpec, load_backend
from models.batch import PAGE_SIZE, RaggedBatch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """``context`` committed keys, a chain of ``chain`` tokens, and a tree: parents of its nodes, node 0 the root."""

    context: int
    chain: int
    parents: tuple[int, ...] = (-1,)

    @property
    def base(self) -> int:
        return self.context + self.chain - 1

    @property
    def num_queries(self) -> int:
        return self.chain + len(self.parents) - 1

    @property
    def num_keys(self) -> int:
        return self.context + self.num_queries

    def path(self, node: int) -> list[int]:
        """Nodes from the root to ``node``."""
        return [0] if node == 0 else [*self.path(self.parents[node]), node]

    def keys_of(self, query: int) -> list[int]:
        """Logical keys that a query token sees, in the order of their positions 0, 1, 2, ..."""
        if query < self.chain:
            return list(range(self.context + query + 1))
        return list(range(self.base)) + [self.base + node for node in self.path(query - self.chain + 1)]

    def mask(self, query: int) -> int:
        if query < self.chain - 1:
            return 0
        bits = sum(1 << node for node in self.path(query - self.chain + 1))
        return bits - (1 << 64) if bits >> 63 else bits


@dataclass
class Scene:
    """A batch with its K/V in shuffled pages of a cache; the content of a key is given by row and logical index."""

    rows: list[Row]
    keys: list[Tensor]  # per row [keys, Hkv, D]
    values: list[Tensor]  # per row [keys, Hkv, Dv]
    seed: int
    root_in_prefix: bool = True  # whether a tree node's prefix ends behind the root or before it: both are allowed
    batch: RaggedBatch = field(init=False)
    key_cache: Tensor = field(init=False)  # [S, Hkv, D]
    value_cache: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        need = [-(-row.num_keys // PAGE_SIZE) for row in self.rows]
        pages = list(range(1, sum(need) + 3))
        rng.shuffle(pages)
        self.key_cache = torch.full((len(pages) * PAGE_SIZE + PAGE_SIZE, *self.keys[0].shape[1:]), torch.nan)
        self.value_cache = torch.full((self.key_cache.shape[0], *self.values[0].shape[1:]), torch.nan)
        self.key_cache = self.key_cache.to(self.keys[0].dtype)
        self.value_cache = self.value_cache.to(self.values[0].dtype)
        table = torch.zeros(len(self.rows), max(need), dtype=torch.int32)
        slots, visible, masks, positions, starts = [], [], [], [], [0]
        for index, row in enumerate(self.rows):
            own = [pages.pop() for _ in range(need[index])]
            table[index, : len(own)] = torch.tensor(own, dtype=torch.int32)
            row_slots = torch.tensor([own[k // PAGE_SIZE] * PAGE_SIZE + k % PAGE_SIZE for k in range(row.num_keys)])
            self.key_cache[row_slots] = self.keys[index]
            self.value_cache[row_slots] = self.values[index]
            slots += row_slots[row.context :].tolist()
            for query in range(row.num_queries):
                chain_end = row.context + query + 1
                visible.append(chain_end if query < row.chain - 1 else row.base + self.root_in_prefix)
                masks.append(row.mask(query))
                positions.append(len(row.keys_of(query)) - 1)
            starts.append(len(masks))
        counts = torch.tensor(starts).diff()
        self.batch = RaggedBatch(
            token_ids=torch.zeros(starts[-1], dtype=torch.int64),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            visible=torch.tensor(visible, dtype=torch.int32),
            tree_mask=torch.tensor(masks),
            row_of=torch.repeat_interleave(torch.arange(len(self.rows)), counts).int(),
            row_starts=torch.tensor(starts, dtype=torch.int32),
            tree_base=torch.tensor([row.base for row in self.rows], dtype=torch.int32),
            page_table=table,
            wanted=torch.arange(starts[-1]),
            max_query=int(counts.max()),
            max_keys=max(row.num_keys for row in self.rows),
        )
        self.batch.validate()


def make_content(
    rows: list[Row], spec: AttentionSpec, dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Random keys and values of every row."""
    generator = torch.Generator().manual_seed(seed)

    def content(row: Row, dim: int) -> Tensor:
        return torch.randn(row.num_keys, spec.num_kv_heads, dim, generator=generator).to(dtype)

    return [content(row, spec.key_dim) for row in rows], [content(row, spec.value_dim) for row in rows]


def make_scene(
    rows: list[Row], spec: AttentionSpec, dtype: torch.dtype, seed: int, root_in_prefix: bool = True
) -> Scene:
    return Scene(rows, *make_content(rows, spec, dtype, seed), seed, root_in_prefix)


def make_query(scene: Scene, spec: AttentionSpec, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(scene.batch.num_tokens, spec.num_heads, spec.key_dim, generator=generator).to(dtype)


def attend_one_by_one(scene: Scene, query: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """The definition: for each query the list of its keys, in float64."""
    out = torch.zeros(query.shape[0], spec.num_heads, spec.value_dim, dtype=torch.float64)
    token = 0
    for row, keys, values in zip(scene.rows, scene.keys, scene.values, strict=True):
        group = spec.num_heads // spec.num_kv_heads
        wide_keys = keys.double().repeat_interleave(group, 1)  # [keys, Hq, D]
        wide_values = values.double().repeat_interleave(group, 1)
        for number in range(row.num_queries):
            path = row.keys_of(number)
            newest = len(path) - 1
            seen = [
                key
                for position, key in enumerate(path)
                if key >= spec.first_key and (spec.window is None or newest - position < spec.window)
            ]
            scores = torch.einsum("hd,khd->hk", query[token].double(), wide_keys[seen]) * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
            if scores.shape[1]:
                probs = scores.softmax(1)[:, : len(seen)]
                out[token] = torch.einsum("hk,khd->hd", probs, wide_values[seen])
            token += 1
    return out


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, ...]:
    size = draw(st.sampled_from([1, 1, 2, 5, 17, 33, 64]))
    wide = draw(st.booleans())
    rng = random.Random(draw(st.integers(0, 999)))
    return (-1, *(rng.randrange(node) if wide else rng.randrange(max(0, node - 3), node) for node in range(1, size)))


edges = st.sampled_from([0, 1, 14, 15, 16, 17, 31, 32, 47, 100, 200])
rows_of_batch = st.lists(
    st.builds(Row, edges, st.sampled_from([1, 1, 2, 15, 16, 17, 40]), trees()), min_size=1, max_size=4
)
heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1), (8, 1)])
dims = st.sampled_from([(16, 16), (64, 64), (24, 40), (32, 16), (80, 128), (5, 3)])


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    (num_heads, num_kv_heads), (key_dim, value_dim) = draw(heads), draw(dims)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=key_dim**-0.5,
        window=draw(st.sampled_from([None, None, 1, 5, 16, 40])),
        soft_cap=draw(st.sampled_from([None, None, 2.0, 50.0])),
        first_key=draw(st.sampled_from([0, 0, 1])),
    )


@pytest.fixture(params=sorted(set(BACKENDS) - {"triton"}))  # tests/unit/test_triton.py runs that one's cases
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return load_backend(request.param, CPU, torch.float32)


def sinks_of(spec: AttentionSpec, wanted: bool) -> Tensor | None:
    return torch.linspace(-1, 2, spec.num_heads) if wanted else None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows_of_batch,
    spec=specs(),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    root=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sees_exactly_its_keys(
    backend: AttentionBackend,
    rows: list[Row],
    spec: AttentionSpec,
    sinks: bool,
    dtype: torch.dtype,
    root: bool,
    seed: int,
) -> None:
    scene = make_scene(rows, spec, dtype, seed, root)
    query = make_query(scene, spec, dtype, seed)
    sink_logits = sinks_of(spec, sinks)
    out = backend(query, scene.key_cache, scene.value_cache, scene.batch, spec, sink_logits)
    assert out.dtype == dtype
    expected = attend_one_by_one(scene, query, spec, sink_logits)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_query_may_be_a_view_of_the_fused_projection(backend: AttentionBackend) -> None:
    spec = AttentionSpec(4, 2, 16, 16, 0.25)
    scene = make_scene([Row(20, 3), Row(0, 2, (-1, 0, 0))], spec, torch.float32, 3)
    fused = torch.randn(scene.batch.num_tokens, 8, 16)
    view = fused[:, :4]
    out = backend(view, scene.key_cache, scene.value_cache, scene.batch, spec)
    torch.testing.assert_close(out, backend(view.contiguous(), scene.key_cache, scene.value_cache, scene.batch, spec))


def test_nan_of_one_row_stays_there(backend: AttentionBackend) -> None:
    spec = AttentionSpec(2, 1, 16, 16, 0.25)
    rows = [Row(20, 1), Row(33, 1, (-1, 0, 0, 1))]
    scene = make_scene(rows, spec, torch.float32, 5)
    clean = scene.key_cache.clone(), scene.value_cache.clone()
    slots = scene.batch.slots[:1]
    scene.key_cache[slots] = torch.nan
    scene.value_cache[slots] = torch.nan
    query = make_query(scene, spec, torch.float32, 5)
    out = backend(query, scene.key_cache, scene.value_cache, scene.batch, spec)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:], backend(query, *clean, scene.batch, spec)[1:])


def plain_decode(scene: Scene, row: int, query_number: int, mates: list[Row], chunk: int, spec: AttentionSpec) -> Scene:
    """The query's keys as one plain chain, in other pages and with other mates; the query is the chain's last token."""
    path = scene.rows[row].keys_of(query_number)
    chunk = min(chunk, len(path))
    alone = Row(len(path) - chunk, chunk)
    dtype = scene.keys[row].dtype
    keys, values = make_content(mates, spec, dtype, 77)
    keys, values = [scene.keys[row][path], *keys], [scene.values[row][path], *values]
    return Scene([alone, *mates], keys, values, seed=query_number + 1000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 23, "soft_cap": 20.0},
        {"first_key": 1},
        {"num_heads": 3, "num_kv_heads": 1, "key_dim": 40, "value_dim": 24},
    ],
    ids=["plain", "window and cap", "first key", "odd shape"],
)
def test_a_tree_node_has_the_bits_of_plain_decoding(dtype: torch.dtype, options: dict[str, float]) -> None:
    """Not a tolerance: the text must not depend on drafts, and near ties would flip."""
    spec = AttentionSpec(
        **{"num_heads": 4, "num_kv_heads": 2, "key_dim": 64, "value_dim": 64, "scale": 0.125} | options
    )  # type: ignore[arg-type]
    attend = load_backend("cpu", CPU, dtype)
    rng = random.Random(9)
    parents = (-1, *(rng.randrange(max(0, node - 6), node) for node in range(1, 64)))
    rows = [Row(37, 21, parents), Row(5, 1, parents[:30]), Row(15, 1, tuple(range(-1, 39)))]
    scene = make_scene(rows, spec, dtype, 1)
    query = make_query(scene, spec, dtype, 1)
    sinks = sinks_of(spec, options.get("window") is not None)
    out = attend(query, scene.key_cache, scene.value_cache, scene.batch, spec, sinks)
    token = 0
    for index, row in enumerate(rows):
        for number in range(row.num_queries):
            if number % 4 == 3 or row.num_queries - number < 3:
                mates = [Row(rng.randrange(60), rng.randrange(1, 20), parents[: rng.randrange(1, 9)])] * (number % 3)
                plain = plain_decode(scene, index, number, mates, chunk=rng.choice([1, 1, 2, 7, 30]), spec=spec)
                plain_query = make_query(plain, spec, dtype, 50)
                last = plain.rows[0].num_queries - 1
                plain_query[last] = query[token]
                result = attend(plain_query, plain.key_cache, plain.value_cache, plain.batch, spec, sinks)
                assert torch.equal(out[token], result[last]), (index, number)
            token += 1


def on_threads(count: int, run: Callable[[], Tensor]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        [Row(300, 150), Row(700, 1, (-1, 0, 0, 1, 2)), Row(0, 400)],
        [Row(10_000, 1)],
        [Row(4091, 1, (-1, 0, 1, 2, 3, 4, 0, 6, 7))],  # its nodes stand in two chunks of keys
        [Row(8000, 3), Row(5, 1), Row(600, 1)],
    ],
    ids=["mixed", "one long", "a tree over an edge", "unequal"],
)
def test_threads_do_not_change_bits(rows: list[Row], dtype: torch.dtype) -> None:
    spec = AttentionSpec(6, 3, 64, 64, 0.125)  # three heads for two threads and for four: chunks are shared
    scene = make_scene(rows, spec, dtype, 2)
    query = make_query(scene, spec, dtype, 2)
    attend = load_backend("cpu", CPU, dtype)
    results = [
        on_threads(count, lambda: attend(query, scene.key_cache, scene.value_cache, scene.batch, spec))
        for count in (1, 2, 4, 2)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


CHUNK = 512  # kChunk of models/kernels/attention.h: keys that share a softmax
RANDOM_TREE = (-1, *(random.Random(4).randrange(max(0, node - 5), node) for node in range(1, 64)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 40, "soft_cap": 9.0}, {"window": 700}, {"first_key": 1}], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_of_a_long_context_make_one_softmax(dtype: torch.dtype, options: dict[str, float], threads: int) -> None:
    spec = AttentionSpec(**{"num_heads": 4, "num_kv_heads": 2, "key_dim": 32, "value_dim": 24, "scale": 0.2} | options)  # type: ignore[arg-type]
    rows = [Row(context, 1) for context in (0, CHUNK - 2, CHUNK - 1, CHUNK, 2 * CHUNK + 1, 3 * CHUNK - 1)]
    rows += [Row(CHUNK - 5, 3, RANDOM_TREE), Row(2 * CHUNK - 1, 1, RANDOM_TREE[:9]), Row(CHUNK - 20, 40)]
    scene = make_scene(rows, spec, dtype, 6)
    query, sinks = make_query(scene, spec, dtype, 6), sinks_of(spec, "window" in options)
    attend = load_backend("cpu", CPU, dtype)
    out = on_threads(threads, lambda: attend(query, scene.key_cache, scene.value_cache, scene.batch, spec, sinks))
    expected = attend_one_by_one(scene, query, spec, sinks)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_nodes_beyond_an_edge_of_chunks_have_the_bits_of_plain_decoding(dtype: torch.dtype, threads: int) -> None:
    spec = AttentionSpec(4, 1, 64, 64, 0.125)
    rows = [Row(CHUNK - 7, 2, RANDOM_TREE), Row(2 * CHUNK - 3, 1, RANDOM_TREE[:20]), Row(9 * CHUNK - 30, 40)]
    scene = make_scene(rows, spec, dtype, 8)
    query = make_query(scene, spec, dtype, 8)
    attend = load_backend("cpu", CPU, dtype)
    out = on_threads(threads, lambda: attend(query, scene.key_cache, scene.value_cache, scene.batch, spec))
    for index, first in enumerate(scene.batch.row_starts[:-1].tolist()):
        for number in range(0, rows[index].num_queries, 5):
            plain = plain_decode(scene, index, number, [], chunk=1, spec=spec)
            alone = attend(query[first + number][None], plain.key_cache, plain.value_cache, plain.batch, spec)
            assert torch.equal(out[first + number], alone[0]), (index, number)


def test_long_context_and_prefill_agree_with_the_reference() -> None:
    spec = AttentionSpec(4, 1, 32, 32, 0.2)
    scene = make_scene([Row(5000, 70), Row(3, 300)], spec, torch.float32, 4)
    query = make_query(scene, spec, torch.float32, 4)
    arguments = (query, scene.key_cache.nan_to_num(0), scene.value_cache.nan_to_num(0), scene.batch, spec)
    fast, slow = (load_backend(name, CPU, torch.float32)(*arguments) for name in ("cpu", "reference"))
    torch.testing.assert_close(fast, slow, rtol=2e-5, atol=2e-5)


def test_auto_takes_the_cpu_kernel() -> None:
    assert load_backend("auto", CPU, torch.bfloat16).__module__ == "models.attention.cpu"
    with pytest.raises(ValueError, match="there are: reference, cpu, triton, auto"):
        load_backend("flash", CPU, torch.float32)
