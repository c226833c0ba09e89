"""The tool formats, by vLLM's names: one file and one line each."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from decoding.errors import ConfigError, nearest
from decoding.request import Grammar
from server.openai.tools import either, hermes, llama3_json, mistral, qwen3_coder
from server.openai.tools.base import Offer, ToolParser
from server.openai.tools.either import Functions


def new_call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def _same_id(call_id: str) -> str:
    return call_id


class Either(Protocol):
    """See ``server.openai.tools.either``."""

    def __call__(self, answer: Grammar, functions: Functions, *, parallel: bool) -> Grammar | None: ...


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls.

    Attributes:
        signs: what a chat template of the family has in it, any of them.
        foreign: what it cannot have, being of another family.
        markers: texts that are special tokens in some tokenizers, and must reach the parser all the same.
        new_id: makes a call's id.
        template_id: makes a client's id one that the template takes.
        either: a grammar of outputs that are an answer of a form or calls, if there can be one.
        spelled: markers that ``either`` writes, which cannot be special tokens: no text spells those.
    """

    parser: Callable[[Offer], ToolParser]
    signs: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    new_id: Callable[[], str] = new_call_id
    template_id: Callable[[str], str] = _same_id
    either: Either | None = None
    spelled: tuple[str, ...] = ()

    def matches(self, template: str) -> bool:
        """Whether a chat template is of this family."""
        return any(sign in template for sign in self.signs) and not any(sign in template for sign in self.foreign)


TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": ToolFormat(
        hermes.HermesParser,
        (hermes.OPEN,),
        foreign=(qwen3_coder.FUNCTION, "<arg_key>", "<tool_calls>", "<invoke"),  # GLM, Apriel, MiniMax
        markers=(hermes.OPEN, hermes.CLOSE),
        either=either.tagged,
        spelled=(hermes.OPEN, hermes.CLOSE),
    ),
    "llama3_json": ToolFormat(
        llama3_json.Llama3JsonParser,
        (llama3_json.PYTHON_TAG, '"parameters": dictionary of argument name'),
        foreign=(qwen3_coder.FUNCTION,),  # Functionary
        markers=(llama3_json.PYTHON_TAG,),
        either=either.bare,
    ),
    "mistral": ToolFormat(
        mistral.MistralParser,
        (mistral.MARKER,),
        markers=(mistral.MARKER, mistral.CALL_ID, mistral.ARGS),
        new_id=mistral.new_id,
        template_id=mistral.template_id,
    ),
    "qwen3_coder": ToolFormat(
        qwen3_coder.Qwen3CoderParser,
        (qwen3_coder.FUNCTION,),
        foreign=(qwen3_coder.SEED_OPEN, llama3_json.PYTHON_TAG),
        markers=(qwen3_coder.OPEN, qwen3_coder.CLOSE),
    ),
    "seed_oss": ToolFormat(
        qwen3_coder.SeedOssParser,
        (qwen3_coder.SEED_OPEN,),
        markers=(qwen3_coder.SEED_OPEN, qwen3_coder.SEED_CLOSE),
    ),
}


def find_tool_format(name: str, template: str) -> ToolFormat | None:
    """The format of that name; "auto": the one that the chat template is written for, None if it is none of them.

    Raises:
        ConfigError: there is no format of that name.
    """
    if name == "auto":
        return next((each for each in TOOL_FORMATS.values() if each.matches(template)), None)
    if name == "none":
        return None
    if name not in TOOL_FORMATS:
        raise ConfigError(
            f"no format of tool calls is called {name!r}: {nearest(name, ['auto', 'none', *TOOL_FORMATS])}"
        )
    return TOOL_FORMATS[name]
