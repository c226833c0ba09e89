"""What is told of a request when it has been answered: to metrics, to the log, to traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from starlette.types import Scope

from server.errors import reply_to
from server.latencies import RequestTimes
from server.openai.generation import Generation

_GENERATED = "generated"


class Generated:
    """The part of a request that ran in the engine.

    Args:
        model: the name that the answer carries.
    """

    def __init__(self, model: str, generation: Generation, times: RequestTimes) -> None:
        self.model = model
        self.generation = generation
        self._times = times
        self.prompt = generation.prompts[0].request

    @property
    def first_token_seconds(self) -> float | None:
        """From the request's arrival; None: there was none."""
        return None if self._times.first is None else self._times.first - self._times.arrived

    @property
    def finish_reasons(self) -> list[str]:
        """Of the choices; one that was not finished met an error, or was cancelled: by its client or a deadline."""
        other = "cancelled" if self.generation.failure is None else "error"
        return [choice.finish_reason or other for choice in self.generation.choices]

    @property
    def error(self) -> str | None:
        """The code of the error that ended it, also in the middle of a stream; None: there was none."""
        failure = self.generation.failure
        return None if failure is None else reply_to(failure).code

    def end(self) -> None:
        """The answer has been sent."""
        self._times.end(self.generation.prompt_tokens, [choice.generated for choice in self.generation.choices])


@dataclass(frozen=True)
class Account:
    """One answered request.

    Attributes:
        route: its pattern, such as "/v1/models/{model}".
        status: of the answer; 499 if there was none, as the client had left.
        seconds: from its arrival to the end of the answer.
        generated: what the engine did for it; None: it did not come so far.
    """

    request_id: str
    method: str
    route: str
    status: int
    seconds: float
    generated: Generated | None


def keep_generated(scope: Scope, generated: Generated) -> None:
    """Where ``generated_of`` finds it."""
    scope.setdefault("state", {})[_GENERATED] = generated


def generated_of(scope: Scope) -> Generated | None:
    """What the engine did for a request."""
    return cast("Generated | None", scope["state"].get(_GENERATED))
