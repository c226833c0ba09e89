"""LiteLLM, which tells errors by their texts as much as by their codes."""

from __future__ import annotations

import asyncio
import json
import uuid
from argparse import Namespace
from typing import Any

import litellm
import openai
from judge import (
    BUSY_ONCE,
    CONTEXT,
    FAIL_MIDWAY,
    MODEL,
    PICK_SCHEMA,
    PROMPT,
    THINK_LONG,
    Judge,
    arguments,
    idle,
    raises,
)

MESSAGES = [{"role": "user", "content": "import os\n"}]


def to(url: str, key: str, **fields: Any) -> dict[str, Any]:
    """The fields of a chat request to this server."""
    ask = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": key, "messages": MESSAGES, "max_tokens": 16}
    return {**ask, "max_retries": 0, "num_retries": 0, **fields}


def answers(judge: Judge, args: Namespace) -> None:
    with judge("completion: whole"):
        whole = litellm.completion(**to(args.demo, args.key, seed=3))
        assert whole.choices[0].message.content
        assert whole.choices[0].finish_reason in ("length", "stop")
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    with judge("completion: a stream says what the whole answer says"):
        usage = {"include_usage": True}
        chunks = list(litellm.completion(**to(args.demo, args.key, seed=3, stream=True, stream_options=usage)))
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert said == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        assert built.choices[0].message.content == said
    with judge("acompletion: 8 at once"):
        texts = asyncio.run(_at_once(args, 8))
        assert texts == [whole.choices[0].message.content] * 8
    with judge("completion: as a vLLM server, with its extra fields"):
        fields = to(args.demo, args.key, model=f"hosted_vllm/{MODEL}", seed=3, extra_body={"top_k": 1, "min_p": 0.0})
        assert litellm.completion(**fields).choices[0].message.content
    with judge("completion: logprobs"):
        scored = litellm.completion(**to(args.demo, args.key, logprobs=True, top_logprobs=2))
        assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2
    with judge("text_completion: whole and in a stream"):
        ask = to(args.demo, args.key, model=f"text-completion-openai/{MODEL}", seed=3)
        del ask["messages"]
        text = litellm.text_completion(prompt=PROMPT, **ask).choices[0].text
        chunks = list(litellm.text_completion(prompt=PROMPT, stream=True, **ask))
        assert "".join(choice.text or "" for chunk in chunks for choice in chunk.choices) == text


async def _at_once(args: Namespace, count: int) -> list[str]:
    done = await asyncio.gather(*(litellm.acompletion(**to(args.demo, args.key, seed=3)) for _ in range(count)))
    return [each.choices[0].message.content for each in done]


def features(judge: Judge, args: Namespace) -> None:
    with judge("completion: response_format"):
        schema = {"type": "json_schema", "json_schema": {"name": "pick", "schema": PICK_SCHEMA, "strict": True}}
        done = litellm.completion(**to(args.demo, args.key, max_tokens=200, response_format=schema))
        assert set(json.loads(done.choices[0].message.content)) == {"colour", "final"}
    with judge("completion: tools, whole and in a stream"):
        tool = {"type": "function", "function": {"name": "pick", "parameters": PICK_SCHEMA}}
        named = {"type": "function", "function": {"name": "pick"}}
        ask = to(args.demo, args.key, max_tokens=200, seed=3, tools=[tool], tool_choice=named)
        (call,) = litellm.completion(**ask).choices[0].message.tool_calls
        assert call.function.name == "pick"
        built = litellm.stream_chunk_builder(list(litellm.completion(**ask, stream=True)))
        (streamed,) = built.choices[0].message.tool_calls
        assert streamed.function.name == "pick"
        assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
    with judge("responses: whole and in a stream"):
        ask = {"model": f"openai/{MODEL}", "api_base": f"{args.demo}/v1", "api_key": args.key, "temperature": 0}
        text = litellm.responses(input="import os\n", max_output_tokens=24, **ask).output_text
        events = list(litellm.responses(input="import os\n", max_output_tokens=24, stream=True, **ask))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text


def errors(judge: Judge, args: Namespace) -> None:
    def ask(url: str = args.demo, **fields: Any) -> Any:
        return litellm.completion(**to(url, args.key, **fields))

    with judge("unknown model: NotFoundError"):
        raises(litellm.NotFoundError, lambda: ask(model="openai/nope"))
    with judge("context overflow: ContextWindowExceededError"):
        raises(litellm.ContextWindowExceededError, lambda: ask(max_tokens=CONTEXT + 1))
        long = [{"role": "user", "content": "x " * 3000}]
        raises(litellm.ContextWindowExceededError, lambda: ask(messages=long))
        longest = [{"role": "user", "content": "x" * 300_000}]
        raises(litellm.ContextWindowExceededError, lambda: ask(messages=longest))
    with judge("a wrong value: BadRequestError"):
        raises(litellm.BadRequestError, lambda: ask(temperature=-1.0))
    with judge("a wrong key: AuthenticationError"):
        raises(litellm.AuthenticationError, lambda: ask(api_key="sk-wrong"))
    with judge("a timeout: Timeout"):
        raises(litellm.Timeout, lambda: ask(args.scripted, messages=_says(THINK_LONG), timeout=0.5))
        assert idle(args.scripted, args.key)
    with judge("an overloaded server: ServiceUnavailableError, and success with one retry"):
        busy = _says(f"{BUSY_ONCE} {uuid.uuid4()}")
        raises(
            (litellm.ServiceUnavailableError, litellm.InternalServerError), lambda: ask(args.scripted, messages=busy)
        )
        again = _says(f"{BUSY_ONCE} {uuid.uuid4()}")
        assert ask(args.scripted, messages=again, num_retries=1).choices[0].message.content
    with judge("an error in mid-stream is raised"):
        stream = ask(args.scripted, messages=_says(FAIL_MIDWAY), stream=True)
        assert next(stream).choices
        raises(openai.APIError, lambda: list(stream))
    with judge("leaving a stream ends its request in the engine"):
        stream = ask(stream=True, max_tokens=900, extra_body={"ignore_eos": True})
        next(stream)
        stream.completion_stream.close()
        assert idle(args.demo, args.key)


def _says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    litellm.suppress_debug_info = True
    answers(judge, args)
    features(judge, args)
    errors(judge, args)
    judge.end()


if __name__ == "__main__":
    main()
