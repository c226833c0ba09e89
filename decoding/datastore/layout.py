"""A datastore's file: the token ids of a corpus and their suffix array, mapped into memory.

Little-endian; each part begins at a multiple of 4096 bytes.

    header    one block of 4096 bytes: JSON in one line, padded with spaces
    tokens    [n] uint16, or uint32 for larger vocabularies; each document is followed by a separator, which is no
              token's id but the one after the highest
    starts    [ids + 2] int64: the suffixes that begin with token t are numbers starts[t] .. starts[t + 1] - 1
    suffixes  [n] int32, or int64 beyond 2^31 tokens: where the suffixes begin, in lexicographic order

The file is opened by reading its header. All else stays on disk until a search touches it, page by page, and the
operating system may drop it again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from decoding.errors import ModelError
from decoding.text import Tokenizer

FORMAT, VERSION = "saccade-datastore", 1
BLOCK = 4096  # bytes: parts begin at multiples of it
PARTS = ("tokens", "starts", "suffixes")  # in their order
NO_TOKEN = -1  # what stands outside of the corpus
COMMAND = "saccade datastore build CORPUS --tokenizer MODEL --out PATH"
_READ_AT_ONCE = 2**24  # bytes


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean."""

    name: str  # of the tokenizer, for people
    size: int  # one more than the highest id; the separator's id
    fingerprint: str  # SHA-256 of all tokens and their ids

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str = "") -> Self:
        listed = sorted((number, token) for token, number in tokenizer.vocab().items())
        return cls(name[:100], tokenizer.vocab_size, hashlib.sha256(json.dumps(listed).encode()).hexdigest())


@dataclass(frozen=True)
class Header:
    """Everything about a datastore but its contents."""

    vocabulary: Vocabulary
    tokens: int  # separators included
    documents: int
    sha256: dict[str, str]  # of each part

    @property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """The element types of the parts."""
        return {
            "tokens": token_kind(self.vocabulary.size),
            "starts": np.dtype("<i8"),
            "suffixes": place_kind(self.tokens),
        }

    @property
    def counts(self) -> dict[str, int]:
        """The elements of the parts."""
        return {"tokens": self.tokens, "starts": self.vocabulary.size + 2, "suffixes": self.tokens}

    @property
    def offsets(self) -> dict[str, int]:
        """Where the parts begin, in bytes."""
        offsets, end = {}, BLOCK
        for part in PARTS:
            offsets[part] = aligned(end)
            end = offsets[part] + self.counts[part] * self.kinds[part].itemsize
        return offsets

    @property
    def file_bytes(self) -> int:
        return self.offsets["suffixes"] + self.tokens * self.kinds["suffixes"].itemsize

    def spelled(self) -> bytes:
        """The file's first block."""
        content = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)})
        return content.encode().ljust(BLOCK - 1) + b"\n"

    @classmethod
    def read(cls, block: bytes, path: Path) -> Self:
        """The header in a file's first block.

        Raises:
            ModelError: no datastore, a newer version of one, a damaged one.
        """
        if not block.startswith(f'{{"format": "{FORMAT}"'.encode()):
            raise ModelError(f"{path} is no datastore; give a file that was made by {COMMAND}")
        try:
            content = json.loads(block)
            if content["version"] != VERSION:
                raise ModelError(
                    f"{path} is a datastore of format {content['version']}, and this version of Saccade reads format "
                    f"{VERSION}; build it anew, or use the version of Saccade that made it"
                )
            header = cls(
                Vocabulary(**content["vocabulary"]), content["tokens"], content["documents"], content["sha256"]
            )
            sound = min(header.vocabulary.size, header.tokens) > 0 and set(header.sha256) == set(PARTS)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the header of {path} is damaged ({error!r}); copy the file again, or build it anew"
            ) from error
        if not sound:
            raise ModelError(f"the header of {path} is damaged (its counts are none); build it anew with {COMMAND}")
        return header


