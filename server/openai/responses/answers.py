"""The shapes of /v1/responses, for /openapi.json and for the tests that hold answers to them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from server.openai.answers import ErrorDetails, SpeculationAccount, TokenLogprob

_CLOSED = ConfigDict(extra="forbid")

ItemStatus = Literal["in_progress", "completed", "incomplete"]


@with_config(_CLOSED)
class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


@with_config(_CLOSED)
class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


@with_config(_CLOSED)
class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


@with_config(_CLOSED)
class OutputReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


@with_config(_CLOSED)
class OutputCall(TypedDict):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


@with_config(_CLOSED)
class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


@with_config(_CLOSED)
class OutputTokensDetails(TypedDict):
    reasoning_tokens: int
    accepted_prediction_tokens: NotRequired[int]
    rejected_prediction_tokens: NotRequired[int]


@with_config(_CLOSED)
class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    speculation: NotRequired[SpeculationAccount]


@with_config(_CLOSED)
class ResponseError(TypedDict):
    code: Literal["server_error"]
    message: str


@with_config(_CLOSED)
class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


@with_config(_CLOSED)
class Response(TypedDict):
    """An answer; the fields from ``instructions`` on repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputItem]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    seed: int
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    store: Literal[False]
    background: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]


@with_config(_CLOSED)
class Lifecycle(TypedDict):
    """The response as a whole, when it begins and when it ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: Response


@with_config(_CLOSED)
class ItemEvent(TypedDict):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


@with_config(_CLOSED)
class PartEvent(TypedDict):
    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    output_index: int
    item_id: str
    content_index: int
    part: OutputText | ReasoningText


@with_config(_CLOSED)
class TextDelta(TypedDict):
    type: Literal["response.output_text.delta"]
    sequence_number: int
    output_index: int
    item_id: str
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


@with_config(_CLOSED)
class TextDone(TypedDict):
    type: Literal["response.output_text.done"]
    sequence_number: int
    output_index: int
    item_id: str
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


@with_config(_CLOSED)
class ReasoningDelta(TypedDict):
    type: Literal["response.reasoning_text.delta"]
    sequence_number: int
    output_index: int
    item_id: str
    content_index: int
    delta: str


@with_config(_CLOSED)
class ReasoningDone(TypedDict):
    type: Literal["response.reasoning_text.done"]
    sequence_number: int
    output_index: int
    item_id: str
    content_index: int
    text: str


@with_config(_CLOSED)
class ArgumentsDelta(TypedDict):
    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    output_index: int
    item_id: str
    delta: str


@with_config(_CLOSED)
class ArgumentsDone(TypedDict):
    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    output_index: int
    item_id: str
    arguments: str
    name: str


@with_config(_CLOSED)
class ErrorEvent(TypedDict):
    """Behind ``response.failed``, for clients that look for errors."""

    type: Literal["error"]
    sequence_number: int
    code: str | None
    message: str
    param: str | None
    error: ErrorDetails


ResponseEvent = (
    Lifecycle
    | ItemEvent
    | PartEvent
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
    | ErrorEvent
)
