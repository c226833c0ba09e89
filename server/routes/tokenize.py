"""POST /tokenize and POST /detokenize: a text's tokens and back, in vLLM's form."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from decoding.request import check_token_ids
from server.api import LONGEST_CUT, Api
from server.openai.tokenize_schema import DetokenizeFields, TokenizeChatFields, TokenizeFields
from server.openai.validation import parse_fields


def tokenize_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await api.body(request)
        with_messages = "messages" in body
        fields = parse_fields(body, TokenizeChatFields) if with_messages else parse_fields(body, TokenizeFields)
        api.model_name(fields.model)
        return JSONResponse(await asyncio.to_thread(tokenized, api, fields))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        fields = parse_fields(await api.body(request), DetokenizeFields)
        api.model_name(fields.model)
        return JSONResponse(await asyncio.to_thread(detokenized, api, fields))

    return router


def tokenized(api: Api, fields: TokenizeFields | TokenizeChatFields) -> dict[str, Any]:
    """The answer of /tokenize. Runs in a worker thread.

    Raises:
        RequestError: naming the field at fault.
    """
    text = fields.text(api.tokenizer, api.formats.template_id)
    api.check_length(text, LONGEST_CUT, param="prompt" if isinstance(fields, TokenizeFields) else "messages")
    ids = fields.tokens(api.tokenizer, text)
    return {
        "count": len(ids),
        "max_model_len": api.client.info.max_model_len,
        "tokens": ids,
        "token_strs": [api.tokenizer.spelling(token) for token in ids] if fields.return_token_strs else None,
    }


def detokenized(api: Api, fields: DetokenizeFields) -> dict[str, Any]:
    """The answer of /detokenize, special tokens included. Runs in a worker thread.

    Raises:
        RequestError: an id that the model does not have.
    """
    check_token_ids("tokens", fields.tokens, api.client.info.vocab_size)
    return {"prompt": api.tokenizer.decode(fields.tokens, skip_special_tokens=False)}
