"""The request fields that both endpoints share, with OpenAI's and vLLM's names, and what becomes of them.

Types are strict here (no "5" for 5, no true for 1). Ranges are checked where they are defined, in decoding/request.py.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StrictBool, Tag
from pydantic_core import PydanticCustomError

from decoding.acceptance import Acceptance
from decoding.errors import RequestError
from decoding.request import MAX_LOGPROBS, SamplingParams, SpeculationParams

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 4096
MAX_NAME_CHARS = 256
MAX_TEXT_PARTS = 1024
MAX_ALLOWED_TOKENS = 2**16
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_TRACED_CHOICES = 8  # a trace is some hundred times as long as the text
SEED_BITS = 53  # of seeds drawn here: they come back in JSON, and JavaScript's numbers hold no more

Integer = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]


def _as_list(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("stop_form", "it must be a string or an array of strings")
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Stop = Annotated[StopStrings, BeforeValidator(_as_list, json_schema_input_type=StopString | StopStrings)]


BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]], Field(max_length=MAX_BAD_WORDS)
]


class Fields(BaseModel):
    """Base of what is parsed from a client; its subclasses' unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; accepted and not done


class AcceptanceFields(Fields):
    rule: Name
    epsilon: float | None = None
    delta: float | None = None
    bonus: Name | None = None

    def acceptance(self) -> Acceptance:
        """The rule, with its defaults for what the client left out."""
        return Acceptance(**self.model_dump(exclude_none=True))


class SpeculationFields(Fields):
    enabled: bool | None = None
    drafters: Annotated[list[Name], Field(max_length=64)] | None = None
    max_nodes: Integer | None = None
    max_depth: Integer | None = None
    acceptance: AcceptanceFields | None = None
    coupling: bool | None = None
    trace: bool | None = None

    def params(self) -> SpeculationParams:
        """The engine's parameters."""
        return SpeculationParams(
            enabled=self.enabled is not False,
            drafters=None if self.drafters is None else tuple(self.drafters),
            max_nodes=self.max_nodes,
            max_depth=self.max_depth,
            acceptance=None if self.acceptance is None else self.acceptance.acceptance(),
            coupling=self.coupling,
            trace=bool(self.trace),
        )


class TextPart(Fields):
    type: Literal["text"]
    text: str


def as_parts(value: Any) -> Any:
    """Text as a string or in parts, before it is checked: as parts."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("content_form", "it must be a string or an array of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


PredictedParts = Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS)]


class PredictionFields(Fields):
    """The text that the client expects; parts are put together as they are."""

    type: Literal["content"]
    content: Annotated[PredictedParts, BeforeValidator(as_parts, json_schema_input_type=str | PredictedParts)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


def _speculation_form(value: Any) -> Literal["switch", "limits"] | None:
    if isinstance(value, bool):
        return "switch"
    return "limits" if isinstance(value, dict | SpeculationFields) else None


# `"speculation": false | true | {"drafters": [...], "max_nodes": n, ...}`
Speculation = Annotated[
    Annotated[StrictBool, Tag("switch")] | Annotated[SpeculationFields, Tag("limits")],
    Discriminator(
        _speculation_form,
        custom_error_type="speculation_form",
        custom_error_message='it must be true, false, or an object such as {"drafters": ["ngram"], "max_nodes": 8}',
    ),
]


class DrawFields(Fields):
    """Fields of all endpoints that generate. ``None`` is a field that was left out, as in OpenAI's API."""

    model: Name | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Integer], Field(max_length=1024)] | None = None
    seed: Integer | None = None
    stream: bool | None = None
    speculation: Speculation | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    prediction: PredictionFields | None = None


