"""Filling in text between a prompt and a suffix: the forms in which models were trained to do it, and which one a
tokenizer has the tokens of. Public tokenizers tell nothing else about it.

Sources: Efficient Training of Language Models to Fill in the Middle (arXiv 2207.14255); the families' model cards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from decoding.text import Tokenizer

Part = Literal["prefix", "suffix"]


@dataclass(frozen=True)
class FimForm:
    """What stands before, between and after the two texts.

    Attributes:
        parts: tokens, by their spelling in the vocabulary, and the places of the texts.
        ends: tokens that end the text between, beside the model's own; those that the vocabulary has count.
    """

    parts: tuple[str, ...]
    ends: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """Those that the vocabulary must have."""
        return tuple(part for part in self.parts if part not in ("prefix", "suffix"))


# the first whose tokens are all there is taken
FORMS: dict[str, FimForm] = {
    "qwen": FimForm(
        ("<|fim_prefix|>", "prefix", "<|fim_suffix|>", "suffix", "<|fim_middle|>"),
        ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    "starcoder": FimForm(
        ("<fim_prefix>", "prefix", "<fim_suffix>", "suffix", "<fim_middle>"),
        ("<fim_pad>", "<file_sep>", "<repo_name>"),
    ),
    "santacoder": FimForm(("<fim-prefix>", "prefix", "<fim-suffix>", "suffix", "<fim-middle>"), ("<fim-pad>",)),
    "deepseek": FimForm(("<｜fim▁begin｜>", "prefix", "<｜fim▁hole｜>", "suffix", "<｜fim▁end｜>")),
    "codellama": FimForm(("▁<PRE>", "prefix", "▁<SUF>", "suffix", "▁<MID>"), ("▁<EOT>",)),
    "codestral": FimForm(("[SUFFIX]", "suffix", "[PREFIX]", "prefix")),
}


@dataclass(frozen=True)
class Infill:
    """The form of one tokenizer."""

    form: FimForm
    ids: Mapping[str, int]  # of the form's tokens
    ends: tuple[int, ...]  # ids that end the text between: no text of a middle has the form's own tokens

    @classmethod
    def of(cls, tokenizer: Tokenizer, forms: Iterable[FimForm] = tuple(FORMS.values())) -> Infill | None:
        """The tokenizer's form; None if it has the tokens of none."""
        vocab = tokenizer.vocab()
        for form in forms:
            if all(token in vocab for token in form.tokens):
                ids = {token: vocab[token] for token in form.tokens}
                others = [vocab[token] for token in form.ends if token in vocab]
                return cls(form, ids, (*ids.values(), *others))
        return None

    def prompt(self, tokenizer: Tokenizer, prefix: str | Sequence[int], suffix: str, bos: bool) -> tuple[int, ...]:
        """The tokens after which the model says what stands between the two.

        Args:
            prefix: text or tokens.
            bos: begin with the beginning-of-sequence token, if the tokenizer begins texts with it.

        Raises:
            RequestError: a text that is not valid Unicode.
        """
        ids = [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id] if bos else []
        for part in self.form.parts:
            if part == "prefix":
                ids += tokenizer.encode(prefix, add_special_tokens=False) if isinstance(prefix, str) else prefix
            elif part == "suffix":
                ids += _inner(tokenizer, suffix)
            else:
                ids.append(self.ids[part])
        return tuple(ids)


def _inner(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of text that something stands before: some tokenizers put a space before every text."""
    begins = tokenizer.encode("a", add_special_tokens=False)
    plain = tokenizer.encode(text, add_special_tokens=False)
    if not begins or not tokenizer.token_bytes(begins[0]).startswith(b" "):
        return plain
    before = tokenizer.encode("\n", add_special_tokens=False)  # these tokenizers join nothing to it
    after = tokenizer.encode(f"\n{text}", add_special_tokens=False)
    return after[len(before) :] if after[: len(before)] == before else plain
