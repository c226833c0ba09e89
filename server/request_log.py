"""A line for every request when it has been answered: what it was, how it ended, what it cost. Never what it said."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import Scope

from server.account import Account, Generated

REQUESTS = "saccade.requests"

log = logging.getLogger(REQUESTS)


def log_request(account: Account, scope: Scope) -> None:
    """Write the line, unless nobody reads such lines."""
    if not log.isEnabledFor(logging.INFO):
        return
    fields = fields_of(account)
    tokens = ""
    if account.generated is not None:
        tokens = f", {fields['prompt_tokens']} + {fields['completion_tokens']} tokens"
    log.info(
        "request   %s %s %s %d in %.3f s%s",
        account.request_id,
        account.method,
        account.route,
        account.status,
        account.seconds,
        tokens,
        extra={"fields": fields},
    )


def fields_of(account: Account) -> dict[str, Any]:
    """An account as the fields of its line; times in seconds."""
    fields = {
        "request_id": account.request_id,
        "method": account.method,
        "route": account.route,
        "status": account.status,
        "duration": round(account.seconds, 6),
    }
    return fields if account.generated is None else fields | _generated(account.generated)


def _generated(generated: Generated) -> dict[str, Any]:
    generation, first = generated.generation, generated.first_token_seconds
    speculation = generation.speculation()
    fields: dict[str, Any] = {
        "model": generated.model,
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "completion_tokens": generation.completion_tokens,
        "time_to_first_token": None if first is None else round(first, 6),
        "finish_reasons": generated.finish_reasons,
    }
    if speculation is not None:
        fields |= {"steps": speculation.steps, "drafted": speculation.drafted, "accepted": speculation.accepted}
    return fields if generated.error is None else fields | {"error": generated.error}
