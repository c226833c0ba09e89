"""What is told of a request when it has been answered: to metrics, to the log, to traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from starlette.types import Scope

from server.errors import ErrorReply
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
        self.times = times
        self.prompt = generation.prompts[0].request

    @property
    def first_token_seconds(self) -> float | None:
        """From the request's arrival; None: there was none."""
        return None if self.times.first is None else self.times.first - self.times.arrived

    def end(self) -> None:
        """The answer has been sent."""
        generated = [choice.generated for choice in self.generation.choices]
        prompt_tokens, cached = self.generation.prompt_tokens, self.generation.cached_tokens
        self.times.end(prompt_tokens, cached, generated, self.prompt.params.max_tokens)


@dataclass(frozen=True)
class Account:
    """One answered request.

    Attributes:
        route: its pattern, such as "/v1/models/{model}".
        status: of the answer; 499 if there was none, as the client had left.
        seconds: from its arrival to the end of the answer.
        generated: what the engine did for it; None: it did not come so far.
        error: what the answer, or its stream, ended with; None: there was none.
    """

    request_id: str
    method: str
    route: str
    status: int
    seconds: float
    generated: Generated | None = None
    error: ErrorReply | None = None

    @property
    def finish_reasons(self) -> list[str]:
        """Of the choices: as answers tell them; else what ended one: an error, a deadline, or that the client left."""
        if self.generated is None:
            return []
        other = "cancelled"
        if self.error is not None:
            other = "deadline" if self.error.code == "deadline_exceeded" else "error"
        return [choice.finish_reason or other for choice in self.generated.generation.choices]


def keep_generated(scope: Scope, generated: Generated) -> None:
    """Where ``generated_of`` finds it."""
    scope.setdefault("state", {})[_GENERATED] = generated


def generated_of(scope: Scope) -> Generated | None:
    """What the engine did for a request."""
    return cast("Generated | None", scope["state"].get(_GENERATED))
