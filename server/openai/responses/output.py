"""A response's output: its items, and the events that tell of them as they come."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from server.openai.pieces import CallArguments, CallFailed, CallStart, Piece, Reasoning, Text

Event = dict[str, Any]  # without its sequence number


class OutputItems:
    """Turns pieces into items. One item is open at a time; the next one's beginning closes it.

    Attributes:
        items: those that are complete.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None  # the open one, as it was announced
        self._said: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._broken = False  # the open call has failed
        self._events: list[Event] = []

    def push(self, pieces: Sequence[Piece], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """The events of some pieces; ``logprobs`` are of the tokens of their text."""
        for piece in pieces:
            if isinstance(piece, Text):
                self._open("message")
                self._logprobs += logprobs
                self._say("response.output_text.delta", piece.text, content_index=0, logprobs=list(logprobs))
                logprobs = ()
            elif isinstance(piece, Reasoning):
                self._open("reasoning")
                self._say("response.reasoning_text.delta", piece.text, content_index=0)
            elif isinstance(piece, CallStart):
                self._close("completed")
                self._begin({"type": "function_call", "call_id": piece.id, "name": piece.name, "arguments": ""}, "fc")
            elif isinstance(piece, CallArguments):
                self._say("response.function_call_arguments.delta", piece.fragment)
            else:
                assert isinstance(piece, CallFailed)
                self._broken = True
        return self._taken()

    def finish(self, *, complete: bool) -> list[Event]:
        """The events of the end. An output without anything is an empty message."""
        if not self.items and self._item is None:
            self._open("message")
        self._close("completed" if complete else "incomplete")
        return self._taken()

    def _open(self, kind: str) -> None:
        if self._item is not None and self._item["type"] == kind:
            return
        self._close("completed")
        if kind == "message":
            self._begin({"type": "message", "role": "assistant", "content": []}, "msg")
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            self._begin({"type": "reasoning", "summary": [], "content": []}, "rs")
            part = {"type": "reasoning_text", "text": ""}
        self._tell("response.content_part.added", content_index=0, part=part)

    def _begin(self, item: dict[str, Any], prefix: str) -> None:
        self._item = {"id": f"{prefix}_{secrets.token_hex(16)}", **item, "status": "in_progress"}
        self._said, self._logprobs, self._broken = [], [], False
        self._events.append(self._event("response.output_item.added", item=self._item))

    def _say(self, kind: str, delta: str, **more: Any) -> None:
        self._said.append(delta)
        self._tell(kind, delta=delta, **more)

    def _close(self, status: str) -> None:
        if self._item is None:
            return
        closers: dict[str, Callable[[str], dict[str, Any]]] = {
            "message": self._close_message,
            "reasoning": self._close_reasoning,
            "function_call": self._close_call,
        }
        content = closers[self._item["type"]]("".join(self._said))
        item = {**self._item, **content, "status": "incomplete" if self._broken else status}
        self._events.append(self._event("response.output_item.done", item=item))
        self.items.append(item)
        self._item = None

    def _close_message(self, text: str) -> dict[str, Any]:
        self._tell("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs)
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}
        self._tell("response.content_part.done", content_index=0, part=part)
        return {"content": [part]}

    def _close_reasoning(self, text: str) -> dict[str, Any]:
        self._tell("response.reasoning_text.done", content_index=0, text=text)
        part = {"type": "reasoning_text", "text": text}
        self._tell("response.content_part.done", content_index=0, part=part)
        return {"content": [part]}

    def _close_call(self, arguments: str) -> dict[str, Any]:
        assert self._item is not None
        name = self._item["name"]
        self._tell("response.function_call_arguments.done", arguments=arguments, name=name)
        return {"arguments": arguments}

    def _tell(self, kind: str, **members: Any) -> None:
        assert self._item is not None
        self._events.append(self._event(kind, item_id=self._item["id"], **members))

    def _event(self, kind: str, **members: Any) -> Event:
        return {"type": kind, "output_index": len(self.items), **members}

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events
