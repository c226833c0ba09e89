"""What ``compare`` measured, judged and in tables: pure functions of the pieces of its document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from benchmarks.checks import DEMO, Check
from benchmarks.measure import Ratio, Run, ratio, summarise
from benchmarks.report import COLUMNS, summary_row, table
from benchmarks.settings import AUTO, PLAIN

HF, HF_SPECULATIVE = "hf", ("hf-assisted", "hf-lookup")
LLAMA, LLAMA_SPECULATIVE = "llama", ("llama-ngram", "llama-draft", "llama-both")
OVER_TRANSFORMERS = 3.0  # on the demo target
PLAIN_OVER_LLAMA = 0.9  # on larger ones
AUTO_OVER_LLAMA = 1.3
OURS = (PLAIN, AUTO)
ORDER = (*OURS, HF, *HF_SPECULATIVE, LLAMA, *LLAMA_SPECULATIVE)
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
        given = {name: tuple(value) if name in tuples else value for name, value in run.items() if name in names}
        found[run["system"]].append(Run(**given))
    return found


def compare_table(piece: Piece) -> str:
    """A line for each system, and the setting that was its best."""
    runs = runs_of(piece)
    greedy = piece["temperature"] == 0
    rows = [
        summary_row(summarise(some, runs[PLAIN], comparable_text=greedy or name in OURS)) for name, some in runs.items()
    ]
    rows.sort(key=lambda row: ORDER.index(row[0]))
    settings = [f"{name}: {setting}" for name, setting in piece["settings"].items() if setting]
    head = f"{piece['family']}, temperature {piece['temperature']:g}"
    return "\n\n".join([f"{head}\n{table([COLUMNS, *rows])}", *(["\n".join(settings)] if settings else [])])


def compare_checks(pieces: Sequence[Piece]) -> list[Check]:
    """The demo against transformers, larger targets against llama.cpp."""
    return [check for piece in pieces for check in (_demo(piece) if piece["family"] == DEMO else _larger(piece))]


def _demo(piece: Piece) -> list[Check]:
    return [
        _check(piece, "plain decoding / transformers' generate", OVER_TRANSFORMERS, PLAIN, (HF,)),
        *(
            _check(piece, f"auto / transformers' {name.partition('-')[2]} generation", OVER_TRANSFORMERS, AUTO, (name,))
            for name in HF_SPECULATIVE
        ),
    ]


def _larger(piece: Piece) -> list[Check]:
    return [
        _check(piece, "plain decoding / llama.cpp's", PLAIN_OVER_LLAMA, PLAIN, (LLAMA,)),
        _check(piece, "auto / the best speculation of llama.cpp", AUTO_OVER_LLAMA, AUTO, LLAMA_SPECULATIVE),
    ]


def _check(piece: Piece, text: str, bound: float, system: str, references: Sequence[str]) -> Check:
    """Time of the fastest reference / ours, over all prompts of a round; the median over the rounds."""
    runs = runs_of(piece)
    found = [r for name in references if (r := ratio(runs.get(system, []), runs.get(name, []))) is not None]
    named = f"{piece['family']}, T={piece['temperature']:g}, {text}"
    if not found:
        return Check(named, bound, None)
    closest: Ratio = min(found, key=lambda each: each.total)
    return Check(named, bound, closest.total, closest.low, closest.high)
