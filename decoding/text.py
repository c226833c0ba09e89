"""Text on both ends of the engine: tokenizing prompts, and turning tokens back into text as they are made.

Nothing here imports torch or transformers: the HTTP process lives on this module and must start fast.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tokenizers

from decoding.chat import ChatTemplate, find_templates
from decoding.errors import ModelError, RequestError
from decoding.stop_strings import StopStrings
from decoding.token_bytes import TokenBytes, token_bytes_of


class Tokenizer:
    """A model's tokenizer and chat template. ``load`` makes one; methods may be called from several threads.

    Attributes:
        vocab_size: one more than the highest id, added tokens included.
        special_ids: ids that ``decode`` skips by default.
        bos_token_id, eos_token_id: as named in tokenizer_config.json, None when not named.
    """

    def __init__(self, backend: Any, special_tokens: Mapping[str, str], chat: ChatTemplate) -> None:
        self._backend = backend
        self._pieces: TokenBytes = token_bytes_of(backend)
        self._chat = chat
        self._vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.bos_token_id = self._vocab.get(special_tokens.get("bos_token", ""))
        self.eos_token_id = self._vocab.get(special_tokens.get("eos_token", ""))

    @classmethod
    def load(cls, folder: str | Path, *, chat_template: str | None = None) -> Self:
        """Read a model folder.

        Args:
            chat_template: path of a jinja file, or a template itself; default: the model's.

        Raises:
            ModelError: when the folder has no tokenizer that can be read.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        # older checkpoints keep the names of special tokens in a file of their own
        named = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        path = folder / "tokenizer.json"
        backend = _from_file(path, config, named) if path.is_file() else _converted(folder)
        return cls(backend, named, ChatTemplate(find_templates(folder, config, chat_template), named))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat)

    @property
    def chat_variables(self) -> frozenset[str]:
        """The names that the chat template reads."""
        return self._chat.variables

    @property
    def chat_source(self) -> str:
        """The text of the chat template, of all if there are several."""
        return self._chat.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens (a leading bos, say) where the tokenizer's post-processor puts them.

        Raises:
            RequestError: for text that is not valid Unicode.
        """
        _check_unicode(text, "prompt")
        return self._ids(text, add_special_tokens)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens; the texts are worked on in parallel."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(self._spelled(ids, skip_special_tokens)).decode("utf-8", errors="replace")

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The text that the chat template makes of the messages.

        Raises:
            RequestError: without a template, or when the template refuses the messages.
        """
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of ``render_chat``; special tokens are those that the template wrote, none are added.

        Raises:
            RequestError: as ``render_chat``, and for text that is not valid Unicode.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **kwargs)
        _check_unicode(text, "messages")
        return self._ids(text, False)

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly the bytes that this token adds inside a text; b"" for an id without a token."""
        return self._pieces.piece(token_id, token_id) or b""

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is spelled so; None: there is none, or it is not special."""
        token_id = self._vocab.get(text)
        return token_id if token_id in self.special_ids else None

    def spelling(self, token_id: int) -> str:
        """The token as the tokenizer spells it, "Ġdef" for " def" say; "" for an id without a token."""
        spelled: str | None = self._backend.id_to_token(token_id)
        return spelled or ""

    def vocab(self) -> dict[str, int]:
        """Every token (in the tokenizer's spelling) and its id, added tokens included."""
        return dict(self._vocab)

    def piece(self, token_id: int, previous: int | None, skip_special_tokens: bool) -> bytes | None:
        """The bytes that ``token_id`` adds after ``previous``, the last token of the text (None: there is none).

        Returns None for an id that has no place in text: a special token to be skipped, or an id without a token.
        """
        if skip_special_tokens and token_id in self.special_ids:
            return None
        return self._pieces.piece(token_id, previous)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # a batch, because `encode` holds the GIL: half a second of it per megabyte of text
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _spelled(self, ids: Iterable[int], skip_special_tokens: bool) -> Iterator[bytes]:
        previous: int | None = None
        for token_id in ids:
            spelled = self.piece(token_id, previous, skip_special_tokens)
            if spelled is not None:
                yield spelled
                previous = token_id


@dataclass(frozen=True)
class TextDelta:
    """Text that became certain. Concatenated, deltas are the output."""

    text: str
    token_count: int  # output tokens up to here; once stopped: up to the one that completed the stop string
    stopped: bool = False
    stop: str | None = None  # the stop string that ended the output


