"""The official Python client, of either major version, validating strictly wherever its own types allow it."""

from __future__ import annotations

import asyncio
import uuid
from argparse import Namespace
from typing import Any

import openai
from judge import (
    BUSY_ONCE,
    CONTEXT,
    FAIL_MIDWAY,
    MODEL,
    PROMPT,
    THINK_LONG,
    Judge,
    arguments,
    eventually,
    idle,
    metric,
    raises,
)
from openai_features import responses, structured, tools

MESSAGES: Any = [{"role": "user", "content": "import os\n"}]
LONG = {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}


def client(url: str, key: str, *, strict: bool = False, **options: Any) -> openai.OpenAI:
    """Without retries unless they are asked for, so that a first failure is seen."""
    options = {"max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, _strict_response_validation=strict, **options)


def completions(judge: Judge, args: Namespace) -> None:
    strict, lax = client(args.demo, args.key, strict=True), client(args.demo, args.key)
    ask: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "seed": 3}
    with judge("models: list and retrieve"):
        assert [model.id for model in strict.models.list()] == [MODEL]
        assert strict.models.retrieve(MODEL).id == MODEL
    with judge("completions: whole, n, logprobs, usage"):
        done = strict.completions.create(**ask, n=2, logprobs=2)
        assert [choice.index for choice in done.choices] == [0, 1]
        assert done.choices[0].text != done.choices[1].text
        for choice in done.choices:
            assert choice.logprobs is not None
            assert "".join(choice.logprobs.tokens or []).startswith(choice.text)
            assert all(value <= 0 for value in choice.logprobs.token_logprobs or [])
        assert done.usage is not None
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    with judge("completions: the text does not depend on speculation"):
        drafted = strict.completions.create(**ask)
        plain = strict.completions.create(**ask, extra_body={"speculation": False})
        assert drafted.choices[0].text == plain.choices[0].text
        assert drafted.usage is not None
        assert drafted.usage.model_extra["speculation"]["steps"] > 0
    with judge("completions: a stream says what the whole answer says"):
        chunks = list(lax.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == drafted.choices[0].text
        assert chunks[-1].usage.total_tokens == drafted.usage.total_tokens


def prompt_forms(judge: Judge, args: Namespace) -> None:
    strict, lax = client(args.demo, args.key, strict=True), client(args.demo, args.key)
    ask: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "seed": 3}
    with judge("completions: echo with logprobs, and of zero tokens"):
        echoed = lax.completions.create(**{**ask, "max_tokens": 0}, echo=True, logprobs=1).choices[0]
        assert echoed.text == PROMPT
        assert echoed.logprobs.token_logprobs[0] is None
        assert "".join(echoed.logprobs.tokens) == PROMPT
    with judge("completions: several prompts, token ids, stop strings"):
        many = strict.completions.create(**{**ask, "prompt": [PROMPT, "import "], "stop": ["\n"]})
        assert len(many.choices) == 2
        assert not any("\n" in choice.text for choice in many.choices)
        assert strict.completions.create(**{**ask, "prompt": [300, 301, 302]}).usage.prompt_tokens == 3


