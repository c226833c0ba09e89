"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from decoding.errors import RequestError
from decoding.request import MAX_LOGPROBS
from server.openai.fields import MAX_TEXT_PARTS, Fields, Integer, Name, SamplingFields, TextPart, as_parts

MAX_MESSAGES = 4096


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_TEXT_PARTS)]


class Message(Fields):
    """One message. Its text may come as a string or in text parts."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(as_parts, json_schema_input_type=str | Parts)]
    name: Name | None = None
    refusal: None = None
    audio: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it; "developer" is OpenAI's newer word for "system"."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "\n".join(part.text for part in self.content)}
        return message if self.name is None else {**message, "name": self.name}


class ChatFields(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        if self.top_logprobs is None:
            return
        if not self.logprobs:
            raise RequestError("top_logprobs can only be given with logprobs: true.", param="top_logprobs")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"top_logprobs must be in [0, {MAX_LOGPROBS}], not {self.top_logprobs}.", param="top_logprobs"
            )

    @property
    def scored(self) -> int | None:
        """How many alternatives are to be scored at each token; None: nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit_field(self) -> str:
        """The name that the client used for max_tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def token_limit(self, room: int) -> int:
        """max_tokens, by its new or its old name; by default what the context still holds."""
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(room, 1) if given is None else given
