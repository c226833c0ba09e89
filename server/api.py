"""What the routes share: one served model, and the way from validated fields to a response."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from decoding.errors import ConfigError, RequestError, nearest
from decoding.request import SpeculationParams
from decoding.text import Tokenizer
from server.account import Generated, keep_generated
from server.admission import ticket_of
from server.body_memory import BodyMemory
from server.engine_client import EngineClient
from server.grammar_worker import GrammarCheck
from server.metrics import Metrics
from server.openai.choice_output import OutputOptions
from server.openai.field_limits import check_limits
from server.openai.fields import PredictionFields, SamplingFields
from server.openai.fim import Infill
from server.openai.fingerprint import fingerprint
from server.openai.generation import Generation, PromptRequest
from server.openai.json_body import read_json
from server.openai.large import in_json
from server.openai.output_parser import OutputFormats
from server.openai.rendering import StreamUsage
from server.openai.sse import DONE, EventStreamResponse, error_event, until_disconnect
from server.openai.validation import parse_fields
from server.prompt_log import log_prompt
from server.settings import ServerSettings

LONGEST_CUT = 8  # contexts: a longer prompt is refused, though it is to be cut or only counted

F = TypeVar("F", bound=SamplingFields)


class Renderer(Protocol):
    """An endpoint's answer, in both of its forms."""

    async def whole(self) -> dict[str, Any]: ...

    def chunks(self, stream_usage: StreamUsage) -> AsyncGenerator[bytes, None]: ...


