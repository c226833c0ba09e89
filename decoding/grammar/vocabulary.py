"""A model's tokens as the grammar library sees them."""

from __future__ import annotations

from functools import cached_property

from decoding.text import Tokenizer

APART = "\x02"  # stands before a text that is tokenized as if in the middle of one


class Vocabulary:
    """Bytes of every token, and how text is tokenized: the interface that ``llguidance.LLTokenizer`` reads.

    The bytes are those that the detokenizer gives out, so what a grammar allows is what the client reads. Ids that end
    a text are no text, whatever their bytes say, nor are special tokens.

    Args:
        size: ids that can be drawn.
        eos_ids: ids that end a text.
    """

    is_tokenizer_wrapper = True
    # The library's own end gets the id behind the last one: a bit of every mask that says whether the text may end.
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.size = size
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted({token for token in (*tokenizer.special_ids, *eos_ids) if token < size})
        self._apart = tokenizer.encode_many([APART])[0]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text in the middle of another one: the model's own way to spell what is forced."""
        [ids] = self._tokenizer.encode_many([APART + text])
        count = len(self._apart)
        if ids[:count] == self._apart and self._spell(ids[count:], text.encode()):
            return ids[count:]
        return self._greedy(text.encode())

    def _spell(self, ids: list[int], wanted: bytes) -> bool:
        """Whether these ids can all be drawn and are exactly this text: a normalizer may have changed it."""
        return max(ids, default=0) < self.size and b"".join(self.tokens[token] for token in ids) == wanted

    def _greedy(self, text: bytes) -> list[int]:
        """The longest token first, as far as there are any."""
        ids, at = [], 0
        while at < len(text):
            longest = min(self._longest, len(text) - at)
            spelled = next((text[at : at + n] for n in range(longest, 0, -1) if text[at : at + n] in self._id_of), b"")
            if not spelled:
                break
            ids.append(self._id_of[spelled])
            at += len(spelled)
        return ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {spelled: token for token, spelled in enumerate(self.tokens) if spelled and token not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._id_of), default=0)
