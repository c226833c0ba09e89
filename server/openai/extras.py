"""What answers have beside OpenAI's fields, for those who ask: token ids and the prompt's logprobs, as vLLM names and
forms them, and the trace of the steps.
"""

from __future__ import annotations

import asyncio
from typing import Any

from decoding.messages import StepTrace, TokenLogprobs
from decoding.text import Tokenizer
from server.openai.choice_output import ChoiceOutput, Delta
from server.openai.generation import Generation
from server.openai.rendering import finite, token_name

CONFIDENCE_DIGITS = 4


def prompt_ids(delta: Delta) -> dict[str, Any]:
    """The prompt's tokens, with the first of what continues it."""
    return {} if delta.prompt_ids is None else {"prompt_token_ids": list(delta.prompt_ids)}


def token_ids(delta: Delta) -> dict[str, Any]:
    """What the delta is made of; a choice's."""
    return {} if delta.token_ids is None else {"token_ids": list(delta.token_ids)}


async def prompt_logprobs(tokenizer: Tokenizer, generation: Generation) -> list[list[dict[str, Any] | None]] | None:
    """Of each prompt, when it has run; None: nobody asked."""
    top = generation.options.prompt_logprobs
    if top is None:
        return None
    return await asyncio.to_thread(
        lambda: [[_alternatives(tokenizer, each, top) for each in run.logprobs or ()] for run in generation.prompts]
    )


async def trace(tokenizer: Tokenizer, generation: Generation) -> dict[str, Any]:
    """``speculation_trace``, which stands beside usage, if it was asked for."""
    if not any(run.request.speculation.trace for run in generation.prompts):
        return {}
    choices = enumerate(generation.returned)
    told = await asyncio.to_thread(lambda: [_choice_trace(tokenizer, index, choice) for index, choice in choices])
    return {"speculation_trace": told}


def _alternatives(tokenizer: Tokenizer, entry: TokenLogprobs | None, top: int) -> dict[str, Any] | None:
    """The token itself and the likeliest others, by their ids; None for the prompt's first token."""
    if entry is None:
        return None
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:top], start=1)]
    told: dict[str, Any] = {}
    for token, logprob, rank in ranked:
        known = {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token)}
        told.setdefault(str(token), known)
    return told


def _choice_trace(tokenizer: Tokenizer, index: int, choice: ChoiceOutput) -> dict[str, Any]:
    return {"index": index, "steps": [_step(tokenizer, step) for step in choice.trace]}


def _step(tokenizer: Tokenizer, step: StepTrace) -> dict[str, Any]:
    return {
        "position": step.position,
        "tokens": list(step.tokens),
        "texts": [token_name(tokenizer, token) for token in step.tokens],
        "parents": list(step.parents),
        "confidence": [round(each, CONFIDENCE_DIGITS) for each in step.confidence],
        "drafters": [list(names) for names in step.drafters],
        "accepted": list(step.accepted),
        "bonus": step.bonus,
    }