@dataclass(frozen=True)
class Api:
    client: EngineClient
    tokenizer: Tokenizer
    settings: ServerSettings
    metrics: Metrics
    grammars: GrammarCheck  # asked before a request with a grammar is sent to the engine
    created: int = field(default_factory=lambda: int(time.time()))
    longest_token: int = field(init=False)  # in characters: no prompt is longer than its tokens times this
    infill: Infill | None = field(init=False)  # how the model fills in text before a suffix, if it can
    bodies: BodyMemory = field(init=False)
    formats: OutputFormats = field(init=False)  # how the model writes tool calls and reasoning

    def __post_init__(self) -> None:
        longest = max((len(token) for token in self.tokenizer.vocab()), default=1)
        object.__setattr__(self, "longest_token", longest)
        object.__setattr__(self, "infill", Infill.of(self.tokenizer))
        object.__setattr__(self, "bodies", BodyMemory(self.settings.limits.max_body_memory))
        formats = OutputFormats.of(self.tokenizer, self.settings.tool_call_parser, self.settings.reasoning_parser)
        object.__setattr__(self, "formats", formats)
        if self.settings.enable_auto_tool_choice and not (formats.tools and self.shows_tools):
            raise ConfigError(
                "--enable-auto-tool-choice cannot be kept: the chat template shows no tools, or how the model calls "
                "them is unknown; name it with --tool-call-parser, or give another --chat-template."
            )

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return "tools" in self.tokenizer.chat_variables

    async def body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request.

        Raises:
            RequestError, OverloadedError, LateError, ClientDisconnect: see ``read_json``.
        """
        held = self.bodies.begin()
        ticket_of(request).hold(held)
        body = await read_json(request, self.settings.limits, held)
        if self.settings.security.log_prompts:
            log_prompt(request.scope, body)
        return body

    async def read(self, request: Request, model: type[F]) -> F:
        """The fields of a request, checked one by one, against each other and against the limits of this server.

        Raises:
            RequestError: naming the field at fault.
            OverloadedError, LateError, ClientDisconnect: see ``read_json``.
        """
        return self.checked(request, parse_fields(await self.body(request), model))

    def checked(self, request: Request, fields: F) -> F:
        """Fields that were checked one by one, checked against each other and against the limits of this server.

        Raises:
            RequestError: naming the field at fault.
        """
        fields.check_combinations()
        check_limits(fields, self.settings.limits)
        if self.settings.security.isolate_keys:
            fields.cache_salt = f"{ticket_of(request).key_name}:{fields.cache_salt or ''}"
        return fields

    def model_name(self, asked: str | None) -> str:
        """The name that the answer carries.

        Raises:
            RequestError: no such model is served (a 404).
        """
        served = self.settings.model_names
        if asked is None:
            return served[0]
        if asked not in served:
            message = f"The model {asked[:100]!r} does not exist: {nearest(asked, served)}."
            raise RequestError(message, param="model", code="model_not_found")
        return asked

    def fingerprint(self) -> str:
        """What answers tell of how the server is set up.

        Raises:
            UnavailableError: before the engine has loaded.
        """
        return fingerprint(self.client.info, self.tokenizer, self.settings.seed)

    def check_length(self, text: str, times: int = 1, *, param: str = "prompt") -> None:
        """Refuse a text that is too long before it costs the time to tokenize it.

        Args:
            times: how many contexts it may be long; more than one where its tokens are only counted, or cut.
            param: the field that the text is of.

        Raises:
            RequestError: however its tokens fall, they do not fit the context; or it has more than --max-prompt-chars.
        """
        room, most = self.client.info.max_model_len, self.settings.limits.max_prompt_chars
        if most is not None and len(text) > most:
            raise RequestError(
                f"The {param} has {len(text)} characters, and this server takes {most}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        if len(text) > times * room * self.longest_token:
            raise RequestError(
                f"This model's maximum context length is {room} tokens. However, you requested more: your {param} has "
                f"{len(text)} characters. Shorten the {param}. (context_length_exceeded)",
                param=param,
                code="context_length_exceeded",
            )

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Refuse a prompt of more than --max-prompt-tokens.

        Raises:
            RequestError: it has.
        """
        most = self.settings.limits.max_prompt_tokens
        if most is not None and len(ids) > most:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, and this server takes {most}. Shorten it.",
                param="prompt",
                code="context_length_exceeded",
            )

    def speculation(self, fields: SamplingFields) -> SpeculationParams:
        """What the request allows of speculation.

        Raises:
            RequestError: a trace is wanted that could show texts of other clients.
        """
        params = fields.speculation_params()
        if params.trace and params.enabled and self.settings.security.api_keys and not fields.cache_salt:
            asked = self.client.info.drafters if params.drafters is None else params.drafters
            if shared := set(self.client.info.recalling).intersection(asked):
                raise RequestError(
                    f"A trace would show what {' and '.join(sorted(shared))} learned from other clients. "
                    "Send a cache_salt of your own, which nobody else knows, or leave these drafters out.",
                    param="speculation.trace",
                    code="unsupported_value",
                )
        return params

    def prediction_ids(self, prediction: PredictionFields | None) -> tuple[int, ...]:
        """The tokens of the text that the client expects, as many as a context could hold; takes the time to tokenize.

        Whatever they are, they change nothing but the speed: so a text that is too long is cut, not refused.
        """
        if prediction is None:
            return ()
        room = self.client.info.max_model_len
        (ids,) = self.tokenizer.encode_many([prediction.text[: room * self.longest_token]])
        return tuple(ids[:room])

    def bad_word_ids(self, words: Sequence[str] | None) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word where a text begins and after a space, as vLLM has them."""
        spelled = [form for word in words or () for form in dict.fromkeys((word, f" {word.lstrip()}"))]
        return tuple(dict.fromkeys(tuple(ids) for ids in self.tokenizer.encode_many(spelled) if ids))

    def prompt_times(self, fields: SamplingFields) -> int:
        """How many contexts long a prompt may be."""
        return 1 if fields.truncate_prompt_tokens is None else LONGEST_CUT

    def generation(
        self, request: Request, prompts: Sequence[PromptRequest], options: OutputOptions, arrived: float
    ) -> Generation:
        """The run of a request that arrived at that time (monotonic), with places in the queue for all its choices.

        Raises:
            OverloadedError: the queue is full.
            LateError: the request's deadline has passed.
        """
        choices = sum(prompt.request.params.n for prompt in prompts)
        ticket_of(request).queue(choices)
        times = self.metrics.times(arrived, choices)
        most = self.settings.limits.max_answer_tokens
        generation = Generation(self.client, self.tokenizer, prompts, options, times.tokens_came, most)
        keep_generated(request.scope, Generated(self.settings.model_names[0], generation, times))
        return generation

    async def answer(self, request: Request, renderer: Renderer, fields: SamplingFields) -> Response:
        """The response, streamed or whole; the request is cancelled when the client leaves or its deadline passes.

        Raises:
            LateError: the deadline has passed.
        """
        events = renderer.chunks(StreamUsage.of(fields.stream_options)) if fields.stream else None
        return await self.respond(request, renderer.whole, events)

    async def respond(
        self,
        request: Request,
        whole: Callable[[], Awaitable[dict[str, Any]]],
        events: AsyncGenerator[bytes, None] | None,
        last: bytes = DONE,
        failed: Callable[[Exception], bytes] = error_event,
    ) -> Response:
        """As ``answer``: a stream if there are events, with ``last`` behind them, else the whole.

        Args:
            failed: makes the events of an error in the middle of a stream.

        Raises:
            LateError: the deadline has passed.
        """
        remaining = ticket_of(request).remaining
        if events is not None:
            return EventStreamResponse(events, self.settings.ping_seconds, remaining, last, failed)

        async def made() -> Response:
            return Response(await in_json(await whole()), media_type="application/json")

        seconds = remaining()
        return await until_disconnect(request, made(), seconds)


def output_options(fields: SamplingFields) -> OutputOptions:
    """How the client wants the tokens returned."""
    return OutputOptions(
        stop=tuple(fields.stop or ()),
        include_stop=bool(fields.include_stop_str_in_output),
        skip_special_tokens=fields.skip_special_tokens is not False,
        token_ids=bool(fields.return_token_ids),
        prompt_logprobs=fields.prompt_logprobs,
    )
