"""POST /v1/responses."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from decoding.errors import RequestError
from server.api import Api, output_options
from server.engine_client import check_ready
from server.openai.chat_schema import ChatFields
from server.openai.output_parser import OutputParser
from server.openai.rendering import Head
from server.openai.responses.renderer import ResponseRenderer, echoed
from server.openai.responses.schema import ResponsesFields
from server.openai.responses.to_chat import chat_body, here
from server.openai.validation import parse_fields
from server.routes.chat import Conversation, prepare_conversation


def responses_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        arrived = time.monotonic()
        body = await api.body(request)
        fields = parse_fields(body, ResponsesFields)
        fields.check()
        try:
            renderer = await _renderer(api, request, body, fields, arrived)
        except RequestError as error:
            raise here(error) from None
        events = renderer.events() if fields.stream else None
        return await api.respond(request, renderer.whole, events, last=b"", failed=renderer.failed)

    return router


async def _renderer(
    api: Api, request: Request, body: dict[str, Any], fields: ResponsesFields, arrived: float
) -> ResponseRenderer:
    """The request as a chat completion, rendered as a response.

    Raises:
        RequestError: about the chat completion.
    """
    chat = api.checked(request, parse_fields(chat_body(body, fields), ChatFields))
    head = Head(api.model_name(chat.model), chat.resolved_seed(api.settings.seed), "resp")
    check_ready(api.client.state)
    conversation: Conversation = await prepare_conversation(api, chat, head)
    options = conversation.options(output_options(chat))
    generation = api.generation(request, [conversation.prompt], options, arrived)
    params = conversation.prompt.request.params
    reading = conversation.reading
    parser = OutputParser(None, None) if reading is None else reading.new_parser()
    repeated = echoed(fields, temperature=params.temperature, top_p=params.top_p)
    return ResponseRenderer(head, repeated, api.tokenizer, generation, parser, chat.top_logprobs or 0)
