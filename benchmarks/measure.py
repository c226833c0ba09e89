"""What was measured, and the pure functions that turn it into rates and ratios."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """A prompt of the workload, and the seed that goes with it in every round."""

    index: int
    ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Task:
    """Prompts to be continued at once, each by exactly ``tokens`` tokens."""

    round: int
    temperature: float
    cases: tuple[Case, ...]
    tokens: int


@dataclass(frozen=True)
class Run:
    """One task done by one system. ``None``: this system does not say."""

    system: str
    round: int
    temperature: float
    prompts: tuple[int, ...]  # Case.index of each
    seconds: float  # from the prompts' token ids to the last token
    tokens: int
    steps: int  # forward passes of the target
    texts: tuple[str, ...]  # a digest of the tokens of each prompt
    own_seconds: float | None = None  # by a server's own account, without HTTP
    forward_seconds: float | None = None  # in the target's forward pass
    draft_seconds: float | None = None  # in the drafters
    drafted: int | None = None  # draft tokens verified
    accepted: int | None = None
    by_drafter: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one system is than another.

    ``total`` compares the time for all prompts: it is what a user waits for, and prompts on which drafting shines
    weigh little in it, because they are soon done. The geometric mean over prompts is the more flattering number.
    """

    total: float  # within a round, the median over rounds
    low: float  # in the worst round,
    high: float  # and in the best
    geomean: float  # over the prompts, each of them compared within a round, the median over rounds
    worst_prompt: float


@dataclass(frozen=True)
class Summary:
    """A system at one temperature, over the median run of each prompt."""

    system: str
    temperature: float
    runs: int
    tokens_per_second: float
    tokens_per_step: float
    step_ms: float  # all time / steps
    forward_ms: float | None  # of it, in the target's forward pass
    draft_ms: float | None  # of it, in the drafters
    rest_ms: float | None  # of it, everything else: planning, sampling, verifying, commit, Python
    drafted: int | None
    accepted: int | None
    by_drafter: dict[str, dict[str, int]]
    speedup: Ratio | None  # over plain decoding of one prompt at a time
    denominator: float | None  # tokens per step / speed-up = what a step costs, in steps of plain decoding
    same_text: tuple[int, int] | None  # prompts whose tokens are plain decoding's, of how many


def groups(cases: Sequence[Case], size: int) -> list[tuple[tuple[Case, ...], tuple[Case, ...]]]:
    """Cut the workload into pieces of ``size``: (the piece, the piece filled up to ``size`` from the beginning)."""
    pieces = [tuple(cases[first : first + size]) for first in range(0, len(cases), size)]
    return [(piece, tuple((piece + tuple(cases) * size)[:size])) for piece in pieces]


def typical(runs: Iterable[Run]) -> list[Run]:
    """Of each prompt (or group of prompts) the run of median time over the rounds."""
    by_prompts: dict[tuple[int, ...], list[Run]] = defaultdict(list)
    for run in runs:
        by_prompts[run.prompts].append(run)
    return [sorted(same, key=lambda run: run.seconds)[(len(same) - 1) // 2] for same in by_prompts.values()]


def ratio(runs: Sequence[Run], reference: Sequence[Run]) -> Ratio | None:
    """How many times faster ``runs`` are than ``reference``, in the rounds that both took part in.

    Args:
        runs: of one system at one temperature, any number of prompts at once.
        reference: of another system at the same temperature, one prompt at a time.

    Returns:
        None when they have no round in common.
    """
    rounds = sorted({run.round for run in runs} & {run.round for run in reference})
    if not rounds:
        return None
    runs = [run for run in runs if run.round in rounds]
    reference = [run for run in reference if run.round in rounds]
    by_round = [
        _total([run for run in runs if run.round == number], [run for run in reference if run.round == number])
        for number in rounds
    ]
    by_prompt = _by_prompt(runs, reference)
    return Ratio(
        total=statistics.median(by_round),
        low=min(by_round),
        high=max(by_round),
        geomean=statistics.geometric_mean(by_prompt),
        worst_prompt=min(by_prompt),
    )


def _total(runs: Sequence[Run], reference: Sequence[Run]) -> float:
    seconds = {run.prompts[0]: run.seconds for run in reference}
    return math.fsum(seconds[prompt] for run in runs for prompt in run.prompts) / math.fsum(r.seconds for r in runs)


def _by_prompt(runs: Sequence[Run], reference: Sequence[Run]) -> list[float]:
    seconds = {(run.round, run.prompts[0]): run.seconds for run in reference}
    ratios: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for run in runs:
        ratios[run.prompts].append(math.fsum(seconds[run.round, prompt] for prompt in run.prompts) / run.seconds)
    return [statistics.median(of_rounds) for of_rounds in ratios.values()]


def same_text(runs: Sequence[Run], reference: Sequence[Run]) -> tuple[int, int]:
    """(prompts that have the reference's tokens in every run, prompts in both)."""
    expected = {run.prompts[0]: run.texts[0] for run in reference}
    equal: dict[int, bool] = {}
    for run in runs:
        for prompt, text in zip(run.prompts, run.texts, strict=True):
            if prompt in expected:
                equal[prompt] = equal.get(prompt, True) and text == expected[prompt]
    return sum(equal.values()), len(equal)


def summarise(runs: Sequence[Run], plain: Sequence[Run], *, comparable_text: bool) -> Summary:
    """One line of the report.

    Args:
        runs: of one system at one temperature.
        plain: our plain decoding of one prompt at a time, at the same temperature; may be empty.
        comparable_text: whether this system must make the same tokens as plain decoding.
    """
    chosen = typical(runs)
    seconds, tokens, steps = (
        math.fsum(r.seconds for r in chosen),
        sum(r.tokens for r in chosen),
        sum(r.steps for r in chosen),
    )
    forward, draft = _sum_known([r.forward_seconds for r in chosen]), _sum_known([r.draft_seconds for r in chosen])
    drafted, accepted = _sum_known([r.drafted for r in chosen]), _sum_known([r.accepted for r in chosen])
    speedup = ratio(runs, plain)
    return Summary(
        system=chosen[0].system,
        temperature=chosen[0].temperature,
        runs=len(runs),
        tokens_per_second=tokens / seconds,
        tokens_per_step=tokens / steps,
        step_ms=1e3 * seconds / steps,
        forward_ms=None if forward is None else 1e3 * forward / steps,
        draft_ms=None if draft is None else 1e3 * draft / steps,
        rest_ms=None if forward is None or draft is None else 1e3 * (seconds - forward - draft) / steps,
        drafted=None if drafted is None else int(drafted),
        accepted=None if accepted is None else int(accepted),
        by_drafter=_add_counts([r.by_drafter for r in chosen]),
        speedup=speedup,
        denominator=None if speedup is None else tokens / steps / speedup.total,
        same_text=same_text(runs, plain) if comparable_text and plain else None,
    )


def _sum_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _add_counts(many: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for counts in many:
        for name, count in counts.items():
            mine = total.setdefault(name, dict.fromkeys(count, 0))
            for what, number in count.items():
                mine[what] += number
    return total
