"""What both endpoints' answers are made of: the head, usage, and tokens as text."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from decoding.acceptance import LOSSY
from decoding.messages import DrafterStats
from decoding.text import Tokenizer
from server.openai.fields import StreamOptions
from server.openai.generation import Generation

LOWEST_LOGPROB = -9999.0  # JSON has no -inf
PREDICTION = "prediction"  # the drafter whose account OpenAI has fields for


@dataclass(frozen=True)
class Head:
    """What is the same in every chunk of an answer."""

    model: str
    seed: int
    prefix: str  # "cmpl" or "chatcmpl"
    fingerprint: str | None = None  # OpenAI's system_fingerprint
    created: int = field(default_factory=lambda: int(time.time()))
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def id(self) -> str:
        return f"{self.prefix}-{self.token}"

    def payload(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer's or the chunk's JSON, without usage."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "seed": self.seed}
        return {**head, "system_fingerprint": self.fingerprint, "choices": choices}


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's usage, with ``speculation`` once a choice has ended: what was drafted, what was accepted, by whom,
    and by which rule.

    ``tokens_per_step`` counts what the engine generated, so that a stop string, which cuts what is returned, does not
    make speculation look worse.
    """
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    account: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }
    stats = generation.speculation()
    if stats is not None:
        ended = sum(choice.generated for choice in generation.choices if choice.speculation is not None)
        account["speculation"] = {
            "steps": stats.steps,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "tokens_per_step": round(ended / stats.steps, 4) if stats.steps else 0.0,
            "by_drafter": {
                name: {"drafted": each.drafted, "accepted": each.accepted} for name, each in stats.by_drafter.items()
            },
            "acceptance": stats.acceptance,
            "lossy": stats.acceptance in LOSSY,
        }
    details = _reasoning_details(generation)
    if stats is not None and generation.predicted:
        details |= _prediction_details(stats.by_drafter.get(PREDICTION, DrafterStats()))
    return {**account, "completion_tokens_details": details} if details else account


def _reasoning_details(generation: Generation) -> dict[str, int]:
    """OpenAI's count of the tokens that came before the answers, where they can be told from them."""
    counts = [choice.reasoning_tokens for choice in generation.choices if choice.reasoning_tokens is not None]
    return {"reasoning_tokens": sum(counts)} if counts else {}


def usage_so_far(generation: Generation, index: int, *, begins: bool) -> dict[str, int]:
    """What one choice has come to, as vLLM tells it in every chunk of a stream."""
    prompt, returned = generation.so_far(index)
    completion = 0 if begins else returned
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _prediction_details(mine: DrafterStats) -> dict[str, int]:
    """OpenAI's: tokens of the text that were drafted from the prediction, and those that were drafted in vain."""
    return {"accepted_prediction_tokens": mine.accepted, "rejected_prediction_tokens": mine.drafted - mine.accepted}


@dataclass(frozen=True)
class StreamUsage:
    """When a stream tells its usage."""

    final: bool = False  # in a chunk of its own at the end
    continuous: bool = False  # in every chunk, that choice's own so far

    @classmethod
    def of(cls, options: StreamOptions | None) -> StreamUsage:
        if options is None:
            return cls()
        return cls(bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats))


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one that is no whole character is written ``bytes:\\xe2\\x80``, so that no two look the same."""
    spelled = tokenizer.token_bytes(token_id)
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)
