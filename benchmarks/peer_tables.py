"""What ``compare`` measured, judged and in tables: pure functions of the pieces of its document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from benchmarks.cells import Spread
from benchmarks.checks import DEMO, Check, check_spread
from benchmarks.measure import Run, summarise
from benchmarks.report import table
from benchmarks.settings import AUTO, PLAIN

HF, HF_SPECULATIVE = "hf", ("hf-assisted", "hf-lookup")
LLAMA, LLAMA_SPECULATIVE = "llama", ("llama-ngram", "llama-draft", "llama-both")
OVER_TRANSFORMERS = 3.0  # on the demo target
PLAIN_OVER_LLAMA = 0.9  # on larger ones
AUTO_OVER_LLAMA = 1.3
OURS = (PLAIN, AUTO, f"http-{PLAIN}", f"http-{AUTO}")
ORDER = (*OURS, HF, *HF_SPECULATIVE, LLAMA, *LLAMA_SPECULATIVE)
COLUMNS = (
    "system",
    "tokens/s",
    "x plain",
    "rounds",
    "tokens/step",
    "step ms",
    "= forward",
    "+ draft",
    "+ rest",
    "same text",
)
Piece = dict[str, Any]


def compare_text(pieces: Sequence[Piece]) -> str:
    """A table for each piece, then the checks."""
    from benchmarks.speed_tables import checks_table

    return "\n\n".join([*(compare_table(piece) for piece in pieces), checks_table(compare_checks(pieces))])


def runs_of(piece: Piece) -> dict[str, list[Run]]:
    """system -> its runs."""
    names, tuples = {field.name for field in fields(Run)}, ("prompts", "texts")
    found: dict[str, list[Run]] = defaultdict(list)
    for run in piece["runs"]:
        given: dict[str, Any] = {
            name: tuple(value) if name in tuples else value for name, value in run.items() if name in names
        }
        found[run["system"]].append(Run(**given))
    return found


def over(runs: Sequence[Run], reference: Sequence[Run]) -> Spread | None:
    """How many times faster than the reference, by the time for all prompts of a round; None: no round of both."""
    mine, theirs = _seconds(runs), _seconds(reference)
    both = sorted(mine.keys() & theirs.keys())
    return Spread.of([theirs[number] / mine[number] for number in both]) if both else None


def _seconds(runs: Sequence[Run]) -> dict[int, float]:
    by_round: dict[int, float] = defaultdict(float)
    for run in runs:
        by_round[run.round] += run.seconds
    return by_round


def compare_table(piece: Piece) -> str:
    """A line for each system, and the setting that was its best."""
    runs = runs_of(piece)
    rows = [_row(piece, name, runs) for name in sorted(runs, key=ORDER.index)]
    settings = [f"{name}: {setting}" for name, setting in piece["settings"].items() if setting]
    head = f"{piece['family']}, temperature {piece['temperature']:g}, {_at_once(piece)}"
    return "\n\n".join([f"{head}\n{table([COLUMNS, *rows])}", *(["\n".join(settings)] if settings else [])])


def _row(piece: Piece, name: str, runs: Mapping[str, list[Run]]) -> list[str]:
    spread = over(runs[name], runs[PLAIN])
    # texts over HTTP are text, and only at temperature 0 do other engines draw the same tokens
    comparable = name in (PLAIN, AUTO) or (piece["temperature"] == 0 and name not in OURS)
    single = piece["concurrency"] == 1
    found = summarise(runs[name], runs[PLAIN] if single else [], comparable_text=comparable)
    return [
        name,
        f"{found.tokens_per_second:.1f}",
        "-" if spread is None else f"{spread.median:.2f}",
        "-" if spread is None else f"{spread.low:.2f}..{spread.high:.2f}",
        f"{found.tokens_per_step:.2f}",
        f"{found.step_ms:.2f}",
        *("-" if value is None else f"{value:.2f}" for value in (found.forward_ms, found.draft_ms, found.rest_ms)),
        "-" if found.same_text is None else "{}/{}".format(*found.same_text),
    ]


def _at_once(piece: Piece) -> str:
    return "one request at a time" if piece["concurrency"] == 1 else f"{piece['concurrency']} requests at once"


def compare_checks(pieces: Sequence[Piece]) -> list[Check]:
    """The demo against transformers, larger targets against llama.cpp; one request at a time."""
    single = [piece for piece in pieces if piece["concurrency"] == 1]
    return [check for piece in single for check in (_demo(piece) if piece["family"] == DEMO else _larger(piece))]


def _demo(piece: Piece) -> list[Check]:
    plain = "plain decoding / transformers' generate", OVER_TRANSFORMERS, PLAIN, (HF,)
    kinds = {name: name.partition("-")[2] for name in HF_SPECULATIVE}
    return [
        _check(piece, *plain),
        *(
            _check(piece, f"auto / transformers' {kind} generation", OVER_TRANSFORMERS, AUTO, (name,))
            for name, kind in kinds.items()
        ),
    ]


def _larger(piece: Piece) -> list[Check]:
    return [
        _check(piece, "plain decoding / llama.cpp's", PLAIN_OVER_LLAMA, PLAIN, (LLAMA,)),
        _check(piece, "auto / the best speculation of llama.cpp", AUTO_OVER_LLAMA, AUTO, LLAMA_SPECULATIVE),
    ]


def _check(piece: Piece, text: str, bound: float, system: str, references: Sequence[str]) -> Check:
    """Against the fastest of the references."""
    runs = runs_of(piece)
    found = [spread for name in references if (spread := over(runs[system], runs[name])) is not None]
    closest = min(found, key=lambda spread: spread.median, default=None)
    return check_spread(f"{piece['family']}, T={piece['temperature']:g}, {text}", bound, closest)
