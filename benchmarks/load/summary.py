"""From records to figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.load.events import Drafts, Source
from benchmarks.load.lag import Lag
from benchmarks.load.loops import Turn
from benchmarks.load.records import Record
from benchmarks.load.settings import Goal

_WEAKEST_LAST: tuple[Source, ...] = (
    "usage of each chunk",
    "token_ids",
    "timings",
    "usage of the last chunk",
    "tokenizer",
    "chunks",
)


@dataclass(frozen=True)
class Spread:
    """Of a time, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @staticmethod
    def of(seconds: Iterable[float]) -> Spread | None:
        """None: there is none."""
        values = 1e3 * np.asarray(list(seconds), dtype=float)
        if not len(values):
            return None
        p50, p90, p99 = (float(each) for each in np.percentile(values, (50, 90, 99)))
        return Spread(float(values.mean()), p50, p90, p99, float(values.max()))


@dataclass(frozen=True)
class Speculation:
    """By the server's own account: of the requests that succeeded, or of its counters, which know of no requests.

    Attributes:
        tokens_per_step: None: it does not count steps. Of counters: of steps with drafts only.
        by_drafter: name -> (drafted, accepted).
        counters: it is told by counters.
    """

    drafted: int
    accepted: int
    tokens_per_step: float | None
    by_drafter: dict[str, tuple[int, int]]
    counters: bool = False

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


@dataclass(frozen=True)
class Summary:
    """One server under one load.

    Attributes:
        request_rate: requests per second that succeeded and ended in the windows.
        errors: kind -> requests.
        examples: kind -> what the first of its errors said.
        short: requests that ended before the tokens that were asked for.
        seconds: of all windows together.
        in_flight: requests that were under way, on average over the windows.
        output_rate: tokens per second that came in the windows, those of failed requests left out.
        good_rate: requests per second that met the goal; None: there is none.
        source: the coarsest way in which tokens were counted.
        tokens_per_chunk: None: chunks are not counted.
        late: from the time when a request was to be sent to its sending.
        failed: from the sending of requests that failed to their failure.
    """

    server: str
    load: str
    requests: int
    succeeded: int
    errors: dict[str, int]
    examples: dict[str, str]
    short: int
    seconds: float
    in_flight: float
    request_rate: float
    output_tokens: int
    output_rate: float
    prompt_tokens: int | None
    good_rate: float | None
    good_share: float | None
    ttft: Spread | None
    ttft_sent: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None
    late: Spread | None
    failed: Spread | None
    source: Source
    tokens_per_chunk: float | None
    speculation: Speculation | None
    lag_p99_ms: float
    lag_max_ms: float
    client_cpu: float
    warning: str | None


def summarise(turns: Sequence[Turn], goal: Goal) -> Summary:
    """Of the turns of one server under one load."""
    records = [record for turn in turns for record in turn.records]
    good = [record for record in records if record.error is None]
    seconds = sum(turn.seconds for turn in turns)
    ended = [
        record for turn in turns for record in turn.records if record.error is None and record.ended <= turn.closed
    ]
    meeting = sum(1 for record in ended if meets(record, goal)) if goal else None
    prompt_tokens = [record.prompt_tokens for record in good if record.prompt_tokens is not None]
    spreads = {name: spread_of(name, good) for name in ("ttft", "ttft_sent", "tpot", "itl", "e2el")}
    lag = sum((turn.lag for turn in turns), Lag())
    shown = [spread.p50 for name in ("ttft", "itl") if (spread := spreads[name]) is not None]
    return Summary(
        server=turns[0].server,
        load=turns[0].load.label,
        requests=len(records),
        succeeded=len(good),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        examples={record.error: record.detail for record in reversed(records) if record.error is not None},
        short=sum(1 for record in good if record.output_tokens is not None and record.tokens < record.wanted),
        seconds=seconds,
        in_flight=_per(sum(in_flight(turn) for turn in turns), seconds),
        request_rate=_per(len(ended), seconds),
        output_tokens=sum(record.tokens for record in good),
        output_rate=_per(sum(tokens_in(turn) for turn in turns), seconds),
        prompt_tokens=sum(prompt_tokens) if prompt_tokens else None,
        good_rate=None if meeting is None else _per(meeting, seconds),
        good_share=None if not goal else _per(sum(1 for record in good if meets(record, goal)), len(records)),
        **spreads,
        late=Spread.of(record.sent - record.scheduled for record in records),
        failed=Spread.of(record.ended - record.sent for record in records if record.error is not None),
        # an answer without text had nothing to count
        source=max((r.source for r in good if r.arrivals), key=_WEAKEST_LAST.index, default="chunks"),
        tokens_per_chunk=_tokens_per_chunk(good),
        speculation=_speculation(good) or _counted(turns),
        lag_p99_ms=lag.percentile_ms(99),
        lag_max_ms=lag.percentile_ms(100),
        client_cpu=lag.busy,
        warning=lag.warning(shown),
    )


