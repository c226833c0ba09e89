"""The result of a measurement: figures of each server under each load, ratios, and where it all comes from."""

from __future__ import annotations

import datetime
import math
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from benchmarks.load.comparison import BETWEEN_CHUNKS, Ratio, Texts, compare, compare_texts
from benchmarks.load.experiment import Measured, Plan
from benchmarks.load.greeting import said
from benchmarks.load.lag import BUSY
from benchmarks.load.loops import Turn
from benchmarks.load.records import Record
from benchmarks.load.settings import Goal
from benchmarks.load.summary import Category, Summary, by_category, summarise

LIKE_CHUNKS = 0.1  # logarithm of the ratio of their tokens


@dataclass(frozen=True)
class Result:
    """All of it.

    Attributes:
        summaries: by load, and of each load by server.
        ratios: of the second server over the first one; empty where there is one.
        texts: of both servers' answers; None where there is one server.
        categories: of prompts, where their file has such: figures of each, over all loads.
    """

    plan: Plan
    measured: Measured
    goal: Goal
    summaries: tuple[Summary, ...]
    ratios: tuple[Ratio, ...]
    texts: Texts | None
    categories: tuple[Category, ...]
    origin: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know, once each."""
        found = _late(self.summaries)
        found += [
            f"{each.server}: {each.short} of {each.succeeded} answers under load {each.load!r} ended before the tokens "
            "asked for; --ignore-eos keeps lengths equal where the server knows it"
            for each in self.summaries
            if each.short
        ]
        found += [
            f"{each.server}, {kind}: {said(text)}"
            for each in self.summaries
            for kind, text in each.examples.items()
            if text
        ]
        sources = {each.server: each.source for each in self.summaries if each.succeeded}
        found += [
            f"{name} does not count tokens: its chunks are taken for tokens, and it makes more than that if a chunk "
            "holds several; --tokenizer MODEL counts its texts"
            for name, source in sources.items()
            if source == "chunks"
        ]
        if (text := self._repeats()) is not None:
            found.append(text)
        found += _unlike(_pairs(self.summaries, len(self.plan.servers)))
        found += [
            f"{name} tells of speculation in its counters only, which have all clients' requests in them"
            for name in dict.fromkeys(each.server for each in self.summaries if _by_counters(each))
        ]
        if len(set(sources.values())) > 1:
            counted = "; ".join(f"{name}: {source}" for name, source in sources.items())
            found.append(f"the servers' tokens are counted in different ways ({counted})")
        return list(dict.fromkeys(found))

    def _repeats(self) -> str | None:
        requests = sum(len(turn.records) for turn in self.measured.turns)
        sent, prompts = requests // len(self.plan.servers), len(self.plan.prompts)
        if sent <= prompts:
            return None
        return f"{prompts} prompts served {sent} requests of each server: one with a prefix cache knew repeated ones"


def _late(summaries: Sequence[Summary]) -> list[str]:
    """The worst of what may have been the client's fault, and how often there was such."""
    warned = [each for each in summaries if each.warning]
    if not warned:
        return []
    worst = max(warned, key=lambda each: (each.client_cpu > BUSY, each.lag_p99_ms))
    others = f" ({len(warned)} of {len(summaries)} measurements have such a warning)" if len(summaries) > 1 else ""
    return [f"{worst.server} under load {worst.load!r}: {worst.warning}{others}"]


def _by_counters(summary: Summary) -> bool:
    return summary.speculation is not None and summary.speculation.counters


def _unlike(pairs: Sequence[tuple[Summary, Summary]]) -> list[str]:
    """Where chunks hold different numbers of tokens."""
    found = [(one, other) for one, other in pairs if not _like_chunks(one, other)]
    if not found:
        return []
    one, other = found[0]
    counts = "; ".join(f"{a.load}: {a.tokens_per_chunk:.2g} and {b.tokens_per_chunk:.2g}" for a, b in found)
    return [
        f"the times between chunks of {one.server} and {other.server} are not compared, as chunks hold "
        f"different numbers of tokens ({counts})"
    ]


