"""How long clients wait for tokens: one request's times, and the tallies of all."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import Metric

from decoding.messages import TokenEvent
from server.tallies import Tally, add_tally, histogram

# those of vLLM to which its dashboards look for targets are among them
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 3.5, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0),
)
_TOKEN_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.0035, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.035),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 5.0, 20.0),
)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_CHOICES = (1, 2, 5, 10, 20)


class Latencies:
    """Tallies of all requests that reached the engine."""

    def __init__(self) -> None:
        self.first_token = Tally(SECONDS)
        self.between_events = Tally(_TOKEN_SECONDS)
        self.per_token = Tally(_TOKEN_SECONDS)
        self.end_to_end = Tally(SECONDS)
        self.prefill = Tally(SECONDS)
        self.decode = Tally(SECONDS)
        self.inference = Tally(SECONDS)  # both of them together: vLLM tells it
        self.prompt_tokens = Tally(_TOKENS)
        self.computed_tokens = Tally(_TOKENS)  # of the prompt
        self.output_tokens = Tally(_TOKENS)
        self.longest_output = Tally(_TOKENS)
        self.wanted_tokens = Tally(_TOKENS)
        self.choices = Tally(_CHOICES)

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
                "Of a choice: from its first event to its last, by the tokens after the first event",
                self.per_token,
            ),
            ("e2e_request_latency_seconds", "From a request's arrival to the end of its answer", self.end_to_end),
            ("request_prefill_seconds", "From a request's place in the batch to its first token", self.prefill),
            ("request_decode_seconds", "From a request's first token to its last", self.decode),
            ("request_prompt_tokens", "Prompt tokens of a request", self.prompt_tokens),
            ("request_generation_tokens", "Tokens that a request got", self.output_tokens),
        ):
            family = histogram(f"saccade_{name}", text)
            add_tally(family, [], tally)
            yield family


class RequestTimes:
    """When the tokens of one request came, in seconds of ``time.monotonic``.

    Attributes:
        submitted: when it was handed to the engine.
        scheduled: when its choice that had the first token got its place in the batch; None: no token came.
        first: when the first of all came.
        last: when the last one came.
    """

    def __init__(self, latencies: Latencies, arrived: float, choices: int) -> None:
        self._latencies = latencies
        self.arrived = arrived
        self.submitted = time.monotonic()
        self.scheduled: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self._firsts = [0.0] * choices
        self._lasts = [0.0] * choices
        self._first_tokens = [0] * choices  # of the first event

    def tokens_came(self, choice: int, event: TokenEvent) -> None:
        """An event of a choice; called for each, so it does little."""
        now, before = time.monotonic(), self._lasts[choice]
        self._lasts[choice] = self.last = now
        if before:
            self._latencies.between_events.observe(now - before)
            return
        self._firsts[choice], self._first_tokens[choice] = now, len(event.token_ids)
        if self.first is None:
            # the engine's clock began when the request had reached it: a little after it was submitted
            self.first, self.scheduled = now, min(self.submitted + event.queued_seconds, now)
            self._latencies.first_token.observe(now - self.arrived)

    def end(self, prompt_tokens: int, cached: int, generated: list[int], wanted: int) -> None:
        """The request is over.

        Args:
            cached: tokens of the prompt that came from the prefix cache.
            generated: tokens of each choice.
            wanted: of each choice at most.
        """
        latencies = self._latencies
        times = zip(self._firsts, self._lasts, self._first_tokens, generated, strict=True)
        for first, last, at_first, tokens in times:
            if tokens > at_first > 0:
                latencies.per_token.observe((last - first) / (tokens - at_first))
        if self.first is None or self.last is None or self.scheduled is None:
            return
        latencies.end_to_end.observe(time.monotonic() - self.arrived)
        latencies.prefill.observe(self.first - self.scheduled)
        latencies.decode.observe(self.last - self.first)
        latencies.inference.observe(self.last - self.scheduled)
        latencies.prompt_tokens.observe(prompt_tokens)
        latencies.computed_tokens.observe(prompt_tokens - cached)
        latencies.output_tokens.observe(sum(generated))
        latencies.longest_output.observe(max(generated))
        latencies.wanted_tokens.observe(wanted)
        latencies.choices.observe(len(generated))
