"""What a server's own counters say of speculation, for servers that say it nowhere else.

``/metrics`` is read before and after each turn, for vLLM's names, which llama.cpp has as well. Other clients' requests
are in these numbers, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load.client import LoadClient

SECONDS = 5.0  # for an answer; the next turn waits for it
_PREFIXES = ("vllm:", "llamacpp:")
_DRAFTS, _DRAFTED, _ACCEPTED = (f"spec_decode_num_{each}" for each in ("drafts", "draft_tokens", "accepted_tokens"))


@dataclass(frozen=True)
class Counters:
    """Sums over a time; at first, since the server began.

    Attributes:
        drafts: sequences' steps with drafts; None: the server does not count them.
    """

    drafted: float
    accepted: float
    drafts: float | None

    def since(self, before: Counters) -> Counters:
        """What was counted from then on."""
        drafts = None if self.drafts is None or before.drafts is None else self.drafts - before.drafts
        return Counters(self.drafted - before.drafted, self.accepted - before.accepted, drafts)


def counters_in(text: str) -> Counters | None:
    """Those of all engines together, in Prometheus' text format; None: there are none, or it is another format."""
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                prefix = next((each for each in _PREFIXES if sample.name.startswith(each)), None)
                if prefix is not None:
                    name = sample.name.removeprefix(prefix).removesuffix("_total")
                    sums[name] = sums.get(name, 0.0) + sample.value
    except ValueError:
        return None
    if _DRAFTED not in sums or _ACCEPTED not in sums:
        return None
    return Counters(sums[_DRAFTED], sums[_ACCEPTED], sums.get(_DRAFTS))


async def read_counters(client: LoadClient) -> Counters | None:
    """A server's counters now; None: it tells none."""
    try:
        answer = await client.get("/metrics", SECONDS)
    except httpx.TransportError:
        return None
    return counters_in(answer.text) if answer.status_code == 200 else None