def _pairs(summaries: Sequence[Summary], servers: int) -> list[tuple[Summary, Summary]]:
    """Both servers' under each load."""
    return list(zip(summaries[::2], summaries[1::2], strict=True)) if servers == 2 else []


def _like_chunks(one: Summary, other: Summary) -> bool:
    """Whether times between chunks can be compared: chunks hold about as many tokens."""
    if not one.tokens_per_chunk or not other.tokens_per_chunk:
        return True
    return abs(math.log(one.tokens_per_chunk / other.tokens_per_chunk)) < LIKE_CHUNKS


def result_of(plan: Plan, measured: Measured, goal: Goal, argv: Sequence[str]) -> Result:
    """Figures out of records."""
    summaries, ratios = [], []
    for load in plan.loads:
        parts = [_turns(measured, server.label, load.label) for server in plan.servers]
        figures = [summarise(part, goal) for part in parts]
        summaries += figures
        if len(parts) == 2:
            like = _like_chunks(figures[0], figures[1])
            ratios += [each for each in compare(parts[0], parts[1]) if like or each.metric != BETWEEN_CHUNKS]
    both = [[turn for turn in measured.turns if turn.server == server.label] for server in plan.servers]
    return Result(
        plan=plan,
        measured=measured,
        goal=goal,
        summaries=tuple(summaries),
        ratios=tuple(ratios),
        texts=compare_texts(both[0], both[1]) if len(both) == 2 else None,
        categories=tuple(each for turns in both for each in by_category(turns)),
        origin=origin(argv),
    )


def _turns(measured: Measured, server: str, load: str) -> list[Turn]:
    return [turn for turn in measured.turns if (turn.server, turn.load.label) == (server, load)]


def origin(argv: Sequence[str]) -> dict[str, Any]:
    """Where the figures come from; keys that stand on the command line are left out."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["saccade", "bench", *without_keys(argv)]),
        "saccade": version("saccade"),
        "httpx": version("httpx"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def without_keys(argv: Sequence[str]) -> list[str]:
    """A command line that can be shown."""
    words, hidden = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        is_key = flag in ("--api-key", "--vs-api-key")
        words.append("***" if hidden else f"{flag}=***" if is_key and equals else word)
        hidden = is_key and not equals
    return words


def as_json(result: Result) -> dict[str, Any]:
    """Everything, for programs. Times of requests are in milliseconds, counted from the beginning of their turn."""
    return {
        "servers": [
            {
                "label": each.label,
                "base_url": each.base_url,
                "model": each.model,
                "usage": each.usage,
                "extra": each.extra,
            }
            for each in result.measured.servers
        ],
        "sampling": asdict(result.plan.sampling),
        "extent": asdict(result.plan.extent),
        "goal": {name: limit for name, limit in asdict(result.goal).items() if limit is not None},
        "loads": [{**asdict(load), "rate": _finite(load.rate), "label": load.label} for load in result.plan.loads],
        "summaries": [asdict(each) for each in result.summaries],
        "ratios": [{**asdict(each), "verdict": each.verdict} for each in result.ratios],
        "texts": None if result.texts is None else asdict(result.texts),
        "categories": [asdict(each) for each in result.categories],
        "notes": result.notes,
        "origin": result.origin,
        "requests": [
            {"server": turn.server, "load": turn.load.label, "round": turn.round, **_request(record, turn.started)}
            for turn in result.measured.turns
            for record in turn.records
        ],
    }


def _finite(rate: float | None) -> float | str | None:
    return "inf" if rate == float("inf") else rate


def _request(record: Record, started: float) -> dict[str, Any]:
    return {
        "prompt": record.prompt,
        "category": record.category,
        "scheduled_ms": _ms(record.scheduled - started),
        "sent_ms": _ms(record.sent - started),
        "ended_ms": _ms(record.ended - started),
        "ttft_ms": _ms(record.ttft),
        "tpot_ms": _ms(record.tpot),
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "chunks": len(record.arrivals),
        "finish_reason": record.finish_reason,
        "error": record.error,
        "detail": record.detail or None,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
