"""How long clients wait for tokens: one request's times, and the tallies of all."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import Metric

from server.tallies import Tally, add_tally, histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1.0,
    5.0,
    20.0,
)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Latencies:
    """Tallies of all requests that reached the engine."""

    def __init__(self) -> None:
        self.first_token = Tally(_SECONDS)
        self.between_events = Tally(_TOKEN_SECONDS)
        self.per_token = Tally(_TOKEN_SECONDS)
        self.end_to_end = Tally(_SECONDS)
        self.prompt_tokens = Tally(_TOKENS)
        self.output_tokens = Tally(_TOKENS)

    def families(self) -> Iterator[Metric]:
        for name, text, tally in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token", self.first_token),
            (
                "inter_token_latency_seconds",
                "Between two events of a choice, of any number of tokens each",
                self.between_events,
            ),
            (
                "time_per_output_token_seconds",
                "Of a choice: from its first event to its last, by its tokens but one",
                self.per_token,
            ),
            ("e2e_request_latency_seconds", "From a request's arrival to the end of its answer", self.end_to_end),
            ("request_prompt_tokens", "Prompt tokens of a request", self.prompt_tokens),
            ("request_generation_tokens", "Tokens that a request got", self.output_tokens),
        ):
            family = histogram(f"saccade_{name}", text)
            add_tally(family, [], tally)
            yield family


class RequestTimes:
    """When the tokens of one request came, in seconds of ``time.monotonic``.

    Attributes:
        first: when the first of all came.
    """

    def __init__(self, latencies: Latencies, arrived: float, choices: int) -> None:
        self._latencies = latencies
        self.arrived = arrived
        self.first: float | None = None
        self._firsts = [0.0] * choices
        self._lasts = [0.0] * choices

    def tokens_came(self, choice: int) -> None:
        """An event of a choice; called for each, so it does little."""
        now, before = time.monotonic(), self._lasts[choice]
        self._lasts[choice] = now
        if before:
            self._latencies.between_events.observe(now - before)
            return
        self._firsts[choice] = now
        if self.first is None:
            self.first = now
            self._latencies.first_token.observe(now - self.arrived)

    def end(self, prompt_tokens: int, generated: list[int]) -> None:
        """The request is over.

        Args:
            generated: tokens of each choice.
        """
        latencies = self._latencies
        for first, last, tokens in zip(self._firsts, self._lasts, generated, strict=True):
            if tokens > 1 and first:
                latencies.per_token.observe((last - first) / (tokens - 1))
        if self.first is not None:
            latencies.end_to_end.observe(time.monotonic() - self.arrived)
            latencies.prompt_tokens.observe(prompt_tokens)
            latencies.output_tokens.observe(sum(generated))
