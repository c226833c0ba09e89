"""Logprobs of tokens, in the form of chat."""

from __future__ import annotations

from typing import Any

from decoding.text import Tokenizer
from server.openai.choice_output import ScoredToken
from server.openai.rendering import finite, token_name


def scored_token(tokenizer: Tokenizer, token: ScoredToken, alternatives: int) -> dict[str, Any]:
    """A returned token, with as many of the likeliest ones at its place."""
    top = [_entry(tokenizer, other, logprob) for other, logprob in token.top[:alternatives]]
    return {**_entry(tokenizer, token.token_id, token.logprob or 0.0), "top_logprobs": top}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    spelled = list(tokenizer.token_bytes(token_id))
    return {"token": token_name(tokenizer, token_id), "logprob": finite(logprob), "bytes": spelled}
