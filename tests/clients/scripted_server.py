"""The HTTP application on an engine that follows a script: it repeats the prompt, and does on request what a healthy
engine does not.

    python -m tests.clients.scripted_server

A prompt that contains one of these words makes it happen; whatever else the prompt says tells requests apart.

``fail midway``: the engine gives up on the request after two tokens.
``busy once``: the first request with this very prompt is refused as by an overloaded server (503).
``think long``: half a minute passes before the first token.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from decoding.messages import SpeculationStats, TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest
from server.auth import collect_keys
from server.errors import UnavailableError
from server.fake_client import Line, Pause
from server.security import Security
from server.settings import ServerSettings
from tests.api.harness import fake, live, scored, tokenizer
from tests.clients.judge import BUSY_ONCE, FAIL_MIDWAY, MODEL, THINK_LONG

LONG_SECONDS = 30.0


class Playwright:
    """Writes each request's script."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, request: GenerateRequest) -> Iterator[Line]:
        text = tokenizer().decode(request.prompt_ids)
        if BUSY_ONCE in text and text not in self._seen:
            self._seen.add(text)
            raise UnavailableError("There is too much to do; try again in a moment.")
        if THINK_LONG in text:
            yield Pause(LONG_SECONDS)
        for place in range(request.params.max_tokens):
            for choice in range(request.params.n):
                if FAIL_MIDWAY in text and place == 2:
                    yield _given_up(request, choice)
                else:
                    yield _event(request, choice, place)


def _event(request: GenerateRequest, choice: int, place: int) -> TokenEvent:
    token = request.prompt_ids[place % len(request.prompt_ids)]
    first, last = place == 0, place == request.params.max_tokens - 1
    return TokenEvent(
        request.request_id,
        choice,
        (token,),
        logprobs=_scores([token], request.params.logprobs),
        prompt_logprobs=_prompt_scores(request) if first and choice == 0 else None,
        finish_reason="length" if last else None,
        seed=request.params.seed if first else None,
        speculation=SpeculationStats(steps=request.params.max_tokens) if last else None,
    )


def _given_up(request: GenerateRequest, choice: int) -> TokenEvent:
    return TokenEvent(request.request_id, choice, (), finish_reason="error", error="The engine lost this request.")


def _scores(tokens: Sequence[int], alternatives: int | None) -> tuple[TokenLogprobs, ...] | None:
    if alternatives is None:
        return None
    others = [(other, -1.0 - other) for other in range(alternatives)]
    return tuple(scored(token, -0.5, others) for token in tokens)


def _prompt_scores(request: GenerateRequest) -> tuple[TokenLogprobs | None, ...] | None:
    scores = _scores(request.prompt_ids[1:], request.params.prompt_logprobs)
    return None if scores is None else (None, *scores)


def main() -> int:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, choices=(0,), default=0, help="0: a free one")
    parser.parse_args()
    keys = collect_keys((), None, os.environ.get("SACCADE_API_KEY"))
    with live(fake(Playwright()), ServerSettings(model_names=(MODEL,), security=Security(api_keys=keys))) as url:
        print(f"ready     {url}/v1", file=sys.stderr, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # in all threads to come: main waits
    sys.exit(main())
