"""A line for every request when it has been answered: what it was, how it ended, what it cost. Never what it said."""

from __future__ import annotations

import logging
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from server.account import Account, Generated
from server.log import REQUESTS

log = logging.getLogger(REQUESTS)

# W3C Trace Context: version, trace id, parent id, flags; ids of zeros are invalid
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def log_request(account: Account, scope: Scope | None = None) -> None:
    """Write the line, unless nobody reads such lines."""
    if not log.isEnabledFor(logging.INFO):
        return
    fields = fields_of(account)
    if scope is not None and (trace := _trace_id(scope)) is not None:
        fields["trace_id"] = trace
    more = ""
    if account.generated is not None:
        more = f", {fields['prompt_tokens']} + {fields['completion_tokens']} tokens"
    if account.error is not None:
        more += f", {account.error.code}"
    log.info(
        "request   %s %s %s %d in %.3f s%s",
        account.request_id,
        account.method,
        account.route,
        account.status,
        account.seconds,
        more,
        extra={"fields": fields},
    )


def fields_of(account: Account) -> dict[str, Any]:
    """An account as the fields of its line; times in seconds."""
    fields: dict[str, Any] = {
        "request_id": account.request_id,
        "method": account.method,
        "route": account.route,
        "status": account.status,
        "duration": round(account.seconds, 6),
    }
    if account.generated is not None:
        fields |= _generated(account.generated) | {"finish_reasons": account.finish_reasons}
    if account.error is not None:
        fields["error"] = account.error.code
        if account.error.limit:
            fields["limit"] = account.error.limit
    return fields


def _generated(generated: Generated) -> dict[str, Any]:
    generation, times, first = generated.generation, generated.times, generated.first_token_seconds
    speculation = generation.speculation()
    fields: dict[str, Any] = {
        "model": generated.model,
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "completion_tokens": generation.completion_tokens,
        "queued": None if times.scheduled is None else round(times.scheduled - times.submitted, 6),
        "time_to_first_token": None if first is None else round(first, 6),
    }
    if speculation is not None:
        fields |= {"steps": speculation.steps, "drafted": speculation.drafted, "accepted": speculation.accepted}
    return fields


def _trace_id(scope: Scope) -> str | None:
    """Of the trace that the client's own span belongs to."""
    found = _TRACEPARENT.fullmatch(Headers(scope=scope).get("traceparent", "").strip())
    return None if found is None else found[1]
