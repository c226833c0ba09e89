"""Trees of a fixed shape: the same rank paths in every step, as lists called ``medusa_choices`` (2401.10774).

A list in the reference's layout, [[0], [0, 0], [1], ...], is accepted as it is. Our own are built from the accuracy
of each depth's candidates on calibration text, and kept with it.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decoding.drafters.product_tree import RankPath
from decoding.errors import ConfigError
from models.batch import MAX_TREE

CHOICES_FILE = "medusa_choices.json"
MAX_RANKS = 64


def calibrated_choices(accuracy: Sequence[Sequence[float]], nodes: int) -> list[RankPath]:
    """The ``nodes`` rank paths with the largest product of accuracies, best first (2401.10774, section 2.3.3).

    Paths on which nothing was ever right are left out, so the list may be shorter.

    Args:
        accuracy: a[k][r], how often the candidate of rank r at depth k + 1 is right; it may rise with r.
    """
    # each depth's ranks by accuracy, so that a path's better neighbours come before it
    order = [sorted(range(len(each)), key=lambda rank: (-each[rank], rank)) for each in accuracy]
    chosen: list[RankPath] = []
    frontier: list[tuple[float, int, RankPath, float]] = []  # -chance, depth, places in ``order``, chance of the parent

    def push(places: RankPath, above: float) -> None:
        level, place = len(places) - 1, places[-1]
        if level < len(order) and place < len(order[level]):
            chance = above * accuracy[level][order[level][place]]
            if chance > 0:
                heapq.heappush(frontier, (-chance, len(places), places, above))

    push((0,), 1.0)
    while frontier and len(chosen) < nodes:
        chance, _, places, above = heapq.heappop(frontier)
        chosen.append(tuple(order[level][place] for level, place in enumerate(places)))
        push((*places[:-1], places[-1] + 1), above)
        push((*places, 0), -chance)
    return chosen


def expected_tokens(accuracy: Sequence[Sequence[float]], choices: Sequence[RankPath]) -> float:
    """Tokens a step that a tree should yield where depths are independent: 1 + the sum of its paths' products."""
    total = 1.0
    for path in choices:
        chance = 1.0
        for level, rank in enumerate(path):
            chance *= accuracy[level][rank]
        total += chance
    return total


def read_choices(path: Path, heads: int, vocab_size: int) -> list[RankPath]:
    """The rank paths in a JSON file: a list of lists, or an object with one as "medusa_choices".

    Raises:
        ConfigError: no such file, no list of paths in it, or one that ``check_choices`` refuses.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        makes_it = "`saccade calibrate` makes it"
        hint = makes_it if path.name == CHOICES_FILE else "tree is probability, calibrated or the path of a list"
        raise ConfigError(f"medusa: there is no tree file {path}; {hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"medusa: the tree file {path} cannot be read ({error}); restore it") from error
    listed = content.get("medusa_choices") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not all(_is_path(each) for each in listed):
        raise ConfigError(
            f"medusa: {path} holds no tree; write a JSON list of rank paths such as [[0], [0, 0], [1]], bare or as "
            '"medusa_choices" of an object'
        )
    choices = [tuple(each) for each in listed]
    check_choices(choices, heads, vocab_size, path)
    return choices


def check_choices(choices: Sequence[RankPath], heads: int, vocab_size: int, path: Path) -> None:
    """Whether the paths form a tree that ``heads`` heads over ``vocab_size`` tokens can fill.

    Raises:
        ConfigError: naming the first path that does not fit.
    """
    known = set(choices)
    if not known or len(known) >= MAX_TREE:
        raise ConfigError(
            f"medusa: the tree in {path} has {len(known)} nodes; it may have 1 to {MAX_TREE - 1}, the root not counted"
        )
    for choice in choices:
        shown = list(choice)
        if len(choice) > heads:
            raise ConfigError(
                f"medusa: {shown} in {path} is {len(choice)} deep, and there are {heads} heads; leave it out"
            )
        if max(choice) >= min(MAX_RANKS, vocab_size):
            highest = min(MAX_RANKS, vocab_size) - 1
            raise ConfigError(f"medusa: {shown} in {path} has a rank above {highest}; leave it out")
        if len(choice) > 1 and choice[:-1] not in known:
            raise ConfigError(f"medusa: {shown} in {path} hangs on {shown[:-1]}, which is not in the list; add that")


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(rank) is int and rank >= 0 for rank in value)
