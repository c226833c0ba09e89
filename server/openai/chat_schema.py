"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from decoding.errors import RequestError
from decoding.text import Tokenizer
from server.openai.fields import Fields, Integer, SamplingFields, check_count
from server.openai.messages import Message
from server.openai.structured import StructuredFields
from server.openai.template_kwargs import Effort, TemplateKwargs, template_variables
from server.openai.tools.fields import ToolChoice, Tools, check_choice, check_tools
from server.openai.tools.plan import ToolPlan, plan_tools
from server.openai.tools.table import ToolFormat

MAX_MESSAGES = 4096


class ConversationFields(Fields):
    """What becomes a prompt through the chat template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Tools | None = None
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
        for place, message in enumerate(self.messages):
            message.check(f"messages.{place}")
        check_tools(self.tools)
        if self.continue_final_message and self.add_generation_prompt:
            why = "continue_final_message and add_generation_prompt cannot both be true."
            raise RequestError(why, param="continue_final_message")

    def rendered(
        self, tokenizer: Tokenizer, shown: list[dict[str, Any]] | None, template_id: Callable[[str], str]
    ) -> str:
        """The prompt's text.

        Args:
            shown: the tools that the model is to know.
            template_id: makes a call's id one that the template takes.

        Raises:
            RequestError: there is no template, or it cannot render this.
        """
        return tokenizer.render_chat(
            [message.for_template(template_id) for message in self.messages],
            add_generation_prompt=self.add_generation_prompt is not False and not self.continue_final_message,
            continue_final_message=bool(self.continue_final_message),
            tools=shown,
            **template_variables(self.chat_template_kwargs, self.reasoning_effort, tokenizer.chat_variables),
        )

    def tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Its tokens; special ones are those that the template wrote, unless more are asked for."""
        return tokenizer.encode(text, add_special_tokens=bool(self.add_special_tokens))


class ChatFields(StructuredFields, SamplingFields, ConversationFields):
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        self.check_conversation()
        check_choice(self.tools, self.tool_choice)
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

    def tool_plan(self, tool_format: ToolFormat | None, *, shows_tools: bool) -> ToolPlan:
        """How the tools are used; see ``plan_tools``."""
        return plan_tools(
            self.tools,
            self.tool_choice,
            tool_format,
            parallel=self.parallel_tool_calls is not False,
            template_shows_tools=shows_tools,
        )
