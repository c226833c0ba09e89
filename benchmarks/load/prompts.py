"""Prompts from files, in the forms that are about, and synthetic ones.

Forms: JSONL with ``prompt`` or ``messages`` on each line (and ``max_tokens``; benchmarks/workloads), Spec-Bench's
question.jsonl (``turns``), and ShareGPT's JSON (``conversations``). The form is known by the fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from decoding.errors import ConfigError

CHARACTERS_PER_TOKEN = 4  # of English text, roughly; used where there is no tokenizer
CountTokens = Callable[[str], int]
_HUMANS = ("human", "user")
# short words that common vocabularies hold whole: about a token each
_WORDS = re.findall(
    r"\w+",
    """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work number night point home water room mother area money
    story fact month lot right study book eye job word business issue side kind head house service friend father
    power hour game line end member law car city name team minute idea body back parent face level door art war
    party result change morning reason research girl guy moment air teacher force order field road table
    """,
)


@dataclass(frozen=True)
class Prompt:
    """What one request sends.

    Attributes:
        text: of a completion, or of a chat's one user message.
        ids: of a completion, in place of ``text``: for servers whose tokenizers differ.
        messages: of a chat, in place of ``text``.
        max_tokens: of its answer.
        category: what it is a case of, where its file says so; figures are told by category, too.
    """

    max_tokens: int
    text: str = ""
    ids: tuple[int, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    category: str | None = None


@dataclass(frozen=True)
class Synthetic:
    """Lengths of synthetic prompts and answers, in tokens.

    Attributes:
        range_ratio: lengths are drawn from length * (1 ± range_ratio).
        prefix_len: tokens that all prompts have in common, before the others.
    """

    input_len: int = 256
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0


def approximate_tokens(text: str) -> int:
    """How many tokens a text may have, without a tokenizer."""
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))


def read_prompts(path: Path, output_len: int | None, default_len: int, count: CountTokens) -> list[Prompt]:
    """The prompts of a file.

    Args:
        output_len: tokens of every answer; None: what the file says, or else ``default_len``.
        count: how many tokens an answer in the file has, which is as long as ours is to be.

    Raises:
        ConfigError: a file that cannot be read, or of no known form; with the line.
    """
    entries = list(_entries(path))
    prompts = [
        prompt
        for place, entry in entries
        if (prompt := _prompt(f"{path}, {place}", entry, output_len, default_len, count)) is not None
    ]
    if not prompts:
        raise ConfigError(f"{path} has no prompts; its lines need one of: prompt, messages, turns, conversations")
    return prompts


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts of {path}: {error}; name a file with --dataset-path") from error
    if text.lstrip().startswith("["):
        whole = _parsed(path, "the file", text)
        yield from ((f"entry {number}", entry) for number, entry in enumerate(whole, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(path, f"line {number}", line)


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {place} is no JSON ({error}); it must be JSONL, or one JSON list") from error


def _prompt(place: str, entry: Any, output_len: int | None, default_len: int, count: CountTokens) -> Prompt | None:
    """One entry's prompt; None for a ShareGPT conversation in which nobody asks and nobody answers."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{place} is not an object; it needs one of: prompt, messages, turns, conversations")
    if "conversations" in entry:
        return _conversation(place, entry["conversations"], output_len, count)
    length = output_len or entry.get("max_tokens") or default_len
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"{place}: max_tokens is {length!r} and must be a whole number of at least 1")
    category = str(entry["category"]) if entry.get("category") else None
    if isinstance(text := entry.get("prompt"), str):
        return Prompt(length, text, category=category)
    if isinstance(turns := entry.get("turns"), list) and turns and isinstance(turns[0], str):
        return Prompt(length, turns[0], category=category)
    if isinstance(messages := entry.get("messages"), list) and messages:
        return Prompt(length, messages=tuple(messages), category=category)
    raise ConfigError(f"{place} has no prompt; it needs one of: prompt, messages, turns, conversations")


def _conversation(place: str, said: Any, output_len: int | None, count: CountTokens) -> Prompt | None:
    try:
        turns = [(str(each["from"]), str(each["value"])) for each in said]
    except (TypeError, KeyError) as error:
        raise ConfigError(f'{place}: conversations must be a list of {{"from", "value"}}') from error
    for (who, question), (_, answer) in pairwise(turns):
        if who in _HUMANS and question:
            return Prompt(output_len or max(1, count(answer)), question)
    return None


def synthetic_prompts(
    shape: Synthetic, number: int, seed: int, cut: Callable[[str, int], str] | None = None
) -> list[Prompt]:
    """Prompts of random words, which no cache knows beyond their common prefix.

    Args:
        cut: (text, tokens) -> the text's first tokens; without one a word is taken for a token.
    """
    rng = np.random.default_rng([seed, 0x5ACCADE])
    prefix = _words(rng, shape.prefix_len, cut)
    return [
        Prompt(
            _drawn(rng, shape.output_len, shape.range_ratio),
            (prefix + " " if prefix else "") + _words(rng, _drawn(rng, shape.input_len, shape.range_ratio), cut),
        )
        for _ in range(number)
    ]


def _drawn(rng: np.random.Generator, length: int, ratio: float) -> int:
    low, high = int(length * (1 - ratio)), int(np.ceil(length * (1 + ratio)))
    return max(1, int(rng.integers(low, high + 1)))


def _words(rng: np.random.Generator, tokens: int, cut: Callable[[str, int], str] | None) -> str:
    chosen: Sequence[int] = rng.integers(0, len(_WORDS), tokens).tolist()
    text = " ".join(_WORDS[each] for each in chosen)
    return text if cut is None else cut(text, tokens)
