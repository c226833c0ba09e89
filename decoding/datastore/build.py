"""Builds a datastore: tokenise, write, sort.

Texts go to the file as they are read. What must be in memory as a whole is the sort's: each token's bytes (one to
three, as the corpus has ids) and a place for each byte, 10 bytes a token for most vocabularies.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from decoding.datastore.corpus import Piece
from decoding.datastore.layout import BLOCK, PARTS, Header, Vocabulary, aligned, place_kind, token_kind
from decoding.errors import ConfigError
from decoding.machine import available_memory
from decoding.text import Tokenizer

logger = logging.getLogger("saccade.datastore")

ENCODED_AT_ONCE = 2**23  # characters a call of the tokenizer, which works on the pieces in parallel
PIECES_AT_ONCE = 1024
SORTED_AT_ONCE = 2**22  # elements that are converted and written at once


class Chunk(NamedTuple):
    """Tokens of a document, or of a part of one."""

    ids: np.ndarray  # [n]
    ends: bool = True  # the document ends here


def encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """The tokens of each piece.

    Raises:
        ConfigError: token ids that the tokenizer does not have.
    """
    waiting: list[Piece] = []
    characters = 0
    for piece in pieces:
        waiting.append(piece)
        characters += len(piece.text)
        if characters >= ENCODED_AT_ONCE or len(waiting) == PIECES_AT_ONCE:
            yield from _encode(waiting, tokenizer)
            waiting, characters = [], 0
    yield from _encode(waiting, tokenizer)


def _encode(pieces: list[Piece], tokenizer: Tokenizer) -> Iterator[Chunk]:
    many = tokenizer.encode_many([piece.text for piece in pieces])
    for piece, ids in zip(pieces, many, strict=True):
        given = piece.token_ids
        if given and not 0 <= min(given) <= max(given) < tokenizer.vocab_size:
            raise ConfigError(
                f"{piece.place} has token ids from {min(given)} to {max(given)}, and the tokenizer's are below "
                f"{tokenizer.vocab_size}: they are of another tokenizer; give text, or name theirs with --tokenizer"
            )
        yield Chunk(np.array(given or ids, dtype=np.int64), piece.ends)


def write(out: Path, chunks: Iterable[Chunk], vocabulary: Vocabulary) -> Header:
    """Write a datastore. It appears when it is complete; what was there before stays until then.

    Raises:
        ConfigError: a corpus without a token, a file that cannot be written, too little memory for the sort, or the
            library that sorts is not there.
    """
    sort = _sorter()
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, such as {out / 'corpus.datastore'}")
    part = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w+b") as file:
            header = _write(file, chunks, vocabulary, sort)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}); give another --out") from error
    finally:
        with contextlib.suppress(OSError):  # not there: it is complete, or could not be begun
            part.unlink()
    return header


Sort = Callable[[np.ndarray], np.ndarray]  # [n] uint8 -> [n] places of its suffixes, in order


def _sorter() -> Sort:
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise ConfigError(
            f"a datastore is sorted by the library pydivsufsort, which is not there ({error}); "
            "pip install 'saccade[datastore]'"
        ) from error
    sort: Sort = divsufsort
    return sort


class _Part:
    """One array of the file as it is written."""

    def __init__(self, file: BinaryIO, kind: np.dtype[Any]) -> None:
        self.offset = file.seek(aligned(file.tell()))
        self.kind = kind
        self.count = 0
        self.digest = hashlib.sha256()
        self._file = file

    def append(self, values: np.ndarray) -> None:
        data = values.astype(self.kind).tobytes()
        self._file.write(data)
        self.digest.update(data)
        self.count += len(values)


def _write(file: BinaryIO, chunks: Iterable[Chunk], vocabulary: Vocabulary, sort: Sort) -> Header:
    file.seek(BLOCK)
    tokens = _Part(file, token_kind(vocabulary.size))
    counts, documents = _append_documents(tokens, chunks, vocabulary.size)
    if not documents:
        raise ConfigError("the corpus holds no text; give files that do")
    starts = _Part(file, np.dtype("<i8"))
    starts.append(np.concatenate([[0], counts.cumsum()]))
    file.flush()
    written = np.memmap(file, tokens.kind, "r", tokens.offset, (tokens.count,))
    suffixes = _Part(file, place_kind(tokens.count))
    for places in sorted_suffixes(written, counts, sort):
        suffixes.append(places)
    parts = zip(PARTS, (tokens, starts, suffixes), strict=True)
    header = Header(vocabulary, tokens.count, documents, {name: part.digest.hexdigest() for name, part in parts})
    file.seek(0)
    file.write(header.spelled())
    return header


def _append_documents(part: _Part, chunks: Iterable[Chunk], separator: int) -> tuple[np.ndarray, int]:
    """([separator + 1] how often each id is there, documents). A separator follows each document that has a token."""
    counts, documents, is_open = np.zeros(separator + 1, dtype=np.int64), 0, False
    for ids, ends in chunks:
        is_open |= len(ids) > 0
        closed = np.append(ids, separator) if ends and is_open else ids
        if ends and is_open:
            documents, is_open = documents + 1, False
        part.append(closed)
        counts += np.bincount(closed, minlength=separator + 1)
    return counts, documents


def sorted_suffixes(tokens: np.ndarray, counts: np.ndarray, sort: Sort) -> Iterator[np.ndarray]:
    """Where the suffixes of ``tokens`` [n] begin, in lexicographic order, in blocks.

    The library sorts bytes. Ids are replaced by their ranks among those that occur, which keeps their order, spelled
    with the highest byte first; of the places in these bytes, those are kept where a token begins.

    Args:
        counts: [ids] how often each occurs.

    Raises:
        ConfigError: too little memory.
    """
    ranks = np.cumsum(counts > 0) - 1
    width = max(1, -(-int(ranks[-1]).bit_length() // 8))
    _check_memory(len(tokens), width)
    spelled = np.empty((len(tokens), width), dtype=np.uint8)
    for first in range(0, len(tokens), SORTED_AT_ONCE):
        block = slice(first, first + SORTED_AT_ONCE)
        for byte in range(width):
            spelled[block, byte] = ranks[tokens[block]] >> 8 * (width - 1 - byte) & 0xFF
    places = sort(spelled.reshape(-1))
    for first in range(0, len(places), SORTED_AT_ONCE):
        found = places[first : first + SORTED_AT_ONCE]
        yield found[found % width == 0] // width


def _check_memory(tokens: int, width: int) -> None:
    spelled = tokens * width
    needed = spelled * (1 + place_kind(spelled).itemsize)
    available = available_memory()
    if available is not None and needed > available:
        raise ConfigError(
            f"sorting {tokens} tokens takes {needed / 2**30:.3g} GiB of memory, and there are "
            f"{available / 2**30:.3g} GiB; give less of the corpus, or a larger machine"
        )
    logger.info("sorting %d tokens, in %.3g GiB of memory", tokens, needed / 2**30)
