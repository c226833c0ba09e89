"""The scheduler's order: budget, queue, preemption, siblings; and that every workload ends."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.cache import SequenceCache, pages_for
from decoding.plan import Plan
from decoding.prefix_cache import PrefixCache, PrefixHit
from decoding.request import GenerateRequest, SamplingParams
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from models.batch import PAGE_SIZE
from models.kv_cache import KVCache, KVSpec
from tests.engines import VOCAB, make_engine, run, tiny_decoder

CPU = torch.device("cpu")


class CountedPrefixes(PrefixCache):
    """Counts how often a text is looked up."""

    looked_up = 0

    def match(self, token_ids: np.ndarray, salt: str) -> PrefixHit:
        self.looked_up += 1
        return super().match(token_ids, salt)


class Bench:
    """A scheduler over real pages; ``step`` does what a forward pass and a commit of one token per row would."""

    def __init__(
        self, *, pages: int = 100, budget: int = 1000, max_num_seqs: int = 8, prefix_caching: bool = True
    ) -> None:
        kv = KVCache(KVSpec(1, 1, 1, 1), pages, torch.float32, CPU)
        self.prefixes = CountedPrefixes(pages, enabled=prefix_caching)
        self.cache = SequenceCache(kv, self.prefixes, lambda bit, sequence: 0, ())
        self.admitted: list[str] = []
        self.preempted: list[str] = []
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=max_num_seqs,
            max_step_tokens=budget,
            num_pages=pages,
            on_admit=lambda sequence, flags: self.admitted.append(name(sequence)),
            on_preempt=lambda sequence: self.preempted.append(name(sequence)),
        )
        self.budget = budget
        self.sequences: list[Sequence] = []
        self.finished: list[str] = []

    def add(self, request_id: str, prompt: int | tuple[int, ...], max_tokens: int = 50, n: int = 1) -> None:
        """Queue a request whose prompt is given, or of a length and like no other."""
        tokens = prompt if isinstance(prompt, tuple) else (len(self.sequences), *[1] * (prompt - 1))
        request = GenerateRequest(request_id, tokens, SamplingParams(max_tokens, n=n))
        for choice in range(n):
            sequence = Sequence(request, choice, 0)
            self.sequences.append(sequence)
            self.scheduler.add(sequence)

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        assert plan.chain_tokens <= self.budget
        assert plan.rows[: len(plan.deciding)] == plan.deciding
        assert not any(row.decides for row in plan.rows[len(plan.deciding) :])
        for row in plan.rows:
            sequence = row.sequence
            assert row.start == sequence.cached
            assert sequence in self.scheduler.running
            assert len(sequence.pages) >= pages_for(row.end), "every query token has a slot"
            sequence.cached = row.end
            if row.decides:
                sequence.append(len(sequence.tokens) % VOCAB)
                sequence.started = True
            self.cache.register(sequence)
            if sequence.length == sequence.limit:
                self.finished.append(name(sequence))
                self.scheduler.remove(sequence)
                self.sequences.remove(sequence)
        self.cache.check(self.sequences)
        return plan


def name(sequence: Sequence) -> str:
    request_id, choice = sequence.id
    return f"{request_id}{choice or ''}"


def lengths(plan: Plan) -> dict[str, int]:
    return {name(row.sequence): row.length for row in plan.rows}


def test_the_budget_cuts_prompts_into_chunks() -> None:
    bench = Bench(budget=40)
    bench.add("a", 100)
    assert [lengths(bench.step()) for _ in range(4)] == [{"a": 40}, {"a": 40}, {"a": 20}, {"a": 1}]


def test_rows_that_draw_come_before_chunks_of_prompts() -> None:
    bench = Bench(budget=10)
    bench.add("long", 95)
    bench.add("b", 1)
    bench.add("c", 1)
    assert lengths(bench.step()) == {"b": 1, "c": 1, "long": 8}
    for _ in range(10):
        plan = bench.step()
        assert lengths(plan) == {"b": 1, "c": 1, "long": 8}, "the long prompt stalls nobody"
        assert [name(row.sequence) for row in plan.deciding] == ["b", "c"]


def test_the_queue_is_first_come_first_served() -> None:
    bench = Bench(max_num_seqs=2)
    for request_id in "abcd":
        bench.add(request_id, 5, max_tokens=3)
    while bench.sequences:
        bench.step()
    assert bench.admitted == bench.finished == ["a", "b", "c", "d"]


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    bench = Bench(pages=10)
    bench.add("a", 6 * PAGE_SIZE, max_tokens=5)
    bench.add("large", 8 * PAGE_SIZE, max_tokens=5)
    bench.add("small", 3, max_tokens=5)
    bench.step()
    assert bench.admitted == ["a"]
    while bench.sequences:
        bench.step()
    assert bench.admitted == ["a", "large", "small"]


def test_who_waits_for_room_is_not_looked_up_in_every_step() -> None:
    bench = Bench(pages=12)
    bench.add("a", 2 * PAGE_SIZE, max_tokens=40)
    bench.add("b", 2 * PAGE_SIZE, max_tokens=20)
    bench.step()
    bench.add("large", 9 * PAGE_SIZE, max_tokens=5)
    looked_up = []
    while bench.sequences:
        before = bench.prefixes.looked_up
        bench.step()
        looked_up.append(bench.prefixes.looked_up - before)
    assert bench.admitted == ["a", "b", "large"]
    assert looked_up[0] == 1, "there is no room"
    assert sum(looked_up) == 3, "again when b has left, and when a has"
    assert looked_up.index(1, 1) == 19, "at once: b wrote its first token before"


def test_who_waits_for_room_is_let_in_when_others_have_computed_its_prompt() -> None:
    """Nothing comes free, but less is needed."""
    shared = tuple(number % VOCAB for number in range(6 * PAGE_SIZE))
    bench = Bench(pages=11, budget=PAGE_SIZE)
    bench.add("first", (*shared, 1), max_tokens=40)
    bench.step()
    bench.add("second", (*shared, 2), max_tokens=3)
    admitted_at = None
    for step in range(20):
        bench.step()
        if admitted_at is None and "second" in bench.admitted:
            admitted_at = step
    assert admitted_at is not None
    assert admitted_at <= 6, "as soon as the pages are there"
    assert "first" not in bench.finished


def test_a_waiting_request_gets_in_when_nobody_runs_any_more() -> None:
    """The watermark is kept for others only: there need be no page more than when it was turned away."""
    bench = Bench(pages=5)
    bench.add("a", PAGE_SIZE - 2, max_tokens=40)
    bench.add("b", 4 * PAGE_SIZE, max_tokens=PAGE_SIZE)
    while bench.sequences:
        bench.step()
    assert bench.finished == ["a", "b"]


def test_admission_leaves_room_to_grow() -> None:
    bench = Bench(pages=4)
    bench.add("a", 2 * PAGE_SIZE)
    bench.add("b", 2 * PAGE_SIZE)
    bench.step()
    assert bench.admitted == ["a"], "the last pages are kept free, or b would be preempted at once"


def test_the_youngest_gives_way_and_is_the_next_to_return() -> None:
    bench = Bench(pages=7)
    for request_id in "abc":
        bench.add(request_id, 2 * PAGE_SIZE - 2, max_tokens=PAGE_SIZE + 2)
    bench.add("d", 2, max_tokens=2)
    for _ in range(6):
        bench.step()
    # each needs a third page after 3 tokens, and there is one to spare, which is not enough for d to come in
    assert bench.preempted == ["c"]
    assert [name(sequence) for sequence in bench.scheduler.waiting] == ["c", "d"]
    assert [name(sequence) for sequence in bench.scheduler.running] == ["a", "b"]
    while bench.sequences:
        bench.step()
    assert bench.admitted == ["a", "b", "c", "c", "d"]
    assert bench.finished[:2] == ["a", "b"]
    assert bench.scheduler.preemptions == len(bench.preempted)


def test_preemption_in_the_middle_of_a_prompt() -> None:
    """The pages of a young row that has not begun, or is half way, go to the old one."""
    bench = Bench(pages=3, budget=4)
    bench.add("old", PAGE_SIZE, max_tokens=PAGE_SIZE + 1)
    bench.add("young", 1, max_tokens=20)
    for _ in range(60):
        if not bench.sequences:
            break
        bench.step()  # checks the plan
    assert not bench.sequences
    assert "young" in bench.preempted


def test_siblings_wait_for_the_prompt_and_share_it() -> None:
    bench = Bench(budget=4 * PAGE_SIZE)
    bench.add("a", 5 * PAGE_SIZE, n=3)
    bench.add("other", 1)
    assert lengths(bench.step()) == {"other": 1, "a": 4 * PAGE_SIZE - 1}
    while bench.admitted == ["a", "other"]:
        plan = bench.step()
    # the last token of the prompt is computed again, in a page of one's own
    assert bench.admitted == ["a", "other", "a1", "a2"]
    assert lengths(plan)["a1"] == lengths(plan)["a2"] == PAGE_SIZE
    first, second, third = (sequence for sequence in bench.sequences if sequence.id[0] == "a")
    assert first.pages[:4] == second.pages[:4] == third.pages[:4]
    assert len({first.pages[4], second.pages[4], third.pages[4]}) == 3


def test_siblings_of_a_prompt_without_a_full_page_to_share_do_not_wait() -> None:
    bench = Bench()
    bench.add("a", PAGE_SIZE, n=3)
    assert lengths(bench.step()) == {"a": PAGE_SIZE, "a1": PAGE_SIZE, "a2": PAGE_SIZE}


def test_siblings_follow_when_the_first_choice_is_cancelled() -> None:
    bench = Bench(budget=PAGE_SIZE)
    bench.add("a", 5 * PAGE_SIZE, n=2)
    bench.step()
    bench.scheduler.remove(bench.sequences.pop(0))
    assert lengths(bench.step()) == {"a1": PAGE_SIZE}
    assert bench.sequences[0].cached == 2 * PAGE_SIZE, "what the first had computed is found"


def test_without_a_prefix_cache_siblings_do_not_wait() -> None:
    bench = Bench(prefix_caching=False)
    bench.add("a", 40, n=2)
    assert lengths(bench.step()) == {"a": 40, "a1": 40}


def test_removing_frees_pages_wherever_the_sequence_is() -> None:
    bench = Bench(budget=20, max_num_seqs=2)
    for request_id in "abc":
        bench.add(request_id, 30)
    bench.step()
    for sequence in list(bench.sequences):  # one has its prompt half done, one has not begun, one waits
        bench.scheduler.remove(sequence)
        bench.sequences.remove(sequence)
        bench.cache.check(bench.sequences)
    assert bench.cache.num_available == 100
    assert bench.scheduler.plan().rows == ()


jobs = st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 3), st.booleans())


@given(
    jobs=st.lists(jobs, min_size=1, max_size=8),
    spare=st.sampled_from([0, 1, 4]),
    budget=st.sampled_from([1, 2, 7, 64]),
    seats=st.integers(1, 5),
    caching=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_workload_ends(
    jobs: list[tuple[int, int, int, bool]], spare: int, budget: int, seats: int, caching: bool
) -> None:
    """However small the pool: the oldest always advances, so there is neither starvation nor ping-pong for ever."""
    pages = max(pages_for(prompt + tokens) for prompt, tokens, _, _ in jobs) + spare
    bench = Bench(pages=pages, budget=budget, max_num_seqs=seats, prefix_caching=caching)
    for number, (prompt, tokens, n, shared) in enumerate(jobs):
        bench.add(f"r{number}.", (1,) * prompt if shared else prompt, tokens, n)
    work = sum((prompt + tokens) * n for prompt, tokens, n, _ in jobs)
    for _ in range(4 * work):  # some of it is done twice after a preemption
        if not bench.sequences:
            break
        oldest = bench.scheduler.running[:1]
        assert bench.step().rows, "a step does something"
        assert bench.finished or oldest in ([], bench.scheduler.running[:1]), "the oldest never gives way"
        bench.finished.clear()
    assert not bench.sequences
    assert bench.cache.num_available == pages


def test_an_engine_with_a_tiny_pool_ends_and_balances() -> None:
    """The same on a real engine: ``run`` checks the pool after every step."""
    engine = make_engine(tiny_decoder(torch.float32), num_pages=5, max_num_batched_tokens=9, max_num_seqs=4)
    requests = [
        GenerateRequest(
            f"r{number}",
            tuple((number * 7 + i) % VOCAB for i in range(1 + 11 * number % 40)),
            SamplingParams(max_tokens=5 + 13 * number % 30, seed=number, n=1 + number % 2, ignore_eos=True),
        )
        for number in range(8)
    ]
    outcomes = run(engine, requests)
    assert all(len(outcomes[r.request_id, 0].tokens) == r.params.max_tokens for r in requests)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total == 5
