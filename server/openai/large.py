"""Whole answers that may be large, with many choices or logprobs: others are not kept waiting while one is written.

Python switches between threads between two pieces of work, and never within a call of its JSON encoder. So a large
answer is made in a thread, and encoded piece by piece.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from server.openai.choice_output import Delta

FEW_SCORED = 200  # tokens with logprobs: a few milliseconds
PIECE_ITEMS = 1000  # of lists and objects, encoded at once

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

T = TypeVar("T")


async def made(deltas: Sequence[Delta], make: Callable[[], T]) -> T:
    """``make()``, which renders these deltas: in a thread where that takes its time."""
    scored = sum(len(delta.scored or ()) for delta in deltas)
    return make() if scored <= FEW_SCORED else await asyncio.to_thread(make)


async def in_json(answer: dict[str, Any]) -> bytes:
    """The answer in JSON."""
    if _is_small(answer):
        return _ENCODER.encode(answer).encode()
    return await asyncio.to_thread(lambda: "".join(_pieces(answer)).encode())


def _pieces(value: Any) -> Iterator[str]:
    if _is_small(value):
        yield _ENCODER.encode(value)
    elif isinstance(value, dict):
        for place, (name, member) in enumerate(value.items()):
            yield f"{',' if place else '{'}{_ENCODER.encode(name)}:"
            yield from _pieces(member)
        yield "}"
    else:
        for place, item in enumerate(value):
            yield "," if place else "["
            yield from _pieces(item)
        yield "]"


def _is_small(value: Any) -> bool:
    """Whether it has at most ``PIECE_ITEMS`` items; looks at no more of them."""
    left, inner = PIECE_ITEMS, [value]
    while inner:
        each = inner.pop()
        if isinstance(each, dict | list | tuple):
            left -= len(each)
            if left < 0:
                return False
            inner.extend(each.values() if isinstance(each, dict) else each)
    return True
