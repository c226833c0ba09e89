"""The shapes of answers: /openapi.json tells them, and tests hold what is sent to them.

A key that is ``NotRequired`` comes only when its feature was asked for.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_CLOSED = ConfigDict(extra="forbid")


@with_config(_CLOSED)
class ErrorDetails(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


@with_config(_CLOSED)
class Error(TypedDict):
    """Every answer that is an error, and the event that tells one in the middle of a stream."""

    error: ErrorDetails


@with_config(_CLOSED)
class PromptTokensDetails(TypedDict):
    cached_tokens: int


@with_config(_CLOSED)
class CompletionTokensDetails(TypedDict):
    """Tokens before the answer; of a prediction those that were accepted, and those that were drafted in vain."""

    reasoning_tokens: NotRequired[int]
    accepted_prediction_tokens: NotRequired[int]
    rejected_prediction_tokens: NotRequired[int]


@with_config(_CLOSED)
class DrafterAccount(TypedDict):
    drafted: int
    accepted: int


@with_config(_CLOSED)
class SpeculationAccount(TypedDict):
    """What was drafted and accepted in all choices that have ended."""

    steps: int
    drafted: int
    accepted: int
    tokens_per_step: float
    by_drafter: dict[str, DrafterAccount]
    acceptance: str
    lossy: bool


@with_config(_CLOSED)
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]
    speculation: NotRequired[SpeculationAccount]


@with_config(_CLOSED)
class UsageSoFar(TypedDict):
    """What one choice of a stream has come to."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@with_config(_CLOSED)
class StepAccount(TypedDict):
    """One step of a choice: the tree that was verified, node 0 its root, and what came of it."""

    position: int
    tokens: list[int]
    texts: list[str]
    parents: list[int]
    confidence: list[float]
    drafters: list[list[str]]
    accepted: list[int]
    bonus: int | None


@with_config(_CLOSED)
class ChoiceTrace(TypedDict):
    index: int
    steps: list[StepAccount]


@with_config(_CLOSED)
class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id; the first token has none
FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


@with_config(_CLOSED)
class CompletionLogprobs(TypedDict):
    """Four lists of equal length; the first token of an echoed prompt has no logprob."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@with_config(_CLOSED)
class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


@with_config(_CLOSED)
class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]


@with_config(_CLOSED)
class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    seed: int
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage
    speculation_trace: NotRequired[list[ChoiceTrace]]


@with_config(_CLOSED)
class CompletionChunk(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    seed: int
    system_fingerprint: str | None
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | UsageSoFar | None]
    speculation_trace: NotRequired[list[ChoiceTrace]]


@with_config(_CLOSED)
class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@with_config(_CLOSED)
class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


@with_config(_CLOSED)
class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


@with_config(_CLOSED)
class CalledFunction(TypedDict):
    name: str
    arguments: str


@with_config(_CLOSED)
class CalledTool(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


@with_config(_CLOSED)
class FunctionFragment(TypedDict):
    name: NotRequired[str]
    arguments: str


@with_config(_CLOSED)
class ToolCallFragment(TypedDict):
    """The first of a call has its id, its type and its name, the others more of its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionFragment


@with_config(_CLOSED)
class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[CalledTool]]


@with_config(_CLOSED)
class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: NotRequired[list[int]]


@with_config(_CLOSED)
class ChatChunkDelta(TypedDict):
    """The first of a choice has its role, the last one nothing."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallFragment]]


@with_config(_CLOSED)
class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatChunkDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: NotRequired[list[int]]


@with_config(_CLOSED)
class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    seed: int
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage
    speculation_trace: NotRequired[list[ChoiceTrace]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


@with_config(_CLOSED)
class ChatCompletionChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    seed: int
    system_fingerprint: str | None
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | UsageSoFar | None]
    speculation_trace: NotRequired[list[ChoiceTrace]]
    prompt_token_ids: NotRequired[list[int]]


@with_config(_CLOSED)
class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


@with_config(_CLOSED)
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


@with_config(_CLOSED)
class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@with_config(_CLOSED)
class Text(TypedDict):
    prompt: str


@with_config(_CLOSED)
class Version(TypedDict):
    version: str


State = Literal["loading", "ready", "restarting", "draining", "dead"]


@with_config(_CLOSED)
class Health(TypedDict):
    status: State


@with_config(_CLOSED)
class Unhealthy(TypedDict):
    status: State
    error: ErrorDetails


Document = dict[str, Any]  # /openapi.json itself
