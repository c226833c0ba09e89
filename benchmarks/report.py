"""The report in text: a table per temperature, then the requirements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Summary
from benchmarks.requirements import Finding

COLUMNS = (
    "system",
    "tokens/s",
    "x plain",
    "rounds",
    "tokens/step",
    "denominator",
    "step ms",
    "= forward",
    "+ draft",
    "+ rest",
    "drafted",
    "accepted",
    "same text",
)
LEGEND = """\
x plain     time of plain decoding / time, over all prompts of a round: the median over rounds,
rounds      and the worst and the best round, which tell how noisy the machine was
denominator tokens per step / x plain = what a step costs, in steps of plain decoding; prompts included
step ms     of which the target's forward pass, the drafters, and the rest: planning, sampling, verifying, Python
same text   prompts whose tokens are those of plain decoding; for transformers, at temperature 0, up to rounding"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first one flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary_row(summary: Summary) -> list[str]:
    """One line of the table, a cell for each of COLUMNS."""
    speedup, same = summary.speedup, summary.same_text
    return [
        summary.system,
        f"{summary.tokens_per_second:.1f}",
        "-" if speedup is None else f"{speedup.total:.2f}",
        "-" if speedup is None else f"{speedup.low:.2f}..{speedup.high:.2f}",
        f"{summary.tokens_per_step:.2f}",
        _number(summary.denominator, 2),
        f"{summary.step_ms:.2f}",
        _number(summary.forward_ms, 2),
        _number(summary.draft_ms, 2),
        _number(summary.rest_ms, 2),
        _number(summary.drafted, 0),
        _number(summary.accepted, 0),
        "-" if same is None else f"{same[0]}/{same[1]}",
    ]


def shares(summary: Summary) -> str:
    """What each of several drafters brought; a token that two proposed counts for both."""
    counts = (f"{name} {count['accepted']} of {count['drafted']}" for name, count in summary.by_drafter.items())
    return f"{summary.system}, accepted by drafter: {', '.join(counts)}"


def finding_row(finding: Finding) -> list[str]:
    """One requirement: text, target, measured, how sure, verdict."""
    measured, wanted = finding.measured, finding.requirement
    verdict = {True: "pass", False: "MISS", None: "not measured"}[finding.passed]
    return [
        f"T={finding.temperature:g}  {wanted.text}",
        f"{wanted.at_least:.2f}",
        "-" if measured is None else f"{measured.total:.2f}",
        "-" if measured is None else f"{measured.low:.2f}..{measured.high:.2f}",
        "-" if measured is None else f"{measured.geomean:.2f}",
        "-" if measured is None else f"{measured.worst_prompt:.2f}",
        verdict,
    ]


def render(provenance: dict[str, Any], summaries: Sequence[Summary], findings: Sequence[Finding]) -> str:
    """The whole report."""
    parts = [_heading(provenance)]
    for temperature in sorted({summary.temperature for summary in summaries}):
        rows = [summary_row(summary) for summary in summaries if summary.temperature == temperature]
        parts.append(f"temperature {temperature:g}\n" + table([COLUMNS, *rows]))
        mixed = [s for s in summaries if s.temperature == temperature and len(s.by_drafter) > 1]
        parts.extend(["\n".join(shares(summary) for summary in mixed)] if mixed else [])
    parts.append(LEGEND)
    heads = ("requirement", "target", "measured", "rounds", "geomean", "worst prompt", "")
    parts.append(table([heads, *(finding_row(finding) for finding in findings)]))
    return "\n\n".join(parts)


def _heading(provenance: dict[str, Any]) -> str:
    packages, dtypes = provenance["packages"], sorted(set(provenance["dtypes"].values()))
    commit = (provenance["commit"] or "no commit")[:12] + (" with changes" if provenance["dirty"] else "")
    threads = " ".join(f"{name}={value}" for name, value in provenance["thread_variables"].items())
    load = ", ".join(f"{value:.1f}" for value in provenance["load_average"])
    return (
        f"{provenance['command']}\n"
        f"{provenance['date']}, commit {commit}, Python {provenance['python']}, torch {packages['torch']}, "
        f"transformers {packages['transformers']}\n"
        f"{provenance['cpu']}, {provenance['cores_allowed']} cores, {provenance['threads']} threads ({threads}), "
        f"{' and '.join(dtypes)}, CPU kernels {'in use' if provenance['cpu_kernels'] else 'MISSING'}, "
        f"load average before {load}"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
