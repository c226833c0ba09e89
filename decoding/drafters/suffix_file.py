"""The file in which the suffix drafter keeps outputs beyond the end of the server.

Little-endian: MAGIC, version, fingerprint of the vocabulary, key of the salts' hashes, number of texts and of their
tokens; then per text its tree and its length (int64 each), all tokens (int32), and a checksum of everything before.
It is replaced whole, so there is always a good one, and only its owner may read it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from decoding.drafters.suffix_search import Saved
from decoding.errors import ModelError
from decoding.text import Tokenizer

logger = logging.getLogger("saccade.engine")

MAGIC = b"saccade suffixes"
VERSION = 1
HEADER = struct.Struct("<16sI32s32sQQ")
CHECKSUM_BYTES = 32


def fingerprint(tokenizer: Tokenizer) -> bytes:
    """Equal for tokenizers whose ids mean the same tokens; 32 bytes."""
    tokens = sorted((number, token) for token, number in tokenizer.vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).digest()


@dataclass(frozen=True)
class Kept:
    """What a file holds."""

    key: bytes  # of the hashes by which trees are told apart, 32 bytes
    texts: Saved


class SuffixFile:
    """One file, of one engine at a time: of several that write to it, the last one wins.

    Raises:
        ModelError: it could not be written where it is to be.
    """

    def __init__(self, path: str, vocabulary: bytes) -> None:
        self.path = Path(path)
        self._vocabulary = vocabulary
        self._writer: threading.Thread | None = None
        if not self.path.parent.is_dir():
            raise ModelError(f"suffix: there is no folder {str(self.path.parent)!r} for {self.path}; create it")
        if not os.access(self.path.parent, os.W_OK):
            raise ModelError(f"suffix: the folder of {self.path} cannot be written to; name a file elsewhere")

    def read(self) -> Kept | None:
        """What was kept; None where nothing was yet.

        Raises:
            ModelError: a file that cannot be read, is damaged, or belongs to something else.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ModelError(f"suffix: {self.path} cannot be read ({error.strerror}); name another file") from error
        return self._unpack(content)

    def write(self, kept: Kept) -> None:
        """Replace the file. A failure is logged: nobody's request is to suffer from it."""
        self.wait()
        self._write(kept)

    def write_soon(self, kept: Kept) -> None:
        """The same, beside the engine; left out while the last one is not done."""
        if self._writer is not None and self._writer.is_alive():
            return
        self._writer = threading.Thread(target=self._write, args=(kept,), name="suffix-file", daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Until ``write_soon`` is done."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, kept: Kept) -> None:
        try:
            self._replace(self._pack(kept))
        except OSError as error:
            logger.warning(
                "what suffix decoding has learned cannot be kept in %s (%s): the next attempt is made with the next "
                "save; make room or name another file",
                self.path,
                error.strerror or error,
            )

    def _replace(self, content: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.", suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except OSError:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _pack(self, kept: Kept) -> bytes:
        trees, lengths, tokens = (part.numpy() for part in kept.texts)
        header = HEADER.pack(MAGIC, VERSION, self._vocabulary, kept.key, len(trees), len(tokens))
        parts = (trees.astype("<i8"), lengths.astype("<i8"), tokens.astype("<i4"))
        content = b"".join([header, *(part.tobytes() for part in parts)])
        return content + checksum(content)

    def _unpack(self, content: bytes) -> Kept:
        start = f"suffix: {self.path}"
        if content[: len(MAGIC)] != MAGIC:
            raise ModelError(f"{start} is no file of suffix decoding; name another one: --speculate suffix=FILE")
        if len(content) < HEADER.size + CHECKSUM_BYTES:
            raise ModelError(f"{start} is truncated; delete it or bring back a copy")
        _, version, vocabulary, key, texts, tokens = HEADER.unpack_from(content)
        if version != VERSION:
            raise ModelError(
                f"{start} has format {version}, and this version reads format {VERSION}; delete it or name another file"
            )
        size = HEADER.size + 16 * texts + 4 * tokens + CHECKSUM_BYTES
        if len(content) != size:
            raise ModelError(f"{start} has {len(content)} bytes instead of {size}; delete it or bring back a copy")
        if checksum(content[:-CHECKSUM_BYTES]) != content[-CHECKSUM_BYTES:]:
            raise ModelError(f"{start} is damaged: its checksum is wrong; delete it or bring back a copy")
        if vocabulary != self._vocabulary:
            raise ModelError(
                f"{start} was written with another tokenizer, whose ids mean other tokens; name another file for this "
                "model"
            )
        return Kept(key, _parts(content, texts, tokens))


def checksum(content: bytes) -> bytes:
    """What stands at the end of a file with this content."""
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def _parts(content: bytes, texts: int, tokens: int) -> Saved:
    """The arrays behind the header."""
    wide = np.frombuffer(content, dtype="<i8", count=2 * texts, offset=HEADER.size).astype(np.int64)
    narrow = np.frombuffer(content, dtype="<i4", count=tokens, offset=HEADER.size + 16 * texts).astype(np.int32)
    return torch.from_numpy(wide[:texts]), torch.from_numpy(wide[texts:]), torch.from_numpy(narrow)
