"""Training text as windows of tokens: read, tokenised, packed into one stream, cut, shuffled.

Which windows a step sees is a pure function of (seed, step), so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoding.text import Tokenizer
from training.errors import TrainError

VALIDATION_SHARE = 0.01
MAX_VALIDATION_WINDOWS = 64
ENCODED_AT_ONCE = 256  # documents a call of the tokenizer, which works on them in parallel


@dataclass(frozen=True)
class Document:
    """One text of the corpus, as text or as token ids."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0  # leading tokens that are no labels
    ended: bool = True  # the end-of-text token after it is a label; false for text that was cut off


@dataclass(frozen=True)
class Corpus:
    """All documents in one stream, each followed by an end-of-text token."""

    tokens: np.ndarray  # [N] int32
    counts: np.ndarray  # [N] bool, the token is a label

    @staticmethod
    def build(documents: Iterable[Document], tokenizer: Tokenizer, end: int | None, vocab_size: int) -> Corpus:
        """Tokenise and pack.

        Args:
            end: token put after every document; None for tokenizers without one.

        Raises:
            TrainError: token ids that the model does not have.
        """
        ids: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for encoded, document in _encoded(documents, tokenizer):
            closed = np.append(encoded, [end] if end is not None else []).astype(np.int32)
            if len(closed) and not 0 <= int(closed.min()) <= int(closed.max()) < vocab_size:
                raise TrainError(
                    f"the data has token ids up to {int(closed.max())}, and the model has {vocab_size}: the data was "
                    "tokenised for another model; give text, or ids of this model's tokenizer"
                )
            ids.append(closed)
            labels = np.arange(len(closed)) >= document.prompt_tokens
            labels[len(encoded) :] &= document.ended
            counts.append(labels)
        if not ids:
            raise TrainError("the data holds no text; give files with text, or JSONL with text, prompt or token_ids")
        return Corpus(np.concatenate(ids), np.concatenate(counts))


class WindowSampler:
    """Windows of ``window`` tokens, without overlap, in another order and at another offset in each epoch.

    The last windows of the stream are kept for validation.

    Raises:
        TrainError: fewer tokens than a useful run needs.
    """

    def __init__(self, corpus: Corpus, window: int, batch: int, seed: int) -> None:
        total = len(corpus.tokens) // window
        self.validation_windows = max(1, min(MAX_VALIDATION_WINDOWS, int(total * VALIDATION_SHARE)))
        # an epoch's offset costs one window
        self.epoch_windows = (len(corpus.tokens) - self.validation_windows * window) // window - 1
        if self.epoch_windows < batch:
            raise TrainError(
                f"{len(corpus.tokens)} tokens of data are too little: a step takes {batch} windows of {window} tokens, "
                "and some are kept for validation; give more data, or lower --batch or --window"
            )
        self._corpus, self._window, self._batch, self._seed = corpus, window, batch, seed
        self._order: tuple[int, int, np.ndarray] | None = None  # epoch, offset, order of its windows

    @property
    def steps_per_epoch(self) -> int:
        return self.epoch_windows // self._batch

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, counts) [B, S] of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        offset, order = self._epoch(epoch)
        first = offset + order[within * self._batch : (within + 1) * self._batch] * self._window
        return self._cut(first)

    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, counts) [windows, S] that no step sees."""
        end = len(self._corpus.tokens)
        return self._cut(end - self._window * np.arange(self.validation_windows, 0, -1))

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng([self._seed, epoch])
            self._order = epoch, int(random.integers(self._window)), random.permutation(self.epoch_windows)
        return self._order[1:]

    def _cut(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = first[:, None] + np.arange(self._window)
        return self._corpus.tokens[at].astype(np.int64), self._corpus.counts[at]


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """The documents of text files (each file is one) and JSONL files (each line is one).

    A JSONL line has "text"; or "prompt" with or without "completion"; or "token_ids" with or without "prompt_tokens"
    (how many of them are no labels) and "ended" (false: the text was cut off there).

    Raises:
        TrainError: a file that is missing, no UTF-8, or malformed; the message names file and line.
    """
    for path in paths:
        try:
            if path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as lines:
                    for number, line in enumerate(lines, start=1):
                        if line.strip():
                            yield _document(line, f"{path}, line {number}")
            else:
                yield Document(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise TrainError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
        except OSError as error:
            raise TrainError(f"{path} cannot be read ({error.strerror}); check --data") from error


def _document(line: str, place: str) -> Document:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise TrainError(f"{place} is no JSON ({error}); every line of a .jsonl file is one object") from error
    if isinstance(entry, dict):
        ids, prompt_tokens, ended = entry.get("token_ids"), entry.get("prompt_tokens", 0), entry.get("ended", True)
        sound = isinstance(prompt_tokens, int) and isinstance(ended, bool)
        if sound and isinstance(ids, list) and all(type(i) is int for i in ids):
            return Document(token_ids=tuple(ids), prompt_tokens=prompt_tokens, ended=ended)
        parts = [entry["text"]] if "text" in entry else [entry.get("prompt"), entry.get("completion", "")]
        if ids is None and all(isinstance(part, str) for part in parts):
            return Document("".join(parts))
    raise TrainError(
        f'{place} has no usable "text", "prompt" or "token_ids"; give one of them as text or a list of ids'
    )


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, Document]]:
    waiting: list[Document] = []

    def encode() -> Iterator[tuple[np.ndarray, Document]]:
        many = tokenizer.encode_many([document.text for document in waiting])
        yield from ((np.array(ids, dtype=np.int64), document) for ids, document in zip(many, waiting, strict=True))
        waiting.clear()

    for document in documents:
        if document.token_ids:
            yield np.array(document.token_ids, dtype=np.int64), document
        elif document.text:
            waiting.append(document)
            if len(waiting) == ENCODED_AT_ONCE:
                yield from encode()
    yield from encode()
