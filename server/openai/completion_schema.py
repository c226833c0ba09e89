"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from decoding.errors import RequestError
from decoding.request import MAX_LOGPROBS
from server.openai.fields import Integer, SamplingFields

MAX_PROMPTS = 1024
MAX_CHOICES = 1024  # prompts x n
DEFAULT_MAX_TOKENS = 16

PromptForm = str | list[int]
_TokenIds = Annotated[list[int], Field(min_length=1)]
_SeveralTexts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
_SeveralTokenIds = Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
AnyPrompt = str | _TokenIds | _SeveralTexts | _SeveralTokenIds  # as clients may write it


def _parse_prompt(value: Any) -> list[PromptForm]:
    """OpenAI's four forms as a list of prompts; one check in place of a union, whose errors would list every item."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _not_a_prompt()
    if _are_token_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("too_many_prompts", f"a request can have at most {MAX_PROMPTS} prompts")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and item and _are_token_ids(item) for item in value):
        return value
    raise _not_a_prompt()


def _are_token_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)  # a bool is an int, and no token id


def _not_a_prompt() -> PydanticCustomError:
    forms = "a string, an array of strings, an array of token ids, or an array of arrays of token ids"
    return PydanticCustomError("prompt_form", f"it must be {forms}, and not be empty")


class CompletionFields(SamplingFields):
    prompt: Annotated[list[PromptForm], PlainValidator(_parse_prompt, json_schema_input_type=AnyPrompt)]
    echo: bool | None = None
    logprobs: Integer | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        if self.suffix is not None:
            raise RequestError(
                "This model cannot fill in text before a suffix; leave suffix out.",
                param="suffix",
                code="unsupported_parameter",
            )
        if self.choices * len(self.prompt) > MAX_CHOICES:
            raise RequestError(f"A request can have at most {MAX_CHOICES} choices (prompts times n).", param="n")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs must be in [0, {MAX_LOGPROBS}], not {self.logprobs}.", param="logprobs")

    @property
    def prompt_only(self) -> bool:
        """``echo`` with ``max_tokens: 0``: the prompt and its logprobs are all that is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def token_limit(self) -> int:
        """max_tokens for the engine, which always makes one token at least."""
        if self.prompt_only:
            return 1
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
