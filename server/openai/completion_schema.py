"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from decoding.errors import RequestError
from server.openai.fields import Integer, SamplingFields, check_count
from server.openai.structured import StructuredFields

MAX_PROMPTS = 1024
MAX_CHOICES = 1024  # prompts x n, or best_of
MAX_BEST_OF = 128  # as n
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
    return set(map(type, value)) == {int}  # a bool is an int, and no token id; a million items take 20 ms


def _not_a_prompt() -> PydanticCustomError:
    forms = "a string, an array of strings, an array of token ids, or an array of arrays of token ids"
    return PydanticCustomError("prompt_form", f"it must be {forms}, and not be empty")


class CompletionFields(StructuredFields, SamplingFields):
    prompt: Annotated[list[PromptForm], PlainValidator(_parse_prompt, json_schema_input_type=AnyPrompt)]
    best_of: Integer | None = None
    echo: bool | None = None
    logprobs: Integer | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        self._check_best_of()
        if self.suffix:
            for name in ("echo", "truncate_prompt_tokens"):
                if getattr(self, name):
                    raise RequestError(f"{name} cannot be given with suffix; leave one of them out.", param=name)
        if self.drawn * self.prompts > MAX_CHOICES:
            name = "best_of" if self.ranked else "n"
            raise RequestError(f"A request can have at most {MAX_CHOICES} choices (prompts times {name}).", param=name)
        check_count("logprobs", self.logprobs)

    def _check_best_of(self) -> None:
        if self.best_of is None:
            return
        if self.choices < 1:
            raise RequestError(f"n must be at least 1, not {self.choices}.", param="n")
        if not self.choices <= self.best_of <= MAX_BEST_OF:
            message = f"best_of must be in [n, {MAX_BEST_OF}], not {self.best_of}; n is {self.choices}."
            raise RequestError(message, param="best_of")
        if self.ranked and self.stream:
            message = "best_of cannot be streamed: which choices are the best shows at their end. Leave stream out."
            raise RequestError(message, param="best_of")

    @property
    def ranked(self) -> bool:
        """More choices may be made than are returned: the best ones, best first."""
        return self.best_of is not None and self.best_of > 1

    @property
    def drawn(self) -> int:
        return self.choices if self.best_of is None else self.best_of

    @property
    def prompts(self) -> int:
        return len(self.prompt)

    @property
    def engine_logprobs(self) -> int | None:
        """What the engine is asked for: choices are ranked by their logprobs."""
        return 0 if self.logprobs is None and self.ranked else self.logprobs

    @property
    def prompt_only(self) -> bool:
        """``echo`` with ``max_tokens: 0``: the prompt and its logprobs are all that is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def token_limit(self) -> int:
        """max_tokens for the engine, which always makes one token at least."""
        if self.prompt_only:
            return 1
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
