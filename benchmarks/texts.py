"""What an acceptance report is measured on: prompts to be continued, and real texts to be replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from decoding.errors import ConfigError

START = 16  # tokens of a real text that are given; drafting begins after them

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Prompt:
    """A prompt, how far to continue it, and the seed that goes with it in every measurement."""

    name: str
    ids: tuple[int, ...]
    tokens: int  # to be made
    seed: int


@dataclass(frozen=True)
class Script:
    """A text whose tokens are known: ``given`` of them are the prompt, the others are dictated one by one."""

    name: str
    ids: tuple[int, ...]
    given: int
    seed: int = 0


@dataclass(frozen=True)
class Room:
    """How long texts may and must be."""

    context: int  # tokens of prompt and text together, at most
    least: int  # tokens after the prompt, at least


def load_prompts(path: Path, encode: Encode, room: Room, *, max_tokens: int, limit: int | None) -> list[Prompt]:
    """Read a JSONL file whose lines are ``{"prompt": TEXT, "id": NAME}``; the id is optional.

    Args:
        max_tokens: to be made after each prompt; fewer where the context ends before.
        limit: read only this many lines.

    Raises:
        ConfigError: no such file, a line that is none, no lines, a prompt that leaves too little room.
    """
    prompts = []
    for number, (name, text) in enumerate(_lines(path, ("prompt",), limit), start=1):
        ids = tuple(encode(text))
        left = room.context - len(ids)
        if not ids:
            raise ConfigError(f"{path}, line {number}: the prompt is empty; give it text or take the line out")
        if left < room.least:
            raise ConfigError(
                f"{path}, line {number}: the prompt has {len(ids)} tokens, and the context of {room.context} leaves no "
                f"room for the {room.least} tokens without which nothing can be measured. Shorten the prompt, or lower "
                "--max-depth."
            )
        prompts.append(Prompt(name, ids, min(max_tokens, left), seed=number))
    return prompts


def load_scripts(path: Path, encode: Encode, room: Room, *, limit: int | None) -> list[Script]:
    """Real texts: each line's "prompt" or "text" of a JSONL file, or one text file; cut into pieces of the context.

    Pieces too short to be scored behind their first ``START`` tokens are left out.

    Raises:
        ConfigError: no such file, a line that is none, no text that is long enough.
    """
    texts = _lines(path, ("prompt", "text"), limit) if path.suffix == ".jsonl" else iter([(path.name, _read(path))])
    scripts = []
    for name, text in texts:
        ids = tuple(encode(text))
        for first in range(0, len(ids), room.context):
            piece = ids[first : first + room.context]
            if len(piece) >= START + room.least:
                scripts.append(Script(f"{name}+{first}", piece, START))
    if not scripts:
        raise ConfigError(f"{path}: no text has the {START + room.least} tokens that a replay needs; give longer ones")
    return scripts[:limit]


def _lines(path: Path, fields: tuple[str, ...], limit: int | None) -> Iterator[tuple[str, str]]:
    """(name, text) of each line of a JSONL file; the text is the first of ``fields`` that the line has."""
    wanted = " or ".join(f'"{field}"' for field in fields)
    lines = [(n, line) for n, line in enumerate(_read(path).splitlines(), start=1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path} is empty; give it a JSON object with {wanted} on each line")
    for number, line in lines[:limit]:
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}, line {number} is not JSON ({error.msg}, column {error.colno}); every line must be an "
                f"object with {wanted}"
            ) from None
        text = next((item[field] for field in fields if field in item), None) if isinstance(item, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f"{path}, line {number} has no text in {wanted}; every line must be an object with it")
        yield str(item.get("id", f"line {number}")), text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read ({reason}); give the path of a text or JSONL file") from None
