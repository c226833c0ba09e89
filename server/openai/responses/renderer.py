"""Answers of /v1/responses, whole and in events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from decoding.errors import RequestError
from decoding.text import Tokenizer
from server.errors import reply_to
from server.openai.chat_deltas import read
from server.openai.chat_logprobs import scored_token
from server.openai.choice_output import ScoredToken
from server.openai.generation import Generation
from server.openai.large import made
from server.openai.output_parser import OutputParser
from server.openai.pieces import Piece, settled
from server.openai.rendering import Head, usage
from server.openai.responses.output import OutputItems
from server.openai.responses.schema import ResponsesFields
from server.openai.responses.to_chat import here
from server.openai.sse import to_json


class ResponseRenderer:
    """Renders the one choice of a generation.

    Args:
        echoed: what the answer repeats of the request.
        parser: of the choice.
    """

    def __init__(
        self,
        head: Head,
        echoed: dict[str, Any],
        tokenizer: Tokenizer,
        generation: Generation,
        parser: OutputParser,
        alternatives: int,
    ) -> None:
        self._head = head
        self._echoed = echoed
        self._tokenizer = tokenizer
        self._generation = generation
        self._parser = parser
        self._alternatives = alternatives
        self._number = 0  # of the next event
        self._output = OutputItems()  # of a stream

    async def whole(self) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        try:
            (delta,) = await self._generation.collected()
        except RequestError as error:
            raise here(error) from None
        pieces = settled(read(self._parser, self._generation.choices[0], delta))
        output = OutputItems()
        output.push(pieces, await made([delta], lambda: self._logprobs(delta.scored)))
        output.finish(complete=delta.finish_reason != "length")
        return self._ended(output, complete=delta.finish_reason != "length")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer; the first ones come with the first token, so that errors before it are not
        in the stream.
        """
        output, reason = self._output, None
        try:
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    events = [] if self._number else self._begun()
                    pieces: list[Piece] = read(self._parser, self._generation.choices[0], delta)
                    reason = delta.finish_reason
                    events += output.push(pieces, self._logprobs(delta.scored))
                    if events:
                        yield self._bytes(events)
        except RequestError as error:
            raise here(error) from None
        complete = reason != "length"
        events = output.finish(complete=complete)
        kind = "response.completed" if complete else "response.incomplete"
        events.append({"type": kind, "response": self._ended(output, complete=complete)})
        yield self._bytes(events)

    def _begun(self) -> list[dict[str, Any]]:
        response = self._response("in_progress", [])
        return [{"type": f"response.{kind}", "response": response} for kind in ("created", "in_progress")]

    def _ended(self, output: OutputItems, *, complete: bool) -> dict[str, Any]:
        response = self._response("completed" if complete else "incomplete", output.items)
        response["usage"] = _usage(self._generation)
        if complete:
            response["completed_at"] = int(time.time())
            if any(item["type"] == "function_call" for item in output.items):  # metrics tell it, this endpoint does not
                self._generation.choices[0].finish_reason = "tool_calls"
        else:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def failed(self, error: Exception) -> bytes:
        """The end of a stream that an error cut: an event for clients of the specification, which tells the response,
        and one for those that look for errors. The first events go before them if no token came.
        """
        reply = reply_to(error)
        events = [] if self._number else self._begun()
        response = self._response("failed", self._output.items)
        response["error"] = {"code": "server_error", "message": reply.message}
        details = reply.body()["error"]
        flat = {name: details[name] for name in ("code", "message", "param")}
        events.append({"type": "response.failed", "response": response})
        events.append({"type": "error", **flat, "error": details})
        return self._bytes(events)

    def _response(self, status: str, output: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"resp_{self._head.token}",
            "object": "response",
            "created_at": self._head.created,
            "completed_at": None,
            "status": status,
            "model": self._head.model,
            "output": list(output),
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "seed": self._head.seed,
            **self._echoed,
        }

    def _logprobs(self, scored: Sequence[ScoredToken] | None) -> list[dict[str, Any]]:
        return [scored_token(self._tokenizer, token, self._alternatives) for token in scored or ()]

    def _bytes(self, events: Sequence[dict[str, Any]]) -> bytes:
        parts = []
        for event in events:
            numbered = {"type": event["type"], "sequence_number": self._number, **event}
            parts.append(f"event: {event['type']}\ndata: {to_json(numbered)}\n\n")
            self._number += 1
        return "".join(parts).encode("ascii")


def echoed(fields: ResponsesFields, *, temperature: float, top_p: float) -> dict[str, Any]:
    """What an answer repeats of its request; the values of sampling are those that were used."""
    text: dict[str, Any] = {"format": {"type": "text"}}
    if fields.text is not None:
        text |= fields.text.model_dump(by_alias=True, exclude_none=True)
    reasoning = fields.reasoning
    choice = fields.tool_choice or "auto"
    return {
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None} | (reasoning.model_dump(exclude_none=True) if reasoning else {}),
        "store": False,
        "background": False,
        "temperature": temperature,
        "text": text,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in fields.tools or ()],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": top_p,
        "truncation": "disabled",
    }


def _usage(generation: Generation) -> dict[str, Any]:
    """The numbers of a chat completion, under this endpoint's names."""
    told = usage(generation)
    details = told.get("completion_tokens_details", {})
    account = {
        "input_tokens": told["prompt_tokens"],
        "input_tokens_details": {**told["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": told["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0, **details},
        "total_tokens": told["total_tokens"],
    }
    return account if "speculation" not in told else {**account, "speculation": told["speculation"]}
