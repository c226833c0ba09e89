"""From logits to tokens: the drawn frequencies, and every parameter at every node of a tree."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding.batcher import Chain, Nodes, build
from decoding.noise import gumbel
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from decoding.verify import node_paths
from models.tree import NO_PARENT, Trees, ancestor_masks
from tests import steps
from tests.steps import ON_CPU

CPU = torch.device("cpu")
VOCAB = 12
EOS = 3
sampling_of = partial(steps.sampling_of, vocab=VOCAB, eos=(EOS,))


def a_sequence(params: SamplingParams, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = ()) -> Sequence:
    sequence = Sequence(GenerateRequest("r", prompt, replace(params, max_tokens=10**5)), 0, params.seed or 0)
    for token in output:
        sequence.append(token)
    return sequence


@pytest.fixture(params=list(ON_CPU))
def ops(request: pytest.FixtureRequest) -> str:
    """Each implementation of the vocabulary-wide operations; the kernels must work where tests run."""
    return str(request.param)


def process(params: SamplingParams, logits: Tensor, output: tuple[int, ...] = (), depth: int = 0) -> Tensor:
    """What the logits [V] of one root become."""
    sequence = a_sequence(params, output=output)
    paths = torch.zeros(1, 0, dtype=torch.int64)
    return sampling_of([sequence]).process(logits[None], torch.tensor([0]), torch.tensor([depth]), paths)[0]


def logits_like(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the distribution ----------------------------------------------------------------------------------------------------

DRAWS = 60_000
GIVEN = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.6),
    SamplingParams(top_k=4),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=0.7, top_k=7, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=1.5, top_k=9, top_p=0.7),
    SamplingParams(temperature=2.0, top_p=0.95, min_p=0.15),
]


def expected_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution by transformers' warpers."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())[0].softmax(dim=0)


@pytest.mark.parametrize("params", GIVEN, ids=str)
def test_chi_square_of_drawn_tokens(params: SamplingParams, ops: str) -> None:
    """One request's draws at many positions: the noise of a position is independent of the others'."""
    logits = logits_like(VOCAB, seed=3).float()
    sampling = sampling_of([a_sequence(replace(params, seed=42))], DRAWS, ops=ops)
    row = torch.zeros(DRAWS, dtype=torch.int64)
    drawn = sampling.draw(logits.expand(DRAWS, VOCAB), row, torch.arange(DRAWS))
    observed = torch.bincount(drawn, minlength=VOCAB).numpy()
    probs = expected_probs(logits, params).double().numpy()
    possible = probs > 0
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible], probs[possible] / probs.sum() * DRAWS).pvalue > 1e-3


def test_chi_square_over_seeds(ops: str) -> None:
    """Many requests at one position."""
    logits, seeds = logits_like(VOCAB, seed=4).float(), 20_000
    sampling = sampling_of([a_sequence(SamplingParams(seed=seed)) for seed in range(seeds)], 0, ops=ops)
    drawn = sampling.draw(logits.expand(seeds, VOCAB), torch.arange(seeds), torch.zeros(seeds, dtype=torch.int64))
    observed = torch.bincount(drawn, minlength=VOCAB).numpy()
    probs = logits.double().softmax(dim=0).numpy()
    assert stats.chisquare(observed, probs / probs.sum() * seeds).pvalue > 1e-3


def test_the_way_out_when_the_filters_drop_every_likely_candidate(ops: str) -> None:
    """In a flat vocabulary with a tiny top-k, the 8 best of x + g are seldom among the k."""
    vocab, draws, k = 300, 4000, 3
    logits = torch.linspace(0.1, 0, vocab)
    sampling = sampling_of([a_sequence(SamplingParams(seed=1, top_k=k))], draws, vocab=vocab, ops=ops)
    row = torch.zeros(draws, dtype=torch.int64)
    drawn = sampling.draw(logits.expand(draws, vocab), row, torch.arange(draws))
    observed = torch.bincount(drawn, minlength=vocab).numpy()
    assert observed[k:].sum() == 0
    probs = logits[:k].double().softmax(dim=0).numpy()
    assert stats.chisquare(observed[:k], probs * draws).pvalue > 1e-3
    keep = torch.arange(vocab) < k
    z = logits + sampling.noise.vectors[sampling.noise_row(row, torch.arange(draws))]
    assert torch.equal(drawn, z.masked_fill(~keep, -torch.inf).argmax(dim=1))


def test_a_mixed_batch_draws_what_each_would_alone(ops: str) -> None:
    every = [*GIVEN, SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, top_k=2, min_p=0.5)]
    sequences = [a_sequence(replace(params, seed=7)) for params in every]
    logits = logits_like(len(every), 8, VOCAB).flatten(0, 1)
    row = torch.arange(len(every)).repeat_interleave(8)
    depth = torch.arange(8).repeat(len(every))
    together = sampling_of(sequences, ops=ops).draw(logits, row, depth).view(-1, 8)
    for number, sequence in enumerate(sequences):
        own = logits.view(-1, 8, VOCAB)[number]
        alone = sampling_of([sequence], ops=ops).draw(own, torch.zeros(8, dtype=torch.int64), torch.arange(8))
        assert torch.equal(together[number], alone)


@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy_takes_the_lowest_id_of_the_best(temperature: float, ops: str) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 7, 9]] = 3.0
    greedy = a_sequence(SamplingParams(temperature=temperature, seed=1))
    zero = torch.tensor([0])
    assert sampling_of([greedy], ops=ops).draw(logits, zero, zero).tolist() == [4]
    mixed = sampling_of([greedy, a_sequence(SamplingParams(seed=1))], ops=ops)
    assert mixed.draw(logits, zero, zero).tolist() == [4]


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_guesses_are_coupled_to_the_draw(tau: float, ops: str) -> None:
    """z = x + T * g: on the scale of logits, its best is the target's own draw."""
    temperature = 0.3
    sampling = sampling_of(
        [a_sequence(SamplingParams(temperature=temperature, seed=5)), a_sequence(SamplingParams(temperature=0.0))],
        ops=ops,
    )
    logits, row, depth = logits_like(4, VOCAB), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    ids, confidence = sampling.guess(logits, row, depth, 3, tau)
    assert torch.equal(ids[:, 0], sampling.draw(logits, row, depth))
    g = torch.empty(2, VOCAB)
    gumbel(g, torch.tensor([5, 5]), torch.tensor([2, 3]), torch.tensor([0, 0]))  # the prompt has two tokens
    z = torch.cat([logits[:2] + temperature * g, logits[2:]])
    assert torch.equal(ids, z.topk(3, dim=1).indices)
    torch.testing.assert_close(confidence, (z / tau).softmax(dim=1).gather(1, ids).float(), rtol=1e-5, atol=1e-7)


