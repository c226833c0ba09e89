"""The workloads of the drafters' table: requests in an order, and how much of their answers stands somewhere already.

A workload is a JSONL file. Each line has a "prompt" and "max_tokens", and may have a "prediction" of the answer and
an "id"; benchmarks/workloads holds some. Other fields are for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import Case
from decoding.errors import ConfigError, nearest
from decoding.text import Tokenizer

FOLDER = Path("benchmarks/workloads")
RUN = 8  # tokens that must stand somewhere in a row to count as copied
EDITED_LINES = 20  # one line in so many is edited


@dataclass(frozen=True)
class Request(Case):
    """A line of a workload in tokens of the target."""

    tokens: int = 0  # to be made, exactly
    prediction: tuple[int, ...] = ()  # of them; (): none


@dataclass(frozen=True)
class Workload:
    """Requests that are served one after the other."""

    name: str
    requests: tuple[Request, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(len(request.ids) + request.tokens for request in self.requests)

    @property
    def predicts(self) -> bool:
        return any(request.prediction for request in self.requests)

    def first(self, count: int | None, tokens: int | None) -> Workload:
        """The first ``count`` requests, and ``tokens`` of each answer at the most; None: all."""
        kept = self.requests[:count]
        return replace(self, requests=tuple(replace(r, tokens=min(r.tokens, tokens or r.tokens)) for r in kept))


def names() -> list[str]:
    """Of the workloads that are here."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def load(name: str, tokenizer: Tokenizer) -> Workload:
    """Read one by its name, or a file of one's own.

    Raises:
        ConfigError: no such workload, or a line that is no request.
    """
    path = Path(name) if name.endswith(".jsonl") else FOLDER / f"{name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        hint = f"give a file, or {nearest(name, names())}"
        raise ConfigError(f"there is no workload {name!r} ({path} cannot be read): {hint}") from None
    if not lines:
        raise ConfigError(f"{path} is empty; give it a request on each line")
    requests = (_request(path, number, line, tokenizer) for number, line in enumerate(lines, start=1))
    return Workload(path.stem, tuple(requests))


def _request(path: Path, number: int, line: str, tokenizer: Tokenizer) -> Request:
    try:
        item = json.loads(line)
        prompt, tokens, prediction = item["prompt"], item["max_tokens"], item.get("prediction", "")
        fine = isinstance(prompt, str) and isinstance(prediction, str) and isinstance(tokens, int) and tokens > 0
    except (ValueError, KeyError, TypeError, AttributeError):
        fine = False
    if not fine or not prompt:
        raise ConfigError(
            f'{path}, line {number} is no request; it needs a "prompt" and "max_tokens", and may have a "prediction"'
        )
    ids = tuple(tokenizer.encode(prompt))
    return Request(number - 1, ids, number, tokens, tuple(tokenizer.encode(prediction, add_special_tokens=False)))


# what is known beforehand ---------------------------------------------------------------------------------------------


def known_shares(workload: Workload, answers: Sequence[Sequence[int]]) -> dict[str, float]:
    """How much of the answers a drafter could have copied: shares of their tokens.

    Returns:
        "prompt": in a run of RUN tokens that stands in the request's prompt; "answers": in an earlier answer of the
        workload; "either": in one of them.
    """
    counts = {"prompt": 0, "answers": 0, "either": 0}
    earlier: set[tuple[int, ...]] = set()
    for request, answer in zip(workload.requests, answers, strict=True):
        in_prompt = covered(answer, set(_runs(request.ids)))
        in_answers = covered(answer, earlier)
        counts["prompt"] += len(in_prompt)
        counts["answers"] += len(in_answers)
        counts["either"] += len(in_prompt | in_answers)
        earlier.update(_runs(answer))
    total = sum(len(answer) for answer in answers)
    return {name: count / total for name, count in counts.items()}


def covered(tokens: Sequence[int], runs: set[tuple[int, ...]]) -> set[int]:
    """Indices of the tokens that lie in one of the runs."""
    found = (index for index, run in enumerate(_runs(tokens)) if run in runs)
    return {index + offset for index in found for offset in range(RUN)}


def _runs(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return (tuple(tokens[index : index + RUN]) for index in range(len(tokens) - RUN + 1))


# predictions ----------------------------------------------------------------------------------------------------------


def predicting(workload: Workload, texts: Sequence[str], tokenizer: Tokenizer) -> Workload:
    """The same requests with these predictions."""
    predicted = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    pairs = zip(workload.requests, predicted, strict=True)
    return replace(workload, requests=tuple(replace(request, prediction=ids) for request, ids in pairs))


def edited(texts: Iterable[str]) -> list[str]:
    """The texts with one line in twenty (of all of them, counted through) changed in its middle word."""
    done, result = EDITED_LINES // 2, []
    for text in texts:
        lines = text.split("\n")
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            done += 1
            if done % EDITED_LINES == 0:
                lines[number] = _changed(line)
        result.append("\n".join(lines))
    return result


def _changed(line: str) -> str:
    indent, words = line[: len(line) - len(line.lstrip())], line.split()
    words[len(words) // 2] = "edited"
    return indent + " ".join(words)
