"""POST /v1/responses."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from decoding.errors import RequestError
from server.api import Api, output_options
from server.engine_client import check_ready
from server.openai.chat_schema import ChatFields
from server.openai.json_body import read_json
from server.openai.output_parser import OutputParser
from server.openai.rendering import Head
from server.openai.responses.renderer import ResponseRenderer, echoed
from server.openai.responses.schema import ResponsesFields
from server.openai.responses.to_chat import chat_body, here
from server.openai.sse import EventStreamResponse, until_disconnect
from server.openai.validation import parse_fields
from server.routes.chat import Conversation, prepare_conversation


def responses_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        arrived = time.monotonic()
        body = await read_json(request, api.settings.max_body_bytes)
        fields = parse_fields(body, ResponsesFields)
        fields.check()
        try:
            renderer = await _renderer(api, body, fields, arrived)
        except RequestError as error:
            raise here(error) from None
        return await _answer(api, request, renderer, stream=bool(fields.stream))

    return router


async def _renderer(api: Api, body: dict[str, object], fields: ResponsesFields, arrived: float) -> ResponseRenderer:
    """The request as a chat completion, rendered as a response.

    Raises:
        RequestError: about the chat completion.
    """
    chat = parse_fields(chat_body(body, fields), ChatFields)
    chat.check_combinations()
    head = Head(api.model_name(chat.model), chat.resolved_seed(api.settings.seed), "resp")
    check_ready(api.client.state)
    conversation: Conversation = await asyncio.to_thread(prepare_conversation, api, chat, head)
    generation = api.generation([conversation.prompt], conversation.options(output_options(chat)), arrived)
    params = conversation.prompt.request.params
    reading = conversation.reading
    parser = OutputParser(None, None) if reading is None else reading.new_parser()
    repeated = echoed(fields, temperature=params.temperature, top_p=params.top_p)
    return ResponseRenderer(head, repeated, api.tokenizer, generation, parser, chat.top_logprobs or 0)


async def _answer(api: Api, request: Request, renderer: ResponseRenderer, *, stream: bool) -> Response:
    if stream:
        return EventStreamResponse(renderer.events(), api.settings.ping_seconds, last=b"")

    async def whole() -> Response:
        return JSONResponse(await renderer.whole())

    return await until_disconnect(request, whole())
