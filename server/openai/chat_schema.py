"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from decoding.errors import RequestError
from decoding.request import MAX_LOGPROBS
from server.openai.fields import Integer, SamplingFields
from server.openai.messages import Message
from server.openai.tools.fields import ToolChoice, Tools, check_tools
from server.openai.tools.plan import ToolPlan, plan_tools
from server.openai.tools.table import ToolFormat

MAX_MESSAGES = 4096


class ChatFields(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        for place, message in enumerate(self.messages):
            message.check(f"messages.{place}")
        check_tools(self.tools, self.tool_choice)
        if self.top_logprobs is None:
            return
        if not self.logprobs:
            raise RequestError("top_logprobs can only be given with logprobs: true.", param="top_logprobs")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"top_logprobs must be in [0, {MAX_LOGPROBS}], not {self.top_logprobs}.", param="top_logprobs"
            )

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