def test_guesses_that_the_filters_drop_have_no_chance(ops: str) -> None:
    logits, depth = torch.tensor([[9.0, 8.0, 7.0, *[-9.0] * (VOCAB - 3)]] * 2), torch.tensor([0, 0])
    unfiltered, filtered = SamplingParams(seed=1), SamplingParams(seed=1, top_k=2)
    greedy = SamplingParams(temperature=0.0, top_k=1)
    sampling = sampling_of([a_sequence(filtered), a_sequence(greedy)], ops=ops)
    ids, confidence = sampling.guess(logits, torch.tensor([0, 1]), depth, 3, 1.0)
    assert torch.equal(confidence[0] > 0, ids[0] < 2)
    assert confidence[0].sum() == pytest.approx(1, abs=1e-3), "what is dropped cannot be drawn"
    assert (confidence[1] > 0).all(), "the argmax heeds no filter"
    _, confidence = sampling_of([a_sequence(unfiltered)], ops=ops).guess(logits[:1], depth[:1], depth[:1], 3, 1.0)
    assert (confidence > 0).all()


def test_the_best_guess_is_the_filtered_draw(ops: str) -> None:
    """Among the first 8 of the noisy logits, at least; the logits are flat, so the filters drop many."""
    count = 400
    params = SamplingParams(seed=4, top_k=5, top_p=0.9)
    sampling = sampling_of([a_sequence(params)], count, ops=ops)
    logits, row, depth = logits_like(VOCAB).expand(count, VOCAB) / 4, torch.zeros(count).long(), torch.arange(count)
    drawn = sampling.draw(logits, row, depth)
    ids, confidence = sampling.guess(logits, row, depth, 2, 1.0)
    guessed = confidence[:, 0] > 0
    assert guessed.sum() > 0.9 * count
    assert torch.equal(ids[guessed, 0], drawn[guessed])


def test_a_draft_vocabulary_s_missing_ids_are_guessed_last(ops: str) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, :2] = torch.tensor([1.0, 2.0])
    for params in (SamplingParams(seed=3), SamplingParams(temperature=0.0), SamplingParams(seed=3, top_p=0.9)):
        zero = torch.tensor([0])
        ids, confidence = sampling_of([a_sequence(params)], ops=ops).guess(logits, zero, zero, 4, 1.0)
        assert set(ids[0, :2].tolist()) == {0, 1}
        assert torch.isfinite(confidence).all()
        assert not confidence[0, 2:].any()


# bias, bans, penalties at the root -----------------------------------------------------------------------------------