@dataclass(frozen=True)
class Category:
    """Prompts of one kind, and what one server made of them under all loads."""

    server: str
    category: str
    requests: int
    ttft: Spread | None
    tpot: Spread | None
    speculation: Speculation | None


def by_category(turns: Sequence[Turn]) -> list[Category]:
    """Of one server's turns; nothing for prompts without a category."""
    found: dict[str, list[Record]] = {}
    for turn in turns:
        for record in turn.records:
            if record.category is not None and record.error is None:
                found.setdefault(record.category, []).append(record)
    return [
        Category(
            server=turns[0].server,
            category=name,
            requests=len(records),
            ttft=spread_of("ttft", records),
            tpot=spread_of("tpot", records),
            speculation=_speculation(records),
        )
        for name, records in found.items()
    ]


TIMES: dict[str, Callable[[Record], list[float | None]]] = {
    "ttft": lambda record: [record.ttft],
    "ttft_sent": lambda record: [record.ttft_sent],
    "tpot": lambda record: [record.tpot],
    "itl": lambda record: list(record.gaps),
    "e2el": lambda record: [record.latency],
}


def times_of(name: str, records: Iterable[Record]) -> list[float]:
    """All times of a kind, in seconds."""
    read = TIMES[name]
    return [each for record in records for each in read(record) if each is not None]


def spread_of(name: str, records: Iterable[Record]) -> Spread | None:
    return Spread.of(times_of(name, records))


def tokens_in(turn: Turn) -> float:
    """That came within the window, of requests that succeeded."""
    return sum(record.tokens_until(turn.closed) for record in turn.records if record.error is None)


def in_flight(turn: Turn) -> float:
    """Seconds that requests of a turn were under way within its window, all of them together."""
    return sum(max(0.0, min(record.ended, turn.closed) - record.sent) for record in turn.records)


def meets(record: Record, goal: Goal) -> bool:
    """Whether a request succeeded in time. One without a time for its goal (a single token has no TPOT) meets it."""
    if record.error is not None:
        return False
    took = ((goal.ttft, record.ttft), (goal.tpot, record.tpot), (goal.e2el, record.latency))
    return all(limit is None or seconds is None or 1e3 * seconds <= limit for limit, seconds in took)


def _per(count: float, whole: float) -> float:
    return count / whole if whole > 0 else 0.0


def _tokens_per_chunk(records: Sequence[Record]) -> float | None:
    counted = [record for record in records if record.output_tokens is not None and record.arrivals]
    chunks = sum(len(record.arrivals) for record in counted)
    return sum(record.tokens for record in counted) / chunks if chunks else None


def _speculation(records: Sequence[Record]) -> Speculation | None:
    told = [record for record in records if record.drafts is not None]
    drafts = [record.drafts for record in told if record.drafts is not None]
    if not drafts:
        return None
    counted = [each.steps for each in drafts if each.steps is not None]
    steps = sum(counted) if len(counted) == len(drafts) else 0
    whole = sum(record.tokens for record in told)
    return Speculation(
        drafted=sum(each.drafted for each in drafts),
        accepted=sum(each.accepted for each in drafts),
        tokens_per_step=whole / steps if steps else None,
        by_drafter=_by_drafter(drafts),
    )


def _counted(turns: Sequence[Turn]) -> Speculation | None:
    """By the server's counters."""
    found = [turn.counters for turn in turns if turn.counters is not None]
    drafted, accepted = sum(each.drafted for each in found), sum(each.accepted for each in found)
    if len(found) < len(turns) or not drafted:
        return None
    drafts = [each.drafts for each in found if each.drafts is not None]
    steps = sum(drafts) if len(drafts) == len(found) else 0.0
    return Speculation(int(drafted), int(accepted), 1.0 + accepted / steps if steps else None, {}, counters=True)


def _by_drafter(drafts: Sequence[Drafts]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for each in drafts:
        for name, counts in each.by_drafter.items():
            drafted, accepted = found.get(name, (0, 0))
            found[name] = (drafted + counts.get("drafted", 0), accepted + counts.get("accepted", 0))
    return found
