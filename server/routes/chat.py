"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request, Response

from decoding.errors import RequestError
from decoding.request import GenerateRequest
from server.api import Api, output_options
from server.engine_client import check_ready
from server.openai.chat import ChatRenderer
from server.openai.chat_schema import ChatFields
from server.openai.choice_output import OutputOptions
from server.openai.generation import PromptRequest
from server.openai.output_parser import Reading
from server.openai.rendering import Head
from server.openai.structured import Constraint, checked_constraint
from server.openai.tools.plan import ToolPlan


def chat_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        arrived = time.monotonic()
        fields = await api.read(request, ChatFields)
        model, seed = api.model_name(fields.model), fields.resolved_seed(api.settings.seed)
        check_ready(api.client.state)
        head = Head(model, seed, "chatcmpl", api.fingerprint())
        conversation = await prepare_conversation(api, fields, head)
        options = conversation.options(output_options(fields))
        generation = api.generation(request, [conversation.prompt], options, arrived)
        renderer = ChatRenderer(head, api.tokenizer, generation, fields.top_logprobs or 0, conversation.reading)
        return await api.answer(request, renderer, fields)

    return router


@dataclass(frozen=True)
class Conversation:
    """Messages, ready for the engine, and how its answer is to be read."""

    prompt: PromptRequest
    reading: Reading | None
    constraint: Constraint | None = None

    def options(self, asked: OutputOptions) -> OutputOptions:
        """How the tokens are returned; the special ones that mark calls and reasoning are kept for the reading."""
        if self.constraint is not None:
            asked = replace(asked, held_by=self.constraint.param)
        return asked if self.reading is None else replace(asked, kept=self.reading.kept)


async def prepare_conversation(api: Api, fields: ChatFields, head: Head) -> Conversation:
    """Render, tokenize and check the messages, in a worker thread, and what the answer is to be held to.

    Raises:
        RequestError: naming the field at fault by the name that the client used.
        UnavailableError: too many grammars wait to be checked.
    """
    plan = await asyncio.to_thread(fields.tool_plan, api.formats.tools, shows_tools=api.shows_tools)
    if plan.grammar is not None:
        await api.grammars.check(plan.grammar, "tools")
    constraint = await _constraint(api, plan, await checked_constraint(fields, api.grammars))
    return await asyncio.to_thread(_named_as_sent, api, fields, head, plan, constraint)


async def _constraint(api: Api, plan: ToolPlan, asked: Constraint | None) -> Constraint | None:
    """What the output must be: calls that are demanded, else the text as it is asked for, or calls in its place.

    Raises:
        RequestError: the model is to choose between calls and a text, and no grammar can say that here.
    """
    if plan.grammar is not None:
        return Constraint(plan.grammar, "tools")
    if asked is None or not plan.schemas:
        return asked
    either = None
    if plan.either is not None and api.formats.spells_calls:
        either = await asyncio.to_thread(plan.either, asked.grammar)
    if either is None:
        message = 'This form of the output goes with tools only where tool_choice is "none", "required" or a function.'
        raise RequestError(message, param="tool_choice", code="unsupported_value")
    await api.grammars.check(either, asked.param)
    return Constraint(either, asked.param)


def _named_as_sent(
    api: Api, fields: ChatFields, head: Head, plan: ToolPlan, constraint: Constraint | None
) -> Conversation:
    """What is wrong with the prompt is wrong with the messages, and a limit has two names."""
    try:
        return _prepared(api, fields, head, plan, constraint)
    except RequestError as error:
        renamed = {"prompt": "messages", "max_tokens": fields.limit_field}
        message = error.message.replace("max_tokens", fields.limit_field)
        raise RequestError(message, param=renamed.get(error.param or "", error.param), code=error.code) from None


def _prepared(api: Api, fields: ChatFields, head: Head, plan: ToolPlan, constraint: Constraint | None) -> Conversation:
    info = api.client.info
    text = fields.rendered(api.tokenizer, plan.shown, api.formats.template_id)
    api.check_length(text, api.prompt_times(fields))
    ids = fields.truncated(tuple(fields.tokens(api.tokenizer, text)), info.max_model_len - fields.token_limit(1))
    api.check_tokens(ids)
    params = fields.sampling_params(
        info.default_sampling,
        max_tokens=fields.token_limit(info.max_model_len - len(ids)),
        seed=head.seed,
        logprobs=fields.scored,
        bad_words=api.bad_word_ids(fields.bad_words),
    )
    thought = api.formats.thought_before(text) if constraint else None
    request = GenerateRequest(
        request_id=f"{head.id}-0",
        prompt_ids=ids,
        params=params,
        speculation=api.speculation(fields),
        cache_salt=fields.cache_salt or "",
        prediction_ids=api.prediction_ids(fields.prediction),
        grammar=constraint.grammar if constraint else None,
        reasoning=thought,
    )
    request.validate(info.vocab_size, info.max_model_len, info.drafters)
    shows_special = fields.skip_special_tokens is False
    constrained = constraint is not None and thought is None
    reading = api.formats.reading(plan, text, shows_special=shows_special, constrained=constrained)
    return Conversation(PromptRequest(request), reading, constraint)