def chat(judge: Judge, args: Namespace) -> None:
    strict = client(args.demo, args.key, strict=True)
    ask: Any = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 24, "seed": 3}
    with judge("chat: whole, logprobs"):
        done = strict.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        scored = done.choices[0].logprobs.content
        spelled = b"".join(bytes(token.bytes or []) for token in scored).decode(errors="ignore")
        assert spelled.startswith(done.choices[0].message.content)
        assert all(len(token.top_logprobs) == 2 for token in scored)
    with judge("chat: a stream says what the whole answer says"):
        chunks = list(strict.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert said == done.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens == done.usage.completion_tokens
    ended = {**ask, "stop": ["\n"], "max_completion_tokens": 200}  # the helper refuses what ends by its length
    with judge("chat: the stream() helper"), strict.chat.completions.stream(**ended) as stream:
        assert "content.delta" in [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
        assert (final.message.content or "") == strict.chat.completions.create(**ended).choices[0].message.content
    with judge("chat: predicted output is accounted for"):
        text = done.choices[0].message.content
        predicted = strict.chat.completions.create(**ask, prediction={"type": "content", "content": text})
        assert predicted.choices[0].message.content == text
        assert predicted.usage.completion_tokens_details.accepted_prediction_tokens >= 0
    with judge("chat: 16 streams at once, asynchronously"):
        texts = asyncio.run(_at_once(args, 16))
        assert all(texts)
        assert len(set(texts[0::2])) > 1  # seeds differ
        assert texts[0::2] == texts[1::2]  # and equal seeds say the same


async def _at_once(args: Namespace, count: int) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{args.demo}/v1", api_key=args.key, max_retries=0) as many:

        async def one(seed: int) -> str:
            stream = await many.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=32, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return list(await asyncio.gather(*(one(number // 2) for number in range(count))))


def refusals(judge: Judge, args: Namespace) -> None:
    strict = client(args.demo, args.key, strict=True)
    ask: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
    with judge("unknown model: NotFoundError"):
        unknown = raises(openai.NotFoundError, lambda: strict.completions.create(**{**ask, "model": "nope"}))
        assert (unknown.code, unknown.param) == ("model_not_found", "model")
        assert unknown.request_id
    with judge("context overflow: BadRequestError, context_length_exceeded"):
        many = {**ask, "max_tokens": CONTEXT + 1}
        overflow = raises(openai.BadRequestError, lambda: strict.completions.create(**many))
        assert overflow.code == "context_length_exceeded"
        assert f"maximum context length is {CONTEXT} tokens" in overflow.message
        long = [{"role": "user", "content": "x " * 3000}]
        overflow = raises(openai.BadRequestError, lambda: strict.chat.completions.create(model=MODEL, messages=long))
        assert (overflow.code, overflow.param) == ("context_length_exceeded", "messages")
    with judge("a wrong value: BadRequestError that names the field"):
        wrong = raises(openai.BadRequestError, lambda: strict.completions.create(**ask, temperature=-1.0))
        assert wrong.param == "temperature"
        unknown = raises(openai.BadRequestError, lambda: strict.completions.create(**ask, extra_body={"temprature": 1}))
        assert "did you mean 'temperature'" in unknown.message
    with judge("an unknown path: NotFoundError"):
        raises(openai.NotFoundError, lambda: strict.embeddings.create(model=MODEL, input="x"))
    with judge("a wrong key: AuthenticationError"):
        refused = raises(openai.AuthenticationError, lambda: list(client(args.demo, "sk-wrong").models.list()))
        assert refused.code == "invalid_api_key"
        assert "sk-wrong" not in str(refused)


def faults(judge: Judge, args: Namespace) -> None:
    with judge("leaving a stream ends its request in the engine"):
        stream = client(args.demo, args.key).completions.create(model=MODEL, prompt=PROMPT, stream=True, **LONG)
        next(iter(stream))
        stream.close()
        assert idle(args.demo, args.key)
    with judge("a timeout: APITimeoutError, and the request ends"):
        hasty = client(args.demo, args.key, timeout=0.3)
        raises(openai.APITimeoutError, lambda: hasty.completions.create(model=MODEL, prompt=PROMPT, n=8, **LONG))
        assert idle(args.demo, args.key)
        patient = client(args.scripted, args.key, timeout=0.5)
        raises(openai.APITimeoutError, lambda: patient.completions.create(model=MODEL, prompt=THINK_LONG))
        assert eventually(lambda: metric(args.scripted, args.key, "saccade_running") == 0)
    with judge("an overloaded server: InternalServerError, and success with one retry"):
        busy: Any = {"model": MODEL, "max_tokens": 2}
        once = f"{BUSY_ONCE} {uuid.uuid4()}"
        refused = raises(
            openai.InternalServerError, lambda: client(args.scripted, args.key).completions.create(prompt=once, **busy)
        )
        assert refused.status_code == 503
        assert int(refused.response.headers["retry-after"]) > 0
        again = client(args.scripted, args.key, max_retries=1)
        assert again.completions.create(prompt=f"{BUSY_ONCE} {uuid.uuid4()}", **busy).choices[0].text
    with judge("an error in mid-stream: APIError"):
        broken = client(args.scripted, args.key)
        for stream in (
            broken.completions.create(model=MODEL, prompt=FAIL_MIDWAY, max_tokens=9, stream=True),
            broken.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": FAIL_MIDWAY}], max_tokens=9, stream=True
            ),
        ):
            assert next(iter(stream)).choices
            error = raises(openai.APIError, lambda stream=stream: list(stream))
            assert error.code == "internal_error"


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    for part in (completions, prompt_forms, chat, refusals, faults):
        part(judge, args)
    for feature in (structured, tools, responses):
        feature(judge, client(args.demo, args.key, strict=True))
    judge.end()


if __name__ == "__main__":
    main()
