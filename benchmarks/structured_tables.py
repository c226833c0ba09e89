"""Tables of what ``benchmarks.structured`` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Pieces = Sequence[Mapping[str, Any]]
LEVELS = {
    1: "scalars",
    2: "arrays",
    3: "objects",
    4: "references",
    5: "combinations",
    6: "documents",
}
SYSTEMS = ("plain", "forced", "drafters")
_HEAD = f"{'':<16}{'schemas':>8}{'tokens':>8} |{'tokens per step':^32}|{'without a grammar':^20}|{'forced':>8}"
_NAMES = f"{'':<16}{'':>8}{'':>8} |{'plain':>10}{'forced':>10}{'drafters':>12}|{'forced':>9}{'drafters':>11}|"


def structured_text(pieces: Pieces) -> str:
    """All that was measured, in words and tables."""
    parts = [_at(temperature, pieces) for temperature in sorted({piece["temperature"] for piece in pieces})]
    return "\n\n".join(parts)


def _at(temperature: float, pieces: Pieces) -> str:
    mine = [piece for piece in pieces if piece["temperature"] == temperature]
    rows = [
        _row(LEVELS[level], [p for p in mine if p["level"] == level]) for level in sorted({p["level"] for p in mine})
    ]
    return "\n".join(
        [f"temperature {temperature:g}", "", _HEAD, _NAMES, *rows, _row("all", mine), "", *_verdict(mine), _masks(mine)]
    )


def _row(name: str, pieces: Pieces) -> str:
    bound = [rate(pieces, "answers", system) for system in SYSTEMS]
    free = [rate(pieces, "free", system) for system in SYSTEMS[1:]]
    tokens = total(pieces, "answers", "plain", "ids")
    share = total(pieces, "answers", "forced", "forced") / tokens
    numbers = f"{bound[0]:>10.2f}{bound[1]:>10.2f}{bound[2]:>12.2f}|{free[0]:>9.2f}{free[1]:>11.2f}"
    return f"{name:<16}{len(pieces):>8}{tokens:>8.0f} |{numbers}|{share:>8.0%}"


def _verdict(pieces: Pieces) -> list[str]:
    wrong = [piece for piece in pieces if piece["complaint"]]
    different = [piece["name"] for piece in pieces if not piece["same"]]
    lines = [
        f"{len(pieces) - len(wrong)} of {len(pieces)} answers are complete, valid JSON, and satisfy their schema;",
        f"{len(pieces) - len(different)} of {len(pieces)} are the same from all engines.",
    ]
    lines += [f"  {piece['name']}: {piece['complaint'][:200]}" for piece in wrong]
    return lines + [f"  {name}: other tokens" for name in different]


def _masks(pieces: Pieces) -> str:
    bound, free = (_step_ms(pieces, kind) for kind in ("answers", "free"))
    return f"A step of plain decoding took {bound:.2f} ms with a grammar, and {free:.2f} ms without."


def _step_ms(pieces: Pieces, kind: str) -> float:
    return 1e3 * total(pieces, kind, "plain", "seconds") / total(pieces, kind, "plain", "steps")


def rate(pieces: Pieces, kind: str, system: str) -> float:
    """Tokens per step over all requests together."""
    return total(pieces, kind, system, "ids") / total(pieces, kind, system, "steps")


def total(pieces: Pieces, kind: str, system: str, count: str) -> float:
    """A sum over requests."""
    return float(sum(piece[kind][system][count] for piece in pieces))
