"""Names for the beginnings of a request: two requests share a name when they begin alike, and so share K/V."""

from __future__ import annotations

import hashlib
from typing import Any

import pydantic_core

from server.openai.sse import to_json

BLOCK_CHARS = 256  # a beginning is named every so many characters: some 60 tokens, four pages
MOST_KEYS = 64
LOOK_BYTES = 128 * 1024  # of a body that are read for it: more than the keys cover, whatever stands before the text

_SECTION = "\x1e"  # between parts of a text; JSON escapes it, so that no part can contain it


def prefix_keys(path: str, body: bytes | bytearray, owner: str = "") -> tuple[str, ...]:
    """A key for each beginning of the request's text, the shortest first; the last is of all of it (up to MOST_KEYS
    blocks). None for a request without a text, or one that the application will refuse.

    Args:
        path: of the endpoint.
        body: JSON; what is beyond LOOK_BYTES is left out.
        owner: whose cached prefixes the request may share, where not everybody's.
    """
    look = bytes(body[:LOOK_BYTES]).decode("utf-8", "ignore")  # a character cut in two at the end is left out
    try:
        fields = pydantic_core.from_json(look, allow_partial="trailing-strings")
    except ValueError:
        return ()
    if not isinstance(fields, dict):
        return ()
    text = _text(path, fields)
    if not text:
        return ()
    return _keys(to_json([owner, fields.get("model"), fields.get("cache_salt")]), text)


def _keys(seed: str, text: str) -> tuple[str, ...]:
    """Of each beginning that is a whole number of blocks, and of the text."""
    digest = hashlib.blake2b(seed.encode("ascii"), digest_size=8)
    keys = []
    for start in range(0, min(len(text), BLOCK_CHARS * MOST_KEYS), BLOCK_CHARS):
        digest.update(text[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass"))
        keys.append(digest.copy().hexdigest())
    return tuple(keys)


def _text(path: str, fields: dict[str, Any]) -> str:
    """The request's text in the order in which templates render it; not the rendered text, but alike where that is."""
    if path == "/v1/completions":
        return _first_prompt(fields.get("prompt"))
    if path == "/v1/chat/completions":
        return _sections(fields.get("tools"), fields.get("messages"))
    if path == "/v1/responses":
        return _sections(fields.get("tools"), fields.get("instructions"), fields.get("input"))
    return ""


def _first_prompt(prompt: Any) -> str:
    """Of several prompts the first: the others go where it goes."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return ",".join(map(str, prompt))
    return prompt if isinstance(prompt, str) else ""


def _sections(*parts: Any) -> str:
    """A part that is a list grows at its end as a conversation does: so does its text."""
    told = []
    for part in parts:
        if part:
            told += [to_json(item) for item in part] if isinstance(part, list) else [to_json(part)]
    return _SECTION.join(told)