def aligned(offset: int) -> int:
    """The first multiple of a block from ``offset`` on."""
    return -(-offset // BLOCK) * BLOCK


def token_kind(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds all ids and the separator."""
    return np.dtype("<u2" if vocab_size <= np.iinfo(np.uint16).max else "<u4")


def place_kind(tokens: int) -> np.dtype[Any]:
    """The smallest type that holds the places of so many tokens."""
    return np.dtype("<i4" if tokens <= np.iinfo(np.int32).max else "<i8")


class Match(NamedTuple):
    """Suffixes number ``first`` .. ``end`` - 1 begin with the last ``length`` tokens of a text."""

    length: int
    first: int
    end: int


NO_MATCH = Match(0, 0, 0)


@dataclass(frozen=True)
class Datastore:
    """An opened datastore. The arrays are the file's own pages: looking at an element may read it from disk."""

    vocabulary: Vocabulary
    tokens: np.ndarray  # [n] uint16 or uint32
    starts: np.ndarray  # [ids + 2] int64
    suffixes: np.ndarray  # [n] int32 or int64

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map a file into memory.

        Raises:
            ModelError: no such file, no datastore, one of a newer format, or one that is not whole.
        """
        path = Path(path).expanduser()
        try:
            with path.open("rb") as file:
                header = Header.read(file.read(BLOCK), path)
                there = os.fstat(file.fileno()).st_size
                if there != header.file_bytes:
                    raise ModelError(
                        f"{path} is not whole: it has {there} bytes, and its header speaks of {header.file_bytes}; "
                        f"copy it again, or build it anew with {COMMAND}"
                    )
                # of pages that nobody may write the system need not set any memory aside, however large the file is
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise ModelError(f"there is no datastore {path}; make one with {COMMAND}") from error
        except OSError as error:
            raise ModelError(
                f"the datastore {path} cannot be read ({error.strerror or error}); give its file"
            ) from error
        if hasattr(mmap, "MADV_RANDOM"):  # else each page that a search touches brings 31 neighbours from the disk
            mapped.madvise(mmap.MADV_RANDOM)
        kinds, counts, offsets = header.kinds, header.counts, header.offsets
        return cls(
            header.vocabulary, *(np.frombuffer(mapped, kinds[part], counts[part], offsets[part]) for part in PARTS)
        )

    def check_vocabulary(self, tokenizer: Tokenizer, path: str | Path) -> None:
        """Make sure that the ids mean the same to a tokenizer.

        Raises:
            ModelError: they do not.
        """
        theirs, ours = self.vocabulary, Vocabulary.of(tokenizer)
        if theirs.fingerprint != ours.fingerprint:
            raise ModelError(
                f"the datastore {path} was built for another tokenizer ({theirs.name or 'unnamed'}, {theirs.size} ids; "
                f"the model's has {ours.size}); build one with the model's: {COMMAND}"
            )

    def token(self, place: int) -> int:
        """The token at a place, ``NO_TOKEN`` outside of the corpus: places of a damaged file may lie there."""
        return int(self.tokens[place]) if 0 <= place < len(self.tokens) else NO_TOKEN

    def longest(self, text: np.ndarray, min_match: int, max_match: int, ids: int) -> Match:
        """The longest end of ``text`` [n] that the corpus has, of ``min_match`` to ``max_match`` tokens.

        If it has an end of the text, it has all shorter ones, so that the length is found by bisection, too.

        Args:
            ids: tokens from this id on are in no match; at most the separator's.
        """
        tail = text[-max_match:].tolist()
        usable = next((i for i, token in enumerate(reversed(tail)) if not 0 <= token < ids), len(tail))
        best, low, high = NO_MATCH, min_match, usable
        while low <= high:
            length = (low + high) // 2
            first, end = self.find(tail[len(tail) - length :])
            if first < end:
                best, low = Match(length, first, end), length + 1
            else:
                high = length - 1
        return best

    def find(self, pattern: list[int]) -> tuple[int, int]:
        """(first, end) of the suffixes that begin with these tokens; both the same if there are none."""
        numbers = range(len(self.suffixes))
        first, end = (min(max(int(self.starts[pattern[0] + i]), 0), len(numbers)) for i in (0, 1))
        for ahead, token in enumerate(pattern[1:], start=1):

            def following(number: int, ahead: int = ahead) -> int:
                return self.token(int(self.suffixes[number]) + ahead)

            # those that agree so far are in the order of their next token
            first = bisect_left(numbers, token, first, end, key=following)
            end = bisect_right(numbers, token, first, end, key=following)
        return first, end


def check_contents(path: str | Path) -> Header:
    """Read a whole datastore and hold its parts against their checksums.

    Raises:
        ModelError: as ``Datastore.open``, and naming a part that has changed since it was built.
    """
    path = Path(path).expanduser()
    Datastore.open(path)
    with path.open("rb") as file:
        header = Header.read(file.read(BLOCK), path)
        for part in PARTS:
            file.seek(header.offsets[part])
            left, digest = header.counts[part] * header.kinds[part].itemsize, hashlib.sha256()
            while left and (data := file.read(min(left, _READ_AT_ONCE))):
                digest.update(data)
                left -= len(data)
            if digest.hexdigest() != header.sha256[part]:
                raise ModelError(f"the {part} of {path} are damaged; copy it again, or build it anew with {COMMAND}")
    return header