class SamplingFields(DrawFields):
    """Fields of completions and chat."""

    max_tokens: Integer | None = None
    allowed_token_ids: Annotated[list[Integer], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: BadWords | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: Integer | None = None
    prompt_logprobs: Integer | None = None
    truncate_prompt_tokens: Integer | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    stream_options: StreamOptions | None = None

    def check_combinations(self) -> None:
        """Check what no single field shows.

        Raises:
            RequestError: fields that do not go together.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options can only be given with stream: true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            message = "prompt_logprobs cannot be streamed; leave stream out, or use echo with logprobs."
            raise RequestError(message, param="prompt_logprobs")
        check_count("prompt_logprobs", self.prompt_logprobs)
        self._check_truncation()
        if self.speculation_params().trace and self.drawn * self.prompts > MAX_TRACED_CHOICES:
            message = f"A trace can be told of {MAX_TRACED_CHOICES} choices at most (prompts times n)."
            raise RequestError(message, param="speculation.trace")

    def _check_truncation(self) -> None:
        wanted = self.truncate_prompt_tokens
        if wanted is None and self.truncation_side is not None:
            message = "truncation_side can only be given with truncate_prompt_tokens."
            raise RequestError(message, param="truncation_side")
        if wanted is not None and wanted != -1 and wanted < 1:
            message = f"truncate_prompt_tokens must be -1 (what the context holds) or at least 1, not {wanted}."
            raise RequestError(message, param="truncate_prompt_tokens")

    def truncated(self, ids: tuple[int, ...], room: int) -> tuple[int, ...]:
        """A prompt's tokens without those that truncate_prompt_tokens cuts off.

        Args:
            room: tokens that the context has for a prompt.
        """
        wanted = self.truncate_prompt_tokens
        if wanted is None:
            return ids
        kept = max(room, 1) if wanted == -1 else wanted
        return ids[:kept] if self.truncation_side == "right" else ids[-kept:]

    def sampling_params(
        self,
        defaults: dict[str, float],
        *,
        max_tokens: int,
        seed: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        bad_words: tuple[tuple[int, ...], ...] = (),
        stop_token_ids: tuple[int, ...] = (),
    ) -> SamplingParams:
        """The engine's parameters; ``defaults`` (of the model) fill what the client left out.

        Args:
            prompt_logprobs: of a prompt that is echoed.
            bad_words: the tokens of the client's.
            stop_token_ids: beside the client's.

        Raises:
            RequestError: a key of logit_bias is no token id.
        """
        neutral, scored = SamplingParams(), (prompt_logprobs, self.prompt_logprobs)

        def chosen(name: str) -> float:
            given = getattr(self, name)
            return float(defaults.get(name, getattr(neutral, name)) if given is None else given)

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=chosen("temperature"),
            top_k=self.top_k if self.top_k is not None else int(defaults.get("top_k", neutral.top_k)),
            top_p=chosen("top_p"),
            min_p=chosen("min_p"),
            repetition_penalty=chosen("repetition_penalty"),
            presence_penalty=chosen("presence_penalty"),
            frequency_penalty=chosen("frequency_penalty"),
            logit_bias=_token_keys(self.logit_bias or {}),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=(*(self.stop_token_ids or ()), *stop_token_ids),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=bad_words,
            seed=seed,
            n=self.drawn,
            logprobs=logprobs,
            prompt_logprobs=max([each for each in scored if each is not None], default=None),
        )

    @property
    def choices(self) -> int:
        """How many are returned for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def drawn(self) -> int:
        """How many the engine makes for each prompt."""
        return self.choices

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return 1

    def resolved_seed(self, default: int | None) -> int:
        """The client's seed, else the server's, else a random one; one for all choices and prompts of a request."""
        if self.seed is not None:
            return self.seed
        return secrets.randbits(SEED_BITS) if default is None else default

    def speculation_params(self) -> SpeculationParams:
        given = self.speculation
        if given is None or isinstance(given, bool):
            return SpeculationParams(enabled=given is not False)
        return given.params()


def check_count(name: str, value: int | None) -> None:
    """Check how many logprobs are asked for.

    Raises:
        RequestError: naming the field.
    """
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise RequestError(f"{name} must be in [0, {MAX_LOGPROBS}], not {value}.", param=name)


def _token_keys(logit_bias: dict[str, float]) -> dict[int, float]:
    for key in logit_bias:
        if not key.isascii() or not key.isdigit() or len(key) > 19 or key != str(int(key)):
            raise RequestError('the keys of logit_bias must be token ids, as in {"50256": -100}.', param="logit_bias")
    return {int(key): bias for key, bias in logit_bias.items()}
