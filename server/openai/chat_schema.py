"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from decoding.errors import RequestError
from decoding.text import Tokenizer
from server.openai.fields import MAX_TEXT_PARTS, Fields, Integer, Name, SamplingFields, TextPart, as_parts, check_count
from server.openai.template_kwargs import Effort, TemplateKwargs, template_variables

MAX_MESSAGES = 4096


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_TEXT_PARTS)]


class Message(Fields):
    """One message. Its text may come as a string or in text parts."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(as_parts, json_schema_input_type=str | Parts)]
    name: Name | None = None
    refusal: None = None
    audio: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it; "developer" is OpenAI's newer word for "system"."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "\n".join(part.text for part in self.content)}
        return message if self.name is None else {**message, "name": self.name}


class ConversationFields(Fields):
    """What becomes a prompt through the chat template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Effort | None = None

    def check_conversation(self) -> None:
        """Check what no single field shows.

        Raises:
            RequestError: fields that do not go together.
        """
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt cannot both be true."
            raise RequestError(message, param="continue_final_message")

    def rendered(self, tokenizer: Tokenizer) -> str:
        """The prompt's text.

        Raises:
            RequestError: there is no template, or it cannot render this.
        """
        return tokenizer.render_chat(
            [message.for_template() for message in self.messages],
            add_generation_prompt=self.add_generation_prompt is not False and not self.continue_final_message,
            continue_final_message=bool(self.continue_final_message),
            **template_variables(self.chat_template_kwargs, self.reasoning_effort, tokenizer.chat_variables),
        )

    def tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Its tokens; special ones are those that the template wrote, unless more are asked for."""
        return tokenizer.encode(text, add_special_tokens=bool(self.add_special_tokens))


class ChatFields(SamplingFields, ConversationFields):
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        self.check_conversation()
        if self.top_logprobs is None:
            return
        if not self.logprobs:
            raise RequestError("top_logprobs can only be given with logprobs: true.", param="top_logprobs")
        check_count("top_logprobs", self.top_logprobs)

    @property
    def scored(self) -> int | None:
        """How many alternatives are to be scored at each token; None: nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit_field(self) -> str:
        """The name that the client used for max_tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def token_limit(self, room: int) -> int:
        """max_tokens, by its new or its old name; by default what the context still holds."""
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(room, 1) if given is None else given
