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
from decoding.request import SamplingParams, SpeculationParams

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 4096
MAX_NAME_CHARS = 256
MAX_TEXT_PARTS = 1024
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
    drafters: Annotated[list[Name], Field(max_length=64)] | None = None
    max_nodes: Integer | None = None
    max_depth: Integer | None = None
    acceptance: AcceptanceFields | None = None
    coupling: bool | None = None

    def params(self) -> SpeculationParams:
        """The engine's parameters."""
        return SpeculationParams(
            drafters=None if self.drafters is None else tuple(self.drafters),
            max_nodes=self.max_nodes,
            max_depth=self.max_depth,
            acceptance=None if self.acceptance is None else self.acceptance.acceptance(),
            coupling=self.coupling,
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


class SamplingFields(Fields):
    """Fields of both endpoints. ``None`` is a field that was left out, as in OpenAI's API."""

    model: Name | None = None
    max_tokens: Integer | None = None
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
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Integer | None = None
    n: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculation: Speculation | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    prediction: PredictionFields | None = None

    def check_combinations(self) -> None:
        """Check what no single field shows.

        Raises:
            RequestError: stream_options without stream.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options can only be given with stream: true.", param="stream_options")

    def sampling_params(
        self,
        defaults: dict[str, float],
        *,
        max_tokens: int,
        seed: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The engine's parameters; ``defaults`` (of the model) fill what the client left out.

        Raises:
            RequestError: a key of logit_bias is no token id.
        """
        neutral = SamplingParams()

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
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=seed,
            n=self.choices,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

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


def _token_keys(logit_bias: dict[str, float]) -> dict[int, float]:
    for key in logit_bias:
        if not key.isascii() or not key.isdigit() or len(key) > 19:
            raise RequestError('the keys of logit_bias must be token ids, as in {"50256": -100}.', param="logit_bias")
    return {int(key): bias for key, bias in logit_bias.items()}