def test_ids_beyond_the_tokenizer_are_never_drawn(ops: str) -> None:
    logits = torch.zeros(5, VOCAB + 4)
    logits[:, VOCAB:] = 1e4
    row, depth = torch.zeros(5, dtype=torch.int64), torch.arange(5)
    for params in (SamplingParams(seed=1), SamplingParams(temperature=0.0), SamplingParams(seed=1, top_k=3)):
        sampling = sampling_of([a_sequence(params)], ops=ops)
        x = sampling.process(logits, row, depth, None)
        assert x.shape == (5, VOCAB)
        assert (sampling.draw(x, row, depth) < VOCAB).all()


def test_neutral_parameters_change_nothing() -> None:
    logits = logits_like(VOCAB)
    assert torch.equal(process(SamplingParams(), logits, (4, 4)), logits)


def test_logit_bias_is_added() -> None:
    logits = logits_like(VOCAB)
    changed = process(SamplingParams(logit_bias={0: -100.0, 11: 2.5}), logits) - logits
    assert changed.tolist() == pytest.approx([-100.0, *[0.0] * 10, 2.5])


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_as_in_transformers(penalty: float) -> None:
    logits, prompt, output = logits_like(VOCAB), (1, 2, 2), (5, 9, 5)
    ids = torch.tensor([[*prompt, *output]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
    sequence = a_sequence(SamplingParams(repetition_penalty=penalty), prompt, output)
    paths = torch.zeros(1, 0, dtype=torch.int64)
    zero = torch.tensor([0])
    torch.testing.assert_close(sampling_of([sequence]).process(logits[None], zero, zero, paths)[0], expected)
    assert (expected != logits).sum() == 4


def test_presence_and_frequency_count_the_output_only() -> None:
    """OpenAI: mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence."""
    logits, output = logits_like(VOCAB), (5, 9, 5, 2)
    counts = torch.tensor([float(output.count(token)) for token in range(VOCAB)])
    expected = logits - 0.7 * counts - 1.25 * (counts > 0)
    params = SamplingParams(presence_penalty=1.25, frequency_penalty=0.7)
    torch.testing.assert_close(process(params, logits, output), expected)
    assert process(params, logits, output)[1] == logits[1], "the prompt does not count"


def test_bias_comes_before_penalties() -> None:
    logits = torch.full((VOCAB,), -1.0, dtype=torch.float64)
    params = SamplingParams(logit_bias={5: 3.0, 6: 3.0}, repetition_penalty=2.0, presence_penalty=0.25)
    x = process(params, logits, (5,))
    assert x[5] == (-1 + 3) / 2 - 0.25  # penalised first, it would be -2 - 0.25 + 3
    assert x[6] == 2
    assert x[2] == -2  # in the prompt


def test_min_tokens_bans_every_end_until_the_count_is_reached() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(7,))
    logits = logits_like(VOCAB)
    for generated in range(5):
        for depth in range(4):
            x = process(params, logits, (1,) * generated, depth)
            banned = (x == -torch.inf).nonzero().flatten().tolist()
            assert banned == ([EOS, 7] if generated + depth < 3 else [])


def test_min_tokens_of_another_row_bans_nothing_here() -> None:
    rows = [a_sequence(SamplingParams(min_tokens=3)), a_sequence(SamplingParams(stop_token_ids=(7,)))]
    x = sampling_of(rows).process(logits_like(2, VOCAB), torch.tensor([0, 1]), torch.tensor([0, 0]), None)
    assert (x == -torch.inf).sum(dim=1).tolist() == [1, 0]


# at the nodes of trees -----------------------------------------------------------------------------------------------


def nodes_of(sequences: list[Sequence], trees: Trees) -> tuple[Nodes, int]:
    counts = (1 + (trees.parents != NO_PARENT).sum(dim=1)).tolist()
    pages = [list(range(100 * i, 100 * i + 9)) for i in range(len(sequences))]
    chains = [Chain(s.tokens[-1:], s.length - 1, p) for s, p in zip(sequences, pages, strict=True)]
    _, nodes = build(chains, trees, ancestor_masks(trees.parents), counts)
    return nodes, int(nodes.depth.max())


@st.composite
def tree_rows(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(parent, token) of each node below the root."""
    nodes: list[tuple[int, int]] = []
    for place, token in draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, VOCAB - 1)), max_size=10)):
        parent = place % (1 + len(nodes))
        if (parent, token) not in nodes:
            nodes.append((parent, token))
    return nodes


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.4, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.6, -0.5]),
    logit_bias=st.sampled_from([{}, {4: 2.0, 5: -3.0}]),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.sampled_from([(), (6, 7)]),
    allowed_token_ids=st.sampled_from([(), (0, 3, 5, 6, 9)]),
    bad_words=st.sampled_from([(), ((6,), (4, 5), (2, 2, 4))]),
    seed=st.integers(0, 2**64 - 1),
)
row = st.tuples(parameters, tree_rows(), st.lists(st.integers(0, VOCAB - 1), max_size=5).map(tuple))


@given(st.lists(row, min_size=1, max_size=4), st.sampled_from(list(ON_CPU)))
@settings(max_examples=60, deadline=None)
def test_every_node_is_processed_as_if_its_path_were_text(
    batch: list[tuple[SamplingParams, list[tuple[int, int]], tuple[int, ...]]], ops: str
) -> None:
    sequences = [a_sequence(params, output=output) for params, _, output in batch]
    width = 1 + max(len(tree) for _, tree, _ in batch)
    tokens, parents = torch.full((len(batch), width), -1), torch.full((len(batch), width), NO_PARENT)
    for r, ((_, tree, _), sequence) in enumerate(zip(batch, sequences, strict=True)):
        tokens[r, 0] = int(sequence.tokens[-1])
        for column, (parent, token) in enumerate(tree, start=1):
            parents[r, column], tokens[r, column] = parent, token
    trees = Trees(tokens, parents, torch.ones(parents.shape), torch.zeros_like(parents))
    nodes, deepest = nodes_of(sequences, trees)
    logits = logits_like(len(nodes.row), VOCAB + 3)

    sampling = sampling_of(sequences, 12, ops=ops)
    paths = node_paths(trees, nodes, deepest)
    x = sampling.process(logits, nodes.row, nodes.depth, paths)
    drawn = sampling.draw(x, nodes.row, nodes.depth)

    for packed, (r, column) in enumerate(zip(nodes.row.tolist(), nodes.column.tolist(), strict=True)):
        params, tree, output = batch[r]
        path: list[int] = []
        while column:
            column, token = tree[column - 1]
            path.insert(0, token)
        assert paths[packed].tolist() == path + [-1] * (deepest - len(path))
        alone = sampling_of([a_sequence(params, output=(*output, *path))], 0, ops=ops)
        zero, no_path = torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64)
        expected = alone.process(logits[packed : packed + 1], zero, zero, no_path)
        assert torch.equal(x[packed : packed + 1], expected)
        assert torch.equal(drawn[packed : packed + 1], alone.draw(expected, zero, zero))


def test_the_noise_of_a_node_is_that_of_its_position(ops: str) -> None:
    sequence = a_sequence(SamplingParams(seed=9))
    logits, zero = logits_like(1, VOCAB), torch.tensor([0])
    ahead = sampling_of([sequence], ops=ops).guess(logits, zero, torch.tensor([2]), VOCAB, 1.0)
    sequence.append(0)
    sequence.append(0)
    there = sampling_of([sequence], ops=ops).guess(logits, zero, zero, VOCAB, 1.0)
    assert torch.equal(ahead[0], there[0])
    assert torch.equal(ahead[1], there[1])


# a draft vocabulary --------------------------------------------------------------------------------------------------

DRAFT_IDS = (0, 2, 3, 5, 6, 10, VOCAB, VOCAB + 1)  # the last two are padding of the target's vocabulary


@given(st.lists(row, min_size=1, max_size=4), st.integers(1, 4), st.sampled_from(list(ON_CPU)))
@settings(max_examples=80, deadline=None)
def test_a_draft_vocabulary_is_the_whole_one_with_the_rest_impossible(
    batch: list[tuple[SamplingParams, list[tuple[int, int]], tuple[int, ...]]], depth: int, ops: str
) -> None:
    """Bias, bans, penalties, filters and noise of columns that stand for other ids."""
    sampling = sampling_of([a_sequence(params, output=output) for params, _, output in batch], depth, ops=ops)
    ids = torch.tensor(DRAFT_IDS)
    rows = torch.arange(len(batch)).repeat_interleave(3)
    depths = torch.full_like(rows, depth)
    generator = torch.Generator().manual_seed(depth)
    paths = torch.randint(0, VOCAB, (len(rows), depth), generator=generator)
    small = logits_like(len(rows), len(ids))
    whole = torch.full((len(rows), VOCAB + 2), -torch.inf, dtype=torch.float64)
    whole[:, ids] = small

    x = sampling.process(small, rows, depths, paths, ids)
    expected = sampling.process(whole, rows, depths, paths)
    possible = ids < VOCAB
    assert torch.equal(x[:, possible], expected[:, ids[possible]])
    assert (x[:, ~possible] == -torch.inf).all()

    for k in (1, 3, 6):
        tokens, confidence = sampling.guess(x, rows, depths, k, 1.3, ids)
        theirs, chance = sampling.guess(expected, rows, depths, k, 1.3)
        torch.testing.assert_close(confidence, chance)
        assert torch.equal(tokens[confidence > 0], theirs[chance > 0])
        assert (tokens[confidence > 0] < VOCAB).all()
