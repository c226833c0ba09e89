"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from decoding.errors import RequestError
from decoding.request import GenerateRequest
from server.api import Api, output_options
from server.engine_client import check_ready
from server.openai.choice_output import OutputOptions
from server.openai.completion_schema import CompletionFields
from server.openai.completions import CompletionRenderer
from server.openai.fim import Infill
from server.openai.generation import PromptRequest
from server.openai.rendering import Head
from server.openai.structured import Constraint, checked_constraint


def completions_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        arrived = time.monotonic()
        fields = await api.read(request, CompletionFields)
        model, seed = api.model_name(fields.model), fields.resolved_seed(api.settings.seed)
        check_ready(api.client.state)
        constraint = await checked_constraint(fields, api.grammars)
        head = Head(model, seed, "cmpl", api.fingerprint())
        prompts = await asyncio.to_thread(prepare_prompts, api, fields, head, constraint)
        generation = api.generation(request, prompts, completion_options(fields, constraint), arrived)
        return await api.answer(request, CompletionRenderer(head, api.tokenizer, generation), fields)

    return router


def completion_options(fields: CompletionFields, constraint: Constraint | None) -> OutputOptions:
    """How the client wants the tokens returned."""
    return replace(
        output_options(fields),
        echo=bool(fields.echo),
        prompt_only=fields.prompt_only,
        scored=fields.logprobs is not None,
        best=fields.choices if fields.ranked else None,
        held_by=constraint.param if constraint else None,
    )


def prepare_prompts(
    api: Api, fields: CompletionFields, head: Head, constraint: Constraint | None
) -> list[PromptRequest]:
    """Tokenize and check every prompt; runs in a worker thread.

    Raises:
        RequestError: naming the field at fault.
    """
    info = api.client.info
    infill = _infill(api, fields)
    params = fields.sampling_params(
        info.default_sampling,
        max_tokens=fields.token_limit(),
        seed=head.seed,
        logprobs=fields.engine_logprobs,
        prompt_logprobs=fields.logprobs if fields.echo else None,
        bad_words=api.bad_word_ids(fields.bad_words),
        stop_token_ids=() if infill is None or fields.ignore_eos else infill.ends,
    )
    prediction = api.prediction_ids(fields.prediction)
    prepared = []
    for place, prompt in enumerate(fields.prompt):
        ids = _prompt_ids(api, fields, prompt, infill)
        cut = fields.truncated(ids, info.max_model_len - params.max_tokens)
        api.check_tokens(cut)
        request = GenerateRequest(
            request_id=f"{head.id}-{place}",
            prompt_ids=cut,
            params=params,
            speculation=api.speculation(fields),
            cache_salt=fields.cache_salt or "",
            prediction_ids=prediction,
            grammar=constraint.grammar if constraint else None,
        )
        request.validate(info.vocab_size, info.max_model_len, info.drafters)
        shown = prompt if len(cut) == len(ids) else list(cut)
        prepared.append(PromptRequest(request, _echo_text(api, fields, shown)))
    return prepared


def _infill(api: Api, fields: CompletionFields) -> Infill | None:
    """How text before the suffix is filled in, if there is one; an empty one asks for nothing."""
    if not fields.suffix:
        return None
    if api.infill is None:
        raise RequestError(
            "This model cannot fill in text before a suffix: its tokenizer has no tokens for it. Leave suffix out.",
            param="suffix",
            code="unsupported_parameter",
        )
    return api.infill


def _prompt_ids(
    api: Api, fields: CompletionFields, prompt: str | Sequence[int], infill: Infill | None
) -> tuple[int, ...]:
    special = fields.add_special_tokens is not False
    if isinstance(prompt, str):
        api.check_length(prompt, api.prompt_times(fields))
    if infill is not None and fields.suffix:
        api.check_length(fields.suffix, param="suffix")
        return infill.prompt(api.tokenizer, prompt, fields.suffix, special)
    return tuple(api.tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt)


def _echo_text(api: Api, fields: CompletionFields, prompt: str | list[int]) -> str:
    if not fields.echo or isinstance(prompt, str):
        return prompt if isinstance(prompt, str) else ""
    return api.tokenizer.decode(prompt, skip_special_tokens=fields.skip_special_tokens is not False)
