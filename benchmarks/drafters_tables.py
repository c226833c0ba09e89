"""What ``drafters``, ``idle_cost`` and ``store_bounds`` measured, judged and in tables: functions of their pieces."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cells import Spread
from benchmarks.checks import Check, check_spread
from benchmarks.measure import Run, summarise
from benchmarks.peer_tables import over, runs_of
from benchmarks.report import table
from benchmarks.settings import PLAIN
from benchmarks.speed_tables import checks_table

Piece = dict[str, Any]

PREDICTED = {"own": 8.0, "edited": 5.0}  # tokens per step at least
PREDICTIONS = {"": "", "own": ", predicted by its own answer", "edited": ", predicted with one line in twenty edited"}
PREDICTION = "prediction"  # the drafter, alone
OWN_PLAIN = {"hf-lookup": "hf", "llama-ngram": "llama"}  # a peer's system -> the same peer without speculation
IDLE_SHARE = 0.02  # of a step
TOKEN_MICROSECONDS = 50.0
MEGABYTE = 2**20
SPEED_COLUMNS = (
    "drafters",
    "tokens/step",
    "tokens/s",
    "x plain",
    "rounds",
    "x its plain",
    "drafted/step",
    "accepted",
    "same text",
)
SPEED_LEGEND = """\
x plain      time of our plain decoding / time, over all requests of a round: the median over rounds,
rounds       and the worst and the best round
x its plain  the same over plain decoding of the same engine
accepted     of the drafted tokens that were verified
same text    requests whose tokens are those of our plain decoding; other engines round differently"""


# workloads ------------------------------------------------------------------------------------------------------------


def drafters_text(pieces: Sequence[Piece]) -> str:
    """A table for each piece, what its columns mean, then the checks."""
    parts = [*(drafters_table(piece) for piece in pieces), SPEED_LEGEND]
    checks = drafters_checks(pieces)
    return "\n\n".join([*parts, *([checks_table(checks)] if checks else [])])


def drafters_table(piece: Piece) -> str:
    """A line for each system, in the order in which they were named; the settings of the peers below."""
    runs = runs_of(piece)
    names = [name for name in piece["settings"] if name in runs]
    settings = [f"{name}: {setting}" for name, setting in piece["settings"].items() if setting]
    lines = [_heading(piece), table([SPEED_COLUMNS, *(_speed_row(name, runs, piece) for name in names)])]
    return "\n".join([*lines, *(["", *settings] if settings else [])])


def _heading(piece: Piece) -> str:
    known, (nodes, depth) = piece["known"], piece["limits"]
    return (
        f"{piece['family']}, {piece['workload']}{PREDICTIONS[piece['prediction']]}, "
        f"temperature {piece['temperature']:g}, plan {piece['plan']}, at most {nodes} nodes and depth {depth}: "
        f"{piece['requests']} requests in order, {piece['tokens']} tokens\n"
        f"of the text, {known['prompt']:.0%} stands in its prompt, {known['answers']:.0%} in an earlier answer, "
        f"{known['either']:.0%} in one of them"
    )


def _speed_row(name: str, runs: dict[str, list[Run]], piece: Piece) -> list[str]:
    # only at temperature 0 do other engines draw the same tokens
    ours = not any(name in (peer, plain) for peer, plain in OWN_PLAIN.items())
    found = summarise(runs[name], runs[PLAIN], comparable_text=ours or piece["temperature"] == 0)
    spread = over(runs[name], runs[PLAIN])
    own = over(runs[name], runs[OWN_PLAIN[name]]) if name in OWN_PLAIN else None
    drafted, accepted = (_total(runs[name], what) for what in ("drafted", "accepted"))
    steps = sum(run.steps for run in runs[name])
    return [
        name,
        f"{found.tokens_per_step:.2f}",
        f"{found.tokens_per_second:.1f}",
        "-" if spread is None else f"{spread.median:.2f}",
        "-" if spread is None else f"{spread.low:.2f}..{spread.high:.2f}",
        "-" if own is None else f"{own.median:.2f}",
        "-" if not drafted else f"{drafted / steps:.1f}",
        "-" if not drafted or accepted is None else f"{accepted / drafted:.0%}",
        "-" if found.same_text is None else "{}/{}".format(*found.same_text),
    ]


def _total(runs: Sequence[Run], what: str) -> int | None:
    """Over all runs; None where a system does not say."""
    counts = [getattr(run, what) for run in runs]
    return None if None in counts else sum(counts)


def _rounds(runs: Sequence[Run]) -> set[int]:
    return {run.round for run in runs}


def drafters_checks(pieces: Sequence[Piece]) -> list[Check]:
    """Tokens per step with a prediction that is the answer, and with one that nearly is."""
    checks = []
    for piece in pieces:
        bound = PREDICTED.get(piece["prediction"])
        runs = runs_of(piece).get(PREDICTION)
        if bound is not None and runs:
            text = f"{piece['family']}, {piece['workload']}{PREDICTIONS[piece['prediction']]}: tokens per step"
            checks.append(check_spread(text, bound, Spread.of(_tokens_per_step(runs))))
    return checks


def _tokens_per_step(runs: Sequence[Run]) -> list[float]:
    """Round by round."""
    rounds = [[run for run in runs if run.round == number] for number in sorted(_rounds(runs))]
    return [sum(run.tokens for run in each) / sum(run.steps for run in each) for each in rounds]


# idle cost ------------------------------------------------------------------------------------------------------------


def idle_text(pieces: Sequence[Piece]) -> str:
    """A table for each way of planning, then the checks."""
    kinds = sorted({(piece["family"], piece["plan"], piece["temperature"]) for piece in pieces})
    parts = []
    for kind in kinds:
        mine = [piece for piece in pieces if (piece["family"], piece["plan"], piece["temperature"]) == kind]
        heads = ["drafters", "share of a step", "rounds", "median step", "us a step"]
        heads += ["tokens/step", "x plain", "rounds"]
        title = f"{kind[0]}, random prompts, temperature {kind[2]:g}, plan {kind[1]}"
        parts.append(f"{title}\n{table([heads, *(_idle_row(piece) for piece in mine)])}")
    return "\n\n".join([*parts, checks_table(idle_checks(pieces))])


def _idle_row(piece: Piece) -> list[str]:
    share, rate = idle_share(piece), idle_rate(piece)
    rounds = piece["rounds"]
    steps = sum(each["steps"] for each in rounds)
    return [
        piece["drafters"],
        f"{share.median:.2%}",
        f"{share.low:.2%}..{share.high:.2%}",
        f"{median_share(piece).median:.2%}",
        f"{1e6 * sum(each['drafting'] for each in rounds) / steps:.1f}",
        f"{sum(each['tokens'] for each in rounds) / steps:.2f}",
        f"{rate.median:.2f}",
        f"{rate.low:.2f}..{rate.high:.2f}",
    ]


def idle_share(piece: Piece) -> Spread:
    """The drafters' part of the time of all steps of a round."""
    return Spread.of([each["drafting"] / each["seconds"] for each in piece["rounds"]])


