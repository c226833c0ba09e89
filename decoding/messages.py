"""What crosses between the HTTP process and the engine process, encoded by msgspec as msgpack, never pickle.

The envelopes are tagged structs (a union of them decodes by tag); what they carry are the dataclasses used everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from decoding.request import GenerateRequest

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Raw log-softmax of the target (before bias, penalties, temperature) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first
    rank: int = 0  # of the token among all of the vocabulary; 1: none is more probable


@dataclass(frozen=True)
class DrafterStats:
    drafted: int = 0  # nodes of this drafter that were verified
    accepted: int = 0  # of those, accepted


@dataclass(frozen=True)
class SpeculationStats:
    """Accounting of one choice. A node proposed by two drafters counts for both, once in the totals."""

    steps: int = 0  # target forward passes that produced tokens for this choice
    drafted: int = 0
    accepted: int = 0
    by_drafter: dict[str, DrafterStats] = field(default_factory=dict)
    acceptance: str = "exact"  # the rule that judged


@dataclass(frozen=True)
class StepTrace:
    """What a step did for one choice: the tree that was verified and what came of it. Node 0 is the tree's root.

    Attributes:
        position: of the root's token in prompt and output, from 0.
        tokens: of the nodes.
        parents: the node above each; -1 for the root. A parent stands before its children.
        confidence: the estimate by which a node was bought, that its token is drawn if its parent is reached.
        drafters: the names of those that proposed each node, or that have it verified for their own sake.
        accepted: the nodes whose tokens became text, from the root down, without it.
        bonus: the token that ended the step; None: the text ended on the accepted path.
    """

    position: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    confidence: tuple[float, ...]
    drafters: tuple[tuple[str, ...], ...]
    accepted: tuple[int, ...]
    bonus: int | None


@dataclass(frozen=True)
class TokenEvent:
    """Tokens of one choice from one step. Every choice ends with exactly one event that has a finish reason."""

    request_id: str
    choice: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token, when asked for
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the token id that ended it, when finish_reason is "stop"
    error: str | None = None  # when finish_reason is "error"
    error_code: str | None = None  # with an error that is the request's own fault: the code of its RequestError
    seed: int | None = None  # on the first event of a choice
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache; on the first event of a choice
    queued_seconds: float = 0.0  # that the choice waited for its place in the batch; on its first event
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # first event of choice 0, when asked for
    speculation: SpeculationStats | None = None  # on the last event of a choice
    trace: tuple[StepTrace, ...] = ()  # when asked for


@dataclass(frozen=True)
class EngineInfo:
    """What the HTTP side must know of a loaded engine."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    drafters: tuple[str, ...]
    dtype: str
    device: str
    default_sampling: dict[str, float] = field(default_factory=dict)  # from generation_config.json
    quantization: str = "none"  # of the weights of linear layers
    acceptance: str = "exact"  # the rule of requests that name none, as --acceptance takes it
    recalling: tuple[str, ...] = ()  # drafters whose drafts can come from other requests' texts, see Needs.recalls
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class EngineStats:
    """Counters since start and gauges of now; the source of /metrics."""

    running: int = 0  # gauge: choices in the batch
    waiting: int = 0  # gauge: choices queued
    pages_total: int = 0
    pages_free: int = 0  # gauge
    pages_cached: int = 0  # gauge: held by nobody, kept for prefix hits
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    requests_finished: int = 0
    drafted: int = 0
    accepted: int = 0
    by_drafter: dict[str, DrafterStats] = field(default_factory=dict)
    step_seconds: float = 0.0  # time in steps, all told
    draft_seconds: float = 0.0  # of it, in drafters' propose and observe
    forward_seconds: float = 0.0  # of it, in the target's forward pass
    part_seconds: dict[str, float] = field(default_factory=dict)  # all of it, by step_counts.PARTS
    drafter_seconds: dict[str, float] = field(default_factory=dict)
    drafts: int = 0  # rows of steps in which something was drafted for them
    accepted_at: tuple[int, ...] = ()  # accepted nodes by depth, from 1
    accepted_by: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by drafter: those that it had proposed
    row_tokens: tuple[int, ...] = ()  # this and what follows: see decoding.step_counts.StepCounts
    step_sizes: tuple[int, ...] = ()
    step_nodes: int = 0
    step_work: tuple[int, ...] = ()
    step_tokens: int = 0
    steps_by_gear: dict[str, int] = field(default_factory=dict)
    queued: tuple[int, ...] = ()
    queued_seconds: float = 0.0


# to the engine ---------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Ends a request, or one choice of it; it is answered by terminal events with reason "cancelled"."""

    request_id: str
    choice: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish nothing more; exit."""


# from the engine -------------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """All events of one step, in one message."""

    events: tuple[TokenEvent, ...]
    stats: EngineStats | None = None  # sent a few times a second


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    message: str


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The one answer to a Submit that the engine refused with a RequestError; its fields are that error's."""

    request_id: str
    message: str
    param: str | None = None
    code: str = "invalid_value"


ToEngine = Submit | Cancel | Shutdown
FromEngine = Ready | LoadFailed | StepOutput | Rejected
