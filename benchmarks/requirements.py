"""What the demo models must show, and whether they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.measure import Ratio, Run, ratio

CONCURRENT = 8
BATCHED_PLAIN = f"plain-x{CONCURRENT}"
BATCHED_BOTH = f"both-x{CONCURRENT}"


@dataclass(frozen=True)
class Requirement:
    """``system`` must be at least ``at_least`` times as fast as ``reference``."""

    text: str
    system: str
    reference: str
    at_least: float


@dataclass(frozen=True)
class Finding:
    """A requirement and what was measured; ``passed`` is None when a system did not run."""

    temperature: float
    requirement: Requirement
    measured: Ratio | None
    passed: bool | None


def requirements(temperature: float) -> list[Requirement]:
    """Those at a temperature: greedy text is predictable and drafting must pay well, sampled text less so."""
    gain = 1.3 if temperature == 0 else 1.0
    return [
        Requirement("plain decoding over transformers' generate", "plain", "hf", 3.0),
        Requirement("both drafters over plain decoding", "both", "plain", gain),
        Requirement("both drafters over transformers' assisted generation", "both", "hf-assisted", 1.0),
        Requirement("both drafters over transformers' prompt lookup", "both", "hf-lookup", 1.0),
        Requirement(f"plain, {CONCURRENT} requests at once, over plain, one by one", BATCHED_PLAIN, "plain", 3.0),
    ]


def judge(runs: Mapping[tuple[float, str], list[Run]]) -> list[Finding]:
    """Hold the runs, by (temperature, system), against the requirements of each temperature that they have."""
    findings = []
    for temperature in sorted({temperature for temperature, _ in runs}):
        for requirement in requirements(temperature):
            ours = runs.get((temperature, requirement.system), [])
            measured = ratio(ours, runs.get((temperature, requirement.reference), []))
            passed = None if measured is None else measured.total >= requirement.at_least
            findings.append(Finding(temperature, requirement, measured, passed))
    return findings
