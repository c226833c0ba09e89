"""The retrieval drafter: its kernel against its definition, its trees, and what it is good at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import datastore
from decoding.assemble import build_drafters, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.datastore.build import Chunk, write
from decoding.datastore.layout import Datastore, Vocabulary
from decoding.drafters import DrafterChoice
from decoding.drafters.base import DrafterContext
from decoding.drafters.retrieval import RetrievalDrafter, RetrievalOptions, load_retrieval_drafter
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models import kernels
from models.tree import Trees
from server.cli import main
from tests.datastore import stored
from tests.engines import ROOT, demo_tokenizer, run

IDS = 7
WHOLE = RowQuota(63, 63, frozenset(["retrieval"]))
CONTEXT = DrafterContext(
    name="retrieval",
    bit=3,
    target=cast(Any, SimpleNamespace(vocab_size=IDS)),
    tokenizer=cast(Any, None),
    dtype=torch.float32,
    device=torch.device("cpu"),
    attention="auto",
    max_model_len=4096,
    max_step_tokens=64,
)


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    assert kernels.load(), "the kernels must work where tests run"


def drafter_of(store: Datastore, options: RetrievalOptions | None = None, ids: int = IDS) -> RetrievalDrafter:
    context = replace(CONTEXT, target=cast(Any, SimpleNamespace(vocab_size=ids)))
    return RetrievalDrafter(options or RetrievalOptions(""), context, store)


def propose(
    drafter: RetrievalDrafter, texts: list[list[int]], limits: list[RowQuota] | None = None
) -> tuple[Trees | None, Trees | None]:
    """(what the kernel proposes, what the definition does)."""
    sequences = [
        Sequence(GenerateRequest(str(number), tuple(text), SamplingParams(max_tokens=1)), 0, 1)
        for number, text in enumerate(texts)
    ]
    rows = tuple(PlannedRow(sequence, sequence.length - 1, 1) for sequence in sequences)
    plan, quota = Plan(rows, rows), Quota(tuple(limits or [WHOLE] * len(rows)))
    return drafter.propose(plan, quota, cast(Any, None)), drafter.search_anywhere(plan, quota)


def nodes_of(trees: Trees | None, row: int = 0) -> dict[tuple[int, ...], float]:
    """Path of tokens -> confidence."""
    if trees is None:
        return {}
    paths: dict[int, tuple[int, ...]] = {0: ()}
    found = {}
    parents, tokens = trees.parents[row].tolist(), trees.tokens[row].tolist()
    for column in range(1, trees.width):
        if parents[column] >= 0:
            paths[column] = (*paths[parents[column]], tokens[column])
            found[paths[column]] = float(trees.confidence[row, column])
    return found


def tree(drafter: RetrievalDrafter, text: list[int], limit: RowQuota = WHOLE) -> dict[tuple[int, ...], float]:
    return nodes_of(propose(drafter, [text], [limit])[0])


# kernel and definition -----------------------------------------------------------------------------------------------

ids = st.integers(0, IDS - 1)
tokens = st.one_of(st.lists(ids, min_size=1, max_size=40), st.lists(st.integers(0, 1), min_size=1, max_size=40))
quotas = st.builds(
    RowQuota,
    nodes=st.sampled_from([0, 1, 5, 63]),
    depth=st.sampled_from([0, 1, 4, 63]),
    drafters=st.sampled_from([frozenset(["retrieval"]), frozenset(["retrieval", "x"]), frozenset()]),
)


@settings(max_examples=300, deadline=None)
@given(
    documents=st.lists(tokens, min_size=1, max_size=4),
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, IDS + 1), min_size=1, max_size=20), quotas), min_size=1, max_size=3
    ),
    lengths=st.tuples(st.integers(1, 16), st.integers(1, 16)).map(sorted),
    max_matches=st.sampled_from([1, 3, 256]),
    backoff=st.integers(0, 3),
    depth=st.integers(1, 12),
    kinds=st.tuples(st.sampled_from(["<u2", "<u4"]), st.sampled_from(["<i4", "<i8"])),
    known=st.sampled_from([IDS, IDS - 2]),
)
def test_the_kernel_finds_what_the_definition_finds(
    documents: list[list[int]],
    rows: list[tuple[list[int], RowQuota]],
    lengths: list[int],
    max_matches: int,
    backoff: int,
    depth: int,
    kinds: tuple[str, str],
    known: int,
) -> None:
    options = RetrievalOptions("", lengths[1], lengths[0], max_matches, backoff, depth)
    drafter = drafter_of(stored(documents, IDS, *kinds), options, known)
    trees, expected = propose(drafter, [text for text, _ in rows], [limit for _, limit in rows])
    assert (trees is None) == (expected is None)
    if trees is not None and expected is not None:
        trees.validate()
        for name in ("tokens", "parents", "confidence", "source"):
            assert torch.equal(getattr(trees, name), getattr(expected, name)), name


@settings(max_examples=100, deadline=None)
@given(garbage=st.binary(min_size=40, max_size=40), text=st.lists(ids, min_size=1, max_size=6))
def test_a_damaged_datastore_makes_bad_trees_and_no_crash(garbage: bytes, text: list[int]) -> None:
    sound = stored([[1, 2, 3, 1, 2]], IDS)
    spoilt = np.frombuffer(garbage, "<i4").copy()[: len(sound.suffixes)]
    store = replace(sound, suffixes=spoilt, starts=np.resize(spoilt.astype("<i8"), len(sound.starts)))
    for trees in propose(drafter_of(store), [text]):
        if trees is not None:
            trees.validate()


# trees ---------------------------------------------------------------------------------------------------------------


def test_confidence_is_the_share_of_the_matches_less_a_doubt() -> None:
    store = stored([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6]], IDS)
    found = tree(drafter_of(store), [0, 1, 2])
    assert set(found) == {(3,), (6,), (3, 4), (3, 5)}
    assert 0 < found[3,] < 2 / 3
    assert found[6,] == pytest.approx(found[3,] / 2)
    assert found[3, 4] == found[3, 5] < 1 / 2


def test_many_matches_and_long_ones_are_surer_than_one_short_one() -> None:
    once, often = stored([[1, 2, 3]], IDS), stored([[1, 2, 3]] * 50, IDS)
    short = tree(drafter_of(once), [2])[3,]
    long = tree(drafter_of(once), [1, 2])[3,]
    many = tree(drafter_of(often), [2])[3,]
    assert short < long < many < 1


def test_the_longest_match_decides_and_shorter_ones_add() -> None:
    store = stored([[1, 2, 3], [5, 2, 4], [6, 2, 4]], IDS)
    alone = drafter_of(store, RetrievalOptions("", backoff=0))
    assert list(tree(alone, [1, 2])) == [(3,)]
    assert set(tree(alone, [0, 2])) == {(3,), (4,)}
    assert set(tree(drafter_of(store, RetrievalOptions("", max_match=1)), [1, 2])) == {(3,), (4,)}
    both = tree(drafter_of(store), [1, 2])
    assert list(both) == [(3,), (4,)]
    assert tree(alone, [1, 2])[3,] < both[3,] < 1, "what both say is surer"
    assert both[3,] + both[4,] < 1
    assert not tree(drafter_of(store, RetrievalOptions("", min_match=2)), [0, 2])
    assert list(tree(drafter_of(store, RetrievalOptions("", min_match=2)), [1, 2])) == [(3,)]


def test_shorter_matches_are_not_asked_where_the_longest_has_enough() -> None:
    store = stored([[1, 2, 3]] * 4 + [[2, 4]], IDS)
    assert set(tree(drafter_of(store, RetrievalOptions("", max_matches=5)), [1, 2])) == {(3,), (4,)}
    assert set(tree(drafter_of(store, RetrievalOptions("", max_matches=4)), [1, 2])) == {(3,)}


def test_trees_end_with_documents_and_limits() -> None:
    texts = [[1, 2, 3, 4, 5, 6]] * 50
    drafter = drafter_of(stored([*texts, [0]], IDS))
    assert max(map(len, tree(drafter, [1]))) == 5
    assert not tree(drafter, [6]), "the documents end here"
    assert len(tree(drafter, [1], replace(WHOLE, depth=2))) == 2
    assert len(tree(drafter, [1], replace(WHOLE, nodes=3))) == 3
    assert not tree(drafter, [1], replace(WHOLE, drafters=frozenset(["ngram"])))
    assert max(map(len, tree(drafter_of(stored(texts, IDS), RetrievalOptions("", depth=3)), [1]))) == 3
    assert max(map(len, tree(drafter_of(stored(texts, IDS), ids=5), [1]))) == 3, "the target has no tokens 5 and 6"


def test_of_many_matches_some_are_looked_at_evenly() -> None:
    documents = [[1, 2 + number % 4] for number in range(400)]
    drafter = drafter_of(stored(documents, IDS), RetrievalOptions("", max_matches=20))
    found = tree(drafter, [1])
    assert set(found) == {(2,), (3,), (4,), (5,)}
    assert 0.1 < min(found.values()) == max(found.values()) < 5 / 20


def test_the_most_probable_nodes_come_first_and_improbable_ones_not_at_all() -> None:
    documents = [[1, 2, 3]] * 6 + [[1, 4, 5]] * 3 + [[1, 6]]
    found = tree(drafter_of(stored(documents * 20, IDS)), [1], replace(WHOLE, nodes=3))
    assert list(found) == [(2,), (2, 3), (4,)]
    rare = stored([[1, 2]] * 199 + [[1, 3]], IDS)
    assert set(tree(drafter_of(rare), [1])) == {(2,)}


# with the demo target ------------------------------------------------------------------------------------------------


def engine_with(*speculate: str) -> Engine:
    config = EngineConfig(f"{ROOT}/demo/target", dtype="float32", num_pages=200, speculate=speculate, plan="fixed")
    loaded = load_target(config)
    return Engine(config, loaded, build_stepper(config, loaded, build_drafters(config, loaded)))


def requests(count: int, max_tokens: int) -> list[GenerateRequest]:
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[:count]
    prompts = [tuple(demo_tokenizer().encode(json.loads(line)["prompt"])) for line in lines]
    params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    return [GenerateRequest(f"r{number}", prompt, params) for number, prompt in enumerate(prompts)]


def test_of_texts_that_are_in_the_datastore_nearly_all_is_accepted(tmp_path: Path) -> None:
    asked = requests(4, 64)
    plain = run(engine_with(), asked)
    lines = tmp_path / "answers.jsonl"
    texts = [(*request.prompt_ids, *plain[request.request_id, 0].tokens) for request in asked]
    lines.write_text("".join(json.dumps({"token_ids": list(text)}) + "\n" for text in texts))
    path = tmp_path / "answers.datastore"
    assert main(["datastore", "build", str(lines), "--tokenizer", f"{ROOT}/demo/target", "--out", str(path)]) == 0
    outcomes = run(engine_with(f"retrieval={path}"), asked)
    for request in asked:
        outcome = outcomes[request.request_id, 0]
        assert outcome.tokens == plain[request.request_id, 0].tokens
        stats = outcome.last.speculation
        assert stats is not None
        assert stats.accepted / stats.steps > 6, "of 8 that a tree is deep"


# settings that cannot work -------------------------------------------------------------------------------------------


def test_a_datastore_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write(path, [Chunk(np.array([1]))], Vocabulary("llama", 9, "other"))
    context = replace(CONTEXT, tokenizer=demo_tokenizer())
    with pytest.raises(ModelError, match=r"built for another tokenizer \(llama, 9 ids; the model's has \d+\)"):
        load_retrieval_drafter(RetrievalOptions(str(path)), context)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("max_match=0", "1 <= min_match <= max_match <= 64"),
        ("min_match=17", "1 <= min_match <= max_match <= 64"),
        ("max_match=65", "1 <= min_match <= max_match <= 64"),
        ("depth=0", "depth must be from 1 to 63, not 0"),
        ("depth=64", "depth must be from 1 to 63, not 64"),
        ("max_matches=0", "max_matches must be from 1"),
        ("backoff=4", "backoff must be from 0 to 3, not 4"),
    ],
)
def test_options_that_cannot_work(options: str, part: str) -> None:
    choice = DrafterChoice.parse(f"retrieval=/no/such/file:{options}")
    with pytest.raises(ConfigError, match=part):
        choice.build(CONTEXT)


def test_a_path_is_needed_and_must_be_there() -> None:
    with pytest.raises(ConfigError, match="--speculate retrieval=PATH"):
        DrafterChoice.parse("retrieval")
    with pytest.raises(ModelError, match="there is no datastore /no/such/file"):
        DrafterChoice.parse("retrieval=/no/such/file").build(CONTEXT)


def test_the_benchmark_measures(tmp_path: Path) -> None:
    path = tmp_path / "store"
    header = datastore.build(path, 200_000, demo_tokenizer())
    assert header.file_bytes > 200_000
    found = datastore.measure(path, searches=5)
    assert found["resident MiB before"] > 0
    assert {"open ms", "us a search, known text, again", "us a search, new text, first"} <= set(found)
