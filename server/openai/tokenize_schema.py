"""The bodies of POST /tokenize and POST /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from decoding.errors import RequestError
from decoding.text import Tokenizer
from server.openai.chat_schema import ConversationFields
from server.openai.fields import Fields, Integer, Name
from server.openai.tools.fields import shown_tools

MAX_TOKENS = 2**20


class TokenizeFields(Fields):
    """A text."""

    model: Name | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def text(self, tokenizer: Tokenizer, template_id: Callable[[str], str]) -> str:
        """What is tokenized."""
        return self.prompt

    def tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Its tokens, with those that the tokenizer puts around a text unless they are not wanted."""
        return tokenizer.encode(text, add_special_tokens=self.add_special_tokens is not False)


class TokenizeChatFields(ConversationFields):
    """A conversation: what /v1/chat/completions makes a prompt of."""

    model: Name | None = None
    return_token_strs: bool | None = None

    def text(self, tokenizer: Tokenizer, template_id: Callable[[str], str]) -> str:
        """What is tokenized.

        Raises:
            RequestError: there is no template, or it cannot render this.
        """
        self.check_conversation()
        if self.tools and "tools" not in tokenizer.chat_variables:
            message = "This model's chat template has no place for tools; leave them out."
            raise RequestError(message, param="tools", code="unsupported_parameter")
        return self.rendered(tokenizer, shown_tools(self.tools), template_id)


class DetokenizeFields(Fields):
    """Tokens."""

    model: Name | None = None
    tokens: Annotated[list[Integer], Field(max_length=MAX_TOKENS)]
