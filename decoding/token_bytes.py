"""The bytes that each token adds to a text: the ground that decoding, streaming and logprobs stand on.

A tokenizer's decoder turns a list of tokens into text all at once. For streaming we need the share of one token, and
it must be bytes, because a token may end in the middle of a character. Decoders that language models use have such a
share: it depends on the token, and at most on the one before it.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

from decoding.errors import ModelError

_PER_TOKEN = ("Replace", "ByteFallback", "Strip", "Metaspace", "WordPiece", "BPEDecoder")


class TokenBytes(Protocol):
    def piece(self, token_id: int, previous: int | None) -> bytes | None:
        """What ``token_id`` adds to a text whose last token is ``previous`` (None: it is the first one).

        Returns None when the id has no token.
        """
        ...


def token_bytes_of(backend: Any) -> TokenBytes:
    """The right implementation for a ``tokenizers.Tokenizer``, judged by its decoder.

    Raises:
        ModelError: for a decoder whose text is not a concatenation of its tokens' shares.
    """
    parts = _parts(backend)
    kinds = [part["type"] for part in parts if part["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        return ByteLevel(backend)
    fused = [part["type"] for part in parts].index("Fuse") if len(kinds) < len(parts) else len(parts)
    for place, part in enumerate(parts):
        kind = part["type"]
        known = kind == "Fuse" or (kind in _PER_TOKEN and (place < fused or kind == "Strip"))
        if not known or (kind == "Strip" and part["stop"] > 0):
            raise ModelError(
                f"The tokenizer's decoder has a step {json.dumps(part)} that cannot be decoded token by token; "
                f"supported are ByteLevel, and {', '.join(_PER_TOKEN)} (before Fuse; Strip only at the start)."
            )
    return Decoded(backend, byte_fallback="ByteFallback" in kinds, looks_back="BPEDecoder" in kinds)


class ByteLevel:
    """Byte-level BPE: a token's characters stand for its bytes (the alphabet of GPT-2)."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        self._known: dict[int, bytes] = {}

    def piece(self, token_id: int, previous: int | None) -> bytes | None:
        found = self._known.get(token_id)
        if found is None and (token := self._backend.id_to_token(token_id)) is not None:
            found = self._known[token_id] = self._spell(token)
        return found

    def _spell(self, token: str) -> bytes:
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:  # an added token with other characters stands for itself, as a whole
            return token.encode()


class Decoded:
    """Any other tokenizer: asks the library what a token adds after another one; byte tokens ``<0xE4>`` are exact.

    The library replaces *every* byte of a run of byte tokens by U+FFFD when the run is not valid UTF-8, valid
    characters included. Here only the invalid bytes are replaced: else no character could be sent before its run ends.
    """

    def __init__(self, backend: Any, *, byte_fallback: bool, looks_back: bool) -> None:
        self._backend = backend
        self._byte_fallback = byte_fallback
        self._looks_back = looks_back  # the share depends on which token stands before, not only on whether one does
        self._first: dict[int, bytes] = {}
        self._inner: dict[int, bytes] = {}

    def piece(self, token_id: int, previous: int | None) -> bytes | None:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return None
        if self._looks_back and previous is not None:
            return self._added(token_id, token, previous)
        known = self._first if previous is None else self._inner
        found = known.get(token_id)
        if found is None:
            found = known[token_id] = self._added(token_id, token, None if previous is None else token_id)
        return found

    def _added(self, token_id: int, token: str, previous: int | None) -> bytes:
        before = [] if previous is None else [previous]
        alone: str = self._backend.decode(before, skip_special_tokens=False)
        both: str = self._backend.decode([*before, token_id], skip_special_tokens=False)
        added = both[len(alone) :]
        if self._byte_fallback and (byte := _byte_token(token)) is not None:
            return byte if added or previous is not None else b""  # a stripped first space stays stripped
        return added.encode()


def _byte_token(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _parts(backend: Any) -> list[dict[str, Any]]:
    if backend.decoder is None:  # tokens are joined by spaces
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    parts: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return parts


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins by byte: Latin-1's visible characters are themselves, the rest are U+0100 and on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(rest)) for byte in range(256)]
