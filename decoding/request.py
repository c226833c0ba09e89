"""What a client may ask of the engine: sampling, speculation, and the checks that all paths into it share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from decoding.acceptance import Acceptance
from decoding.errors import RequestError

MAX_LOGPROBS = 20
MAX_WORDS = 128  # bad_words: they are looked for at every node of every row
MAX_WORD_TOKENS = 16
GREEDY_TEMPERATURE = 1e-5  # below it the draw is the argmax
MAX_GRAMMAR_BYTES = 256 * 1024

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True)
class Range:
    """The values that a number may have."""

    low: float
    high: float
    open_low: bool = False  # without the lowest

    def check(self, name: str, value: float) -> None:
        """Refuse a number that is outside.

        Raises:
            RequestError: naming the field.
        """
        _within(name, value, self.low, self.high, open_low=self.open_low)


# by the names of SamplingParams, which are those of request fields
RANGES = {
    "temperature": Range(0.0, 100.0),
    "top_p": Range(0.0, 1.0, open_low=True),
    "min_p": Range(0.0, 1.0),
    "repetition_penalty": Range(0.0, 100.0, open_low=True),
    "presence_penalty": Range(-2.0, 2.0),
    "frequency_penalty": Range(-2.0, 2.0),
    "top_k": Range(-1, 2**31),
    "n": Range(1, 128),
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Defaults are neutral; names and meanings are vLLM's and OpenAI's."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    presence_penalty: float = 0.0  # over the output, as in OpenAI's API
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0  # no end-of-sequence, no stop token and no stop string before that many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # nothing else is drawn; (): everything may be
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output must not have
    seed: int | None = None  # None: the engine draws one and reports it
    n: int = 1
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: of the k best besides
    prompt_logprobs: int | None = None

    def validate(self, vocab_size: int) -> None:
        """Check every range.

        Raises:
            RequestError: naming the field at fault.
        """
        for name, span in RANGES.items():
            span.check(name, getattr(self, name))
        _within("max_tokens", self.max_tokens, 1, 2**31)
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}."
            raise RequestError(message, param="min_tokens")
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**64 - 1)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _within(name, value, 0, MAX_LOGPROBS)
        for token, bias in self.logit_bias.items():
            _token_id("logit_bias", token, vocab_size)
            _within("logit_bias", bias, -100.0, 100.0)
        check_token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        check_token_ids("allowed_token_ids", self.allowed_token_ids, vocab_size)
        self._validate_words(vocab_size)

    def check_something_is_left(self, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        """Check that bans can never forbid every token, whatever the text.

        Raises:
            RequestError: they could.
        """
        if not self.allowed_token_ids and not self.bad_words:
            return
        banned = {word[-1] for word in self.bad_words}
        if self.min_tokens:
            banned.update(eos_ids, self.stop_token_ids)
        left = len(set(self.allowed_token_ids) - banned) if self.allowed_token_ids else vocab_size - len(banned)
        if left <= 0:
            raise RequestError(
                "bad_words and min_tokens forbid every token that may be drawn; allow more tokens, or forbid fewer.",
                param="allowed_token_ids" if self.allowed_token_ids else "bad_words",
            )

    def _validate_words(self, vocab_size: int) -> None:
        if len(self.bad_words) > MAX_WORDS:
            message = f"bad_words can have at most {MAX_WORDS} token sequences, not {len(self.bad_words)}."
            raise RequestError(message, param="bad_words")
        for word in self.bad_words:
            if not 1 <= len(word) <= MAX_WORD_TOKENS:
                message = f"a bad word must have 1 to {MAX_WORD_TOKENS} tokens, not {len(word)}."
                raise RequestError(message, param="bad_words")
            check_token_ids("bad_words", word, vocab_size)


@dataclass(frozen=True)
class SpeculationParams:
    """A client's limits on speculation; ``None`` leaves the server's setting."""

    enabled: bool = True
    drafters: tuple[str, ...] | None = None  # a subset of the server's drafters
    max_nodes: int | None = None  # drafted nodes a step, without the root
    max_depth: int | None = None
    acceptance: Acceptance | None = None  # the rule that judges drafts
    coupling: bool | None = None  # draft with the target's noise; None: under the exact rule
    trace: bool = False  # tell of every step what was drafted and what came of it

    def validate(self, served: tuple[str, ...]) -> None:
        """Check ranges and names.

        Raises:
            RequestError: naming the field at fault.
        """
        for name in self.drafters or ():
            if name not in served:
                there = ", ".join(served) if served else "none"
                raise RequestError(
                    f"no drafter called {name!r} runs on this server; there are: {there}.",
                    param="speculation.drafters",
                )
        if self.max_nodes is not None:
            _within("speculation.max_nodes", self.max_nodes, 0, 63)
        if self.max_depth is not None:
            _within("speculation.max_depth", self.max_depth, 0, 63)
        if self.acceptance is not None:
            self.acceptance.validate()


@dataclass(frozen=True)
class Grammar:
    """What a text must be, from its first token to its last; see docs/structured-output.md.

    ``source`` by kind: nothing for json_object; the schema as JSON text for json_schema; a regular expression that the
    whole text matches; a JSON array of strings for choice; a grammar in GBNF or in llguidance's variant of Lark.
    """

    kind: GrammarKind
    source: str = ""

    def validate(self) -> None:
        """Check what can be checked without compiling it.

        Raises:
            RequestError: with code ``invalid_grammar``, or ``grammar_too_complex`` for one that is too long.
        """
        if self.kind not in get_args(GrammarKind):
            kinds = ", ".join(get_args(GrammarKind))
            raise RequestError(f"there is no grammar of that kind; there are: {kinds}.", param="grammar")
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError as error:
            message = "The grammar has a lone surrogate, which is no character; send valid Unicode."
            raise RequestError(message, param="grammar", code="invalid_grammar") from error
        if size > MAX_GRAMMAR_BYTES:
            message = f"The grammar has {size} bytes; {MAX_GRAMMAR_BYTES} are the most. Shorten it."
            raise RequestError(message, param="grammar", code="grammar_too_complex")
        if "\0" in self.source:
            message = "The grammar has a NUL character; leave it out, or write it as an escape."
            raise RequestError(message, param="grammar", code="invalid_grammar")


@dataclass(frozen=True)
class Reasoning:
    """What a model may think before it says what a grammar asks for: text between two tokens, which the grammar leaves
    free."""

    close: int  # the token that ends it; the grammar begins behind it
    open: int | None = None  # the token that begins it, if that is the text's first; None: the text begins inside


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt and what to do with it: ``params.n`` continuations (choices) of it."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    speculation: SpeculationParams = SpeculationParams()
    cache_salt: str = ""  # prompts share cached pages only within one salt
    prediction_ids: tuple[int, ...] = ()  # what the client expects to come, for the drafter that follows it
    grammar: Grammar | None = None  # what the text must be; None: anything
    reasoning: Reasoning | None = None  # what may come before the grammar's text; None: nothing

    def validate(self, vocab_size: int, max_model_len: int, drafters: tuple[str, ...]) -> None:
        """Check the whole request against the served model.

        Raises:
            RequestError: naming the field at fault.
        """
        if not self.prompt_ids:
            raise RequestError("The prompt is empty; it must have at least one token.", param="prompt")
        check_token_ids("prompt", self.prompt_ids, vocab_size)
        check_token_ids("prediction", self.prediction_ids, vocab_size)
        self.params.validate(vocab_size)
        self.speculation.validate(drafters)
        if self.grammar is not None:
            self.grammar.validate()
        if self.reasoning is not None:
            tags = self.reasoning.close, self.reasoning.open
            check_token_ids("reasoning", [tag for tag in tags if tag is not None], vocab_size)
        asked = len(self.prompt_ids) + self.params.max_tokens
        if asked > max_model_len:
            # clients know the case by this text, LangChain by the code in it
            raise RequestError(
                f"This model's maximum context length is {max_model_len} tokens. However, you requested {asked} tokens "
                f"({len(self.prompt_ids)} in the prompt, {self.params.max_tokens} in the completion). "
                "Shorten the prompt or lower max_tokens. (context_length_exceeded)",
                param="prompt",
                code="context_length_exceeded",
            )


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if open_low else "["
        low_shown, high_shown = (f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in (low, high))
        raise RequestError(f"{name} must be in {bracket}{low_shown}, {high_shown}], not {value}.", param=name)


def check_token_ids(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Check that a field has the model's ids only.

    Raises:
        RequestError: naming the field and the first other one.
    """
    for token in tokens:
        _token_id(name, token, vocab_size)


def _token_id(name: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise RequestError(
            f"{name} has token id {token}; this model's ids are 0 to {vocab_size - 1}.",
            param=name,
            code="invalid_value",
        )
