"""Lookahead's windows and pools: the kernel against its definition, as texts grow and windows are verified or not."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from decoding.drafters.lookahead_states import Draws, FusedStates, PlainStates, WindowRules, Wish
from decoding.drafters.ngram_pool import MAX_KEYS
from models import kernels
from models.tree import GUESSED, NO_PARENT, PINS, Trees, ancestor_masks

BIT = 3


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """The kernels must work where tests run."""
    kernels.required()


@dataclass
class Twins:
    """Both, told and asked the same; every answer is compared."""

    rules: WindowRules
    luck: random.Random
    words: int
    texts: dict[int, list[int]] = field(default_factory=dict)  # by number

    def __post_init__(self) -> None:
        self.both = PlainStates(self.rules), FusedStates(self.rules)
        self.draws: Draws | None = None  # to be learned in the next step
        self.windows = 0
        self.guesses = 0

    def token(self) -> int:
        return self.luck.randrange(self.words)

    def begin(self) -> None:
        seed = self.luck.choice([0, 7, 2**63 + 5, 2**64 - 1])
        plain, fused = (states.begin(seed) for states in self.both)
        assert plain == fused
        self.texts[plain] = [self.token() for _ in range(self.luck.choice([1, 2, 5, 40, 300]))]

    def end(self) -> None:
        number = self.luck.choice(list(self.texts))
        del self.texts[number]
        for states in self.both:
            states.forget(number)

    def step(self) -> None:
        """Draft for all texts, verify some of the drafts, and let the texts grow."""
        numbers, texts = list(self.texts), [torch.tensor(text) for text in self.texts.values()]
        nodes = [self.luck.choice([0, 3, 12, 30, 63]) for _ in numbers]
        depths = [self.luck.choice([1, 4, 8, 12]) for _ in numbers]
        draws, self.draws = self.draws, None
        wish = Wish(numbers, texts, nodes, depths, BIT)
        found, expected = [states.trees(wish, draws) for states in reversed(self.both)]
        assert found[1] == expected[1]
        for ours, theirs in zip(found[0], expected[0], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        trees = Trees(*found[0])
        trees.validate()
        assert ((trees.parents != NO_PARENT).sum(dim=1) <= torch.tensor(nodes)).all()
        self.windows += sum(width > 0 for width in found[1])
        self.guesses += int((trees.source & GUESSED != 0).sum())
        self._verify(trees, numbers, found[1])
        for text in self.texts.values():
            repeats = len(text) > 6 and self.luck.random() < 0.5
            text += text[-6 : -6 + self.luck.randrange(1, 5)] if repeats else [self.token()]
        self._compare()

    def _verify(self, trees: Trees, numbers: list[int], widths: list[int]) -> None:
        """A step in which some of the windows were bought; texts without one are named, too, or have ended since."""
        waiting, tokens, masks, first = [], [], [], []
        for row, (number, width) in enumerate(zip(numbers, widths, strict=True)):
            bought = width and self.luck.random() < 0.8
            wanted = trees.source[row] != 0 if bought else trees.source[row] & GUESSED != 0
            columns = [0, *wanted.nonzero().flatten().tolist()]
            place = {column: at for at, column in enumerate(columns)}
            parents = [NO_PARENT] + [place[int(trees.parents[row, column])] for column in columns[1:]]
            first.append(len(tokens))
            tokens += trees.tokens[row, columns].tolist()
            masks += ancestor_masks(torch.tensor([parents]))[0].tolist()
            waiting.append(self.luck.choice([number, number, number, -1, 10**6]))
        drawn = torch.tensor([self.token() for _ in tokens])
        self.draws = waiting, torch.tensor(tokens), torch.tensor(masks), drawn, torch.tensor(first)
        if self.luck.random() < 0.5:
            for states in self.both:
                states.learn(*self.draws)
            self.draws = None

    def _compare(self) -> None:
        plain, fused = self.both
        assert plain.usage() == fused.usage()
        for number in self.texts:
            assert torch.equal(plain.window(number), fused.window(number))


@pytest.mark.parametrize("seed", range(24))
def test_the_kernel_answers_as_defined(seed: int) -> None:
    luck = random.Random(seed)
    rules = WindowRules(luck.choice([3, 4, 5]), luck.choice([1, 3, 7]), luck.choice([1, 2, 7]))
    twins = Twins(rules, luck, luck.choice([2, 5, 60, 20_000]))
    for _ in range(30):
        if not twins.texts or (len(twins.texts) < 4 and luck.random() < 0.2):
            twins.begin()
        elif luck.random() < 0.05:
            twins.end()
            continue
        twins.step()
    assert twins.windows > 0
    assert twins.guesses > 0 or twins.words > 5


def test_the_pool_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    rules = WindowRules(3, 2, 2)
    both = PlainStates(rules), FusedStates(rules)
    text = torch.tensor([*range(2 * MAX_KEYS), *range(2 * MAX_KEYS)])
    numbers = [states.begin(0) for states in both]
    for length in range(4, len(text), 300):
        given = [text[:length]], [30], [8], BIT
        ours, theirs = (states.trees(Wish([number], *given))[0] for states, number in zip(both, numbers, strict=True))
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
        assert both[0].usage() == both[1].usage()
    texts, grams = both[1].usage()
    assert texts == 1
    assert MAX_KEYS - 10 <= grams <= 2 * MAX_KEYS


def test_pins_and_guesses_are_told_apart() -> None:
    states = FusedStates(WindowRules(3, 2, 7))
    number = states.begin(1)
    text = torch.tensor([5, 6, 7, 8, 9, 5])
    arrays, [width] = states.trees(Wish([number], [text], [63], [8], BIT))
    trees = Trees(*arrays)
    assert width == 2
    guessed = trees.source[0] == 1 << BIT
    pinned = trees.source[0] >> PINS == 1 << BIT
    assert 0 < int(pinned.sum()) <= 4
    assert trees.tokens[0, (trees.source[0] & GUESSED) != 0].tolist() == [6, 7], "what followed the 5"
    assert int(guessed.sum()) + int(pinned.sum()) >= len(trees.tokens[0]) - 1


def test_what_does_not_fit_is_refused() -> None:
    states = FusedStates(WindowRules(4, 2, 2))
    number = states.begin(0)
    text, one = torch.tensor([1, 2, 3]), torch.tensor([0])
    with pytest.raises(IndexError, match="text 9 is not under way"):
        states.trees(Wish([9], [text], [8], [8], BIT))
    with pytest.raises(ValueError, match="a number and limits for each row"):
        states.trees(Wish([number], [text], [8, 8], [8], BIT))
    states.trees(Wish([number], [text], [30], [8], BIT))
    with pytest.raises(ValueError, match="a first node for each row"):
        states.learn([number], one, one, one, torch.tensor([0, 1]))
    with pytest.raises(IndexError, match="row 0 has no such nodes"):
        states.learn([number], one, one, one, torch.tensor([1]))
