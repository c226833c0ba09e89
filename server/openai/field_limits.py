"""What an operator allows less of than the API does."""

from __future__ import annotations

from decoding.errors import RequestError
from server.limits import Limits
from server.openai.fields import SamplingFields


def check_limits(fields: SamplingFields, limits: Limits) -> None:
    """Check counts whose cost is the server's.

    Raises:
        RequestError: naming the field that asks for too much.
    """
    alternatives = "top_logprobs" if getattr(fields, "top_logprobs", None) is not None else "logprobs"
    asked = getattr(fields, alternatives, None)
    for name, count, most in (
        ("n", fields.choices, limits.max_n),
        ("best_of", fields.drawn, limits.max_n),
        ("stop", len(fields.stop or ()), limits.max_stop),
        (alternatives, asked if isinstance(asked, int) else 0, limits.max_logprobs),
        ("prompt_logprobs", fields.prompt_logprobs or 0, limits.max_logprobs),
    ):
        if count > most:
            raise RequestError(f"{name}: this server allows at most {most}.", param=name)
