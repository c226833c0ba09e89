"""LangChain's ChatOpenAI and OpenAI."""

from __future__ import annotations

import asyncio
import functools
import operator
from argparse import Namespace
from typing import Any, Literal

import openai
from judge import CONTEXT, FAIL_MIDWAY, MODEL, PROMPT, THINK_LONG, Judge, arguments, idle, raises
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

TALK = [SystemMessage("Python"), HumanMessage("import os\n")]


def chat(url: str, key: str, **options: Any) -> ChatOpenAI:
    options = {"max_tokens": 16, "max_retries": 0, "seed": 3, "model": MODEL, **options}
    return ChatOpenAI(base_url=f"{url}/v1", api_key=key, **options)


def answers(judge: Judge, args: Namespace) -> None:
    model = chat(args.demo, args.key)
    with judge("ChatOpenAI: invoke"):
        whole = model.invoke(TALK)
        assert whole.content
        assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["output_tokens"] > 0
        assert whole.response_metadata["finish_reason"] in ("length", "stop")
    with judge("ChatOpenAI: stream, with usage"):
        chunks: list[AIMessageChunk] = list(chat(args.demo, args.key, stream_usage=True).stream(TALK))
        assert "".join(chunk.text for chunk in chunks) == whole.content
        total = chunks[0]
        for chunk in chunks[1:]:
            total += chunk
        assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    with judge("ChatOpenAI: batch and asynchronous"):
        assert [message.content for message in model.batch([TALK] * 4)] == [whole.content] * 4
        assert asyncio.run(_streamed(model)) == whole.content
    with judge("ChatOpenAI: logprobs"):
        scored = chat(args.demo, args.key, logprobs=True, top_logprobs=2).invoke(TALK)
        assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    with judge("ChatOpenAI: a chain with a prompt, a parser and a stop string"):
        chain = ChatPromptTemplate.from_template("def {name}(n):\n") | model.bind(stop=["\n"]) | StrOutputParser()
        assert "\n" not in chain.invoke({"name": "fib"})
    with judge("OpenAI: completions, whole, in a stream, several prompts"):
        complete = OpenAI(
            base_url=f"{args.demo}/v1", api_key=args.key, model=MODEL, max_tokens=16, max_retries=0, seed=3
        )
        text = complete.invoke(PROMPT)
        assert "".join(complete.stream(PROMPT)) == text
        assert [each[0].text for each in complete.generate([PROMPT, PROMPT]).generations] == [text, text]


async def _streamed(model: ChatOpenAI) -> str:
    return "".join([chunk.text async for chunk in model.astream(TALK)])


class Pick(BaseModel):
    """What to answer."""

    colour: Literal["red", "green", "blue"]
    final: bool


def features(judge: Judge, args: Namespace) -> None:
    model = chat(args.demo, args.key, max_tokens=200)
    with judge("ChatOpenAI: with_structured_output"):
        assert isinstance(model.with_structured_output(Pick).invoke(TALK), Pick)
    with judge("ChatOpenAI: bind_tools, whole and in a stream"):
        bound = model.bind_tools([Pick], tool_choice="Pick")
        (call,) = bound.invoke(TALK).tool_calls
        assert call["name"] == "Pick"
        picked = Pick.model_validate(call["args"])
        total = functools.reduce(operator.add, bound.stream(TALK))
        assert [Pick.model_validate(each["args"]) for each in total.tool_calls] == [picked]
    with judge("ChatOpenAI: through the API of responses"):
        answer = chat(args.demo, args.key, max_tokens=24, seed=None, use_responses_api=True)
        assert answer.invoke(TALK).text
        assert "".join(chunk.text for chunk in answer.stream(TALK))


def errors(judge: Judge, args: Namespace) -> None:
    with judge("unknown model: NotFoundError"):
        raises(openai.NotFoundError, lambda: chat(args.demo, args.key, model="nope").invoke(TALK))
    with judge("context overflow: ContextOverflowError"):
        raises(ContextOverflowError, lambda: chat(args.demo, args.key, max_tokens=CONTEXT + 1).invoke(TALK))
    with judge("a wrong key: AuthenticationError"):
        raises(openai.AuthenticationError, lambda: chat(args.demo, "sk-wrong").invoke(TALK))
    with judge("a timeout: APITimeoutError"):
        raises(openai.APITimeoutError, lambda: chat(args.scripted, args.key, timeout=0.5).invoke(THINK_LONG))
        assert idle(args.scripted, args.key)
    with judge("an error in mid-stream: APIError"):
        stream = chat(args.scripted, args.key).stream(FAIL_MIDWAY)
        assert next(stream) is not None
        raises(openai.APIError, lambda: list(stream))
    with judge("leaving a stream ends its request in the engine"):
        stream = chat(args.demo, args.key, max_tokens=900, extra_body={"ignore_eos": True}).stream(TALK)
        next(stream)
        stream.close()
        assert idle(args.demo, args.key)


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    answers(judge, args)
    features(judge, args)
    errors(judge, args)
    judge.end()


if __name__ == "__main__":
    main()