class TextStream:
    """Turns one output's tokens into text as they come, and ends it at the first stop string.

    Text is held back while it ends in a part of a character, or in what may become a stop string. Every token is
    handled alone, so that the result does not depend on how many tokens a push brings; each costs O(its own bytes).

    Args:
        prompt_ids: what the output continues. Some tokenizers drop the space before the first word of a text: with a
            prompt, the output's first token is not the first.
        stop: the output ends before the first of them that is completed (the longest, if several are at once).
        include_stop: keep the stop string in the text.
        kept: special tokens that are not skipped.
        min_tokens: a stop string that the first so many tokens complete does not end the output.

    Attributes:
        offsets: for every output token, where its text begins in the output's text (before it is cut at a stop).

    Raises:
        RequestError: for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        kept: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._kept = kept
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._partial = False  # the decoder holds the first bytes of a character
        self._stops = StopStrings(stop, include_stop)
        self._previous: int | None = None
        self._length = 0  # characters decoded so far, held back ones included
        self._stop: str | None = None
        self.offsets: list[int] = []
        self._continue(prompt_ids)

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens; those after the end of a stop string are ignored."""
        texts = []
        for token_id in token_ids:
            if self._stop is not None:
                break
            self.offsets.append(self._length)
            texts.append(self._emit(self._characters(self._bytes(token_id))))
        return self._delta("".join(texts))

    def finish(self) -> TextDelta:
        """The output ends here: what was held back, with U+FFFD for an incomplete character."""
        if self._stop is not None:
            return self._delta("")
        text = self._emit(self._utf8.decode(b"", final=True))
        return self._delta(text + self._stops.flush())

    def _characters(self, spelled: bytes) -> str:
        """What can be said for certain. Nearly every token is whole characters, for which no decoder is needed."""
        if self._partial:
            return self._decoded(spelled)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return self._decoded(spelled)

    def _decoded(self, spelled: bytes) -> str:
        text = self._utf8.decode(spelled)
        self._partial = bool(self._utf8.getstate()[0])
        return text

    def _emit(self, text: str) -> str:
        self._length += len(text)
        certain, self._stop = self._stops.push(text, early=len(self.offsets) <= self._min_tokens)
        return certain

    def _delta(self, text: str) -> TextDelta:
        return TextDelta(text, len(self.offsets), self._stop is not None, self._stop)

    def _bytes(self, token_id: int) -> bytes:
        skipped = self._skip_special_tokens and token_id not in self._kept
        spelled = self._tokenizer.piece(token_id, self._previous, skipped)
        if spelled is None:
            return b""
        self._previous = token_id
        return spelled

    def _continue(self, prompt_ids: Sequence[int]) -> None:
        """Stand where the prompt ends: after its last token, within its last character if that is incomplete."""
        tail: list[bytes] = []
        for token_id in reversed(prompt_ids):
            spelled = self._tokenizer.piece(token_id, token_id, self._skip_special_tokens)
            if spelled is not None:
                self._previous = token_id if self._previous is None else self._previous
                tail.append(spelled)
                if sum(map(len, tail)) >= 4:  # no character has more bytes
                    break
        self._decoded(b"".join(reversed(tail)))


def _from_file(path: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> Any:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise ModelError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    there = backend.get_vocab(with_added_tokens=True)
    added = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda entry: int(entry[0]))
    backend.add_tokens([tokenizers.AddedToken(**token) for _, token in added if token["content"] not in there])
    # a token named as special is special, unless it is there as an added token, which says itself what it is
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [name for name in dict.fromkeys(named.values()) if name not in known]
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in missing])
    return backend


def _converted(folder: Path) -> Any:
    """A tokenizer in an older format (vocab.json and merges.txt, SentencePiece), converted by transformers."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder, so no tokenizer can be read from it.")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer
    except (ImportError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
        if reason.endswith(":"):  # transformers goes on with a list of all that it can read
            reason = "none of the known files is there."
        raise ModelError(
            f"{folder} has no tokenizer.json, and its tokenizer cannot be converted: {reason} "
            "Give the folder of a complete model, save a tokenizer.json there, or name another tokenizer: serve and "
            "generate have --tokenizer."
        ) from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: all keys that end in _token, and the extra ones."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or {}
    entries = {key: value for key, value in config.items() if key.endswith("_token")}
    entries |= extra if isinstance(extra, dict) else {f"extra_{i}_token": token for i, token in enumerate(extra)}
    found = {key: value.get("content") if isinstance(value, dict) else value for key, value in entries.items()}
    return {key: text for key, text in found.items() if isinstance(text, str)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return content


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The {param} has a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), "
            "which is no character; send valid Unicode.",
            param=param,
        ) from error