def median_share(piece: Piece) -> Spread:
    """Their part of the median step of a round."""
    return Spread.of([each["median_share"] for each in piece["rounds"]])


def idle_rate(piece: Piece) -> Spread:
    """Tokens a second over plain decoding's of the same round."""
    pairs = zip(piece["rounds"], piece["plain"], strict=True)
    return Spread.of([(a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"]) for a, b in pairs])


def idle_checks(pieces: Sequence[Piece]) -> list[Check]:
    """No set of drafters takes more than its share, neither of all steps nor of the median one."""
    checks = []
    for piece in pieces:
        text = f"{piece['family']}, plan {piece['plan']}, {piece['drafters']}: share"
        checks.append(check_spread(f"{text} of all steps", IDLE_SHARE, idle_share(piece), at_most=True))
        checks.append(check_spread(f"{text} of the median step", IDLE_SHARE, median_share(piece), at_most=True))
    return checks


# stores ---------------------------------------------------------------------------------------------------------------


def stores_text(pieces: Sequence[Piece]) -> str:
    """One table, then the checks."""
    heads = ["drafters", "requests", "tokens", "memory at most", "at the end", "mapped", "bound"]
    heads += ["us a token", "us a step", "slowest tenth", "tokens/step"]
    rows = table([heads, *(_store_row(piece) for piece in pieces)])
    return f"{rows}\n\n{checks_table(store_checks(pieces))}"


def _store_row(piece: Piece) -> list[str]:
    growth = piece["growth"]
    return [
        piece["drafters"],
        str(piece["requests"]),
        str(piece["tokens"]),
        f"{max(growth) / MEGABYTE:.1f} MB",
        f"{growth[-1] / MEGABYTE:.1f} MB",
        f"{piece['mapped'] / MEGABYTE:.1f} MB",
        "-" if piece["bound"] is None else f"{piece['bound'] / MEGABYTE:.1f} MB",
        f"{1e6 * piece['seconds'] / piece['tokens']:.2f}",
        f"{1e6 * piece['seconds'] / piece['steps']:.2f}",
        f"{1e6 * statistics.quantiles(piece['token_seconds'], n=10)[-1]:.2f}",
        f"{piece['answered'] / piece['steps']:.2f}",
    ]


def store_checks(pieces: Sequence[Piece]) -> list[Check]:
    """Memory within its bound (where there is one), and time of update and match."""
    checks = []
    for piece in pieces:
        name = f"{piece['drafters']}, {piece['requests']} requests"
        if piece["bound"] is not None:
            most, bound = max(piece["growth"]) / MEGABYTE, piece["bound"] / MEGABYTE
            checks.append(Check(f"{name}: memory, MB", bound, most, at_most=True))
        microseconds = 1e6 * piece["seconds"] / piece["tokens"]
        checks.append(Check(f"{name}: update and match, us a token", TOKEN_MICROSECONDS, microseconds, at_most=True))
    return checks
