"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response

from decoding.request import GenerateRequest
from server.api import Api, output_options
from server.engine_client import check_ready
from server.openai.completion_schema import CompletionFields
from server.openai.completions import CompletionRenderer
from server.openai.generation import PromptRequest
from server.openai.rendering import Head


def completions_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        arrived = time.monotonic()
        fields = await api.read(request, CompletionFields)
        head = Head(api.model_name(fields.model), fields.resolved_seed(api.settings.seed), "cmpl")
        check_ready(api.client.state)
        prompts = await asyncio.to_thread(prepare_prompts, api, fields, head)
        options = output_options(fields, echo=bool(fields.echo), prompt_only=fields.prompt_only)
        generation = api.generation(request, prompts, options, arrived)
        return await api.answer(request, CompletionRenderer(head, api.tokenizer, generation), fields)

    return router


def prepare_prompts(api: Api, fields: CompletionFields, head: Head) -> list[PromptRequest]:
    """Tokenize and check every prompt; runs in a worker thread.

    Raises:
        RequestError: naming the field at fault.
    """
    info = api.client.info
    params = fields.sampling_params(
        info.default_sampling,
        max_tokens=fields.token_limit(),
        seed=head.seed,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.logprobs if fields.echo else None,
    )
    prediction = api.prediction_ids(fields.prediction)
    prepared = []
    for place, prompt in enumerate(fields.prompt):
        if isinstance(prompt, str):
            api.check_length(prompt)
            ids = tuple(api.tokenizer.encode(prompt, add_special_tokens=fields.add_special_tokens is not False))
        else:
            ids = tuple(prompt)
        api.check_tokens(ids)
        request = GenerateRequest(
            request_id=f"{head.id}-{place}",
            prompt_ids=ids,
            params=params,
            speculation=fields.speculation_params(),
            cache_salt=fields.cache_salt or "",
            prediction_ids=prediction,
        )
        request.validate(info.vocab_size, info.max_model_len, info.drafters)
        prepared.append(PromptRequest(request, _echo_text(api, fields, prompt)))
    return prepared


def _echo_text(api: Api, fields: CompletionFields, prompt: str | list[int]) -> str:
    if not fields.echo or isinstance(prompt, str):
        return prompt if isinstance(prompt, str) else ""
    return api.tokenizer.decode(prompt, skip_special_tokens=fields.skip_special_tokens is not False)
