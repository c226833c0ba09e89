"""What a client may tell the model's chat template.

An allow-list: a renderer's keyword arguments reach more than the template (CVE-2025-62426), and a template's own names,
``messages`` say, are the server's. What the template does not read is refused, since it would be dropped silently,
unless it asks for what happens anyway.
"""

from __future__ import annotations

from typing import Any, Literal

from decoding.errors import RequestError
from server.openai.fields import Fields, Integer, Name

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
NO_EFFORT = "none"
SWITCHES = ("enable_thinking", "thinking")  # variables that turn reasoning on and off
NEUTRAL = (False, NO_EFFORT)  # to a template that does not know them


class TemplateKwargs(Fields):
    """Variables of the templates of well-known models."""

    enable_thinking: bool | None = None  # Qwen3, GLM, Nemotron
    thinking: bool | None = None  # DeepSeek, Granite, Kimi
    reasoning_effort: Effort | None = None  # gpt-oss, Mistral
    thinking_budget: Integer | None = None  # Seed-OSS
    clear_thinking: bool | None = None  # GLM
    preserve_thinking: bool | None = None  # Qwen
    tools_in_user_message: bool | None = None  # Llama 3
    date_string: Name | None = None  # Llama 3: today, which the prompt tells


def template_variables(kwargs: TemplateKwargs | None, effort: Effort | None, known: frozenset[str]) -> dict[str, Any]:
    """What the template is told.

    Args:
        effort: OpenAI's ``reasoning_effort``.
        known: the names that the template reads.

    Raises:
        RequestError: it does not read one of them, or ``reasoning_effort`` is given twice and differs.
    """
    given = {} if kwargs is None else kwargs.model_dump(exclude_none=True)
    if effort is not None and given.setdefault("reasoning_effort", effort) != effort:
        message = "reasoning_effort and chat_template_kwargs.reasoning_effort differ; give one of them."
        raise RequestError(message, param="reasoning_effort")
    if given.get("reasoning_effort") == NO_EFFORT and "reasoning_effort" not in known:
        for switch in SWITCHES:
            if switch in known:
                given.setdefault(switch, False)
    for name, value in given.items():
        if name not in known and value not in NEUTRAL:
            param = name if name == "reasoning_effort" and effort is not None else f"chat_template_kwargs.{name}"
            message = f"The model's chat template does not read {name}, so it would have no effect; leave {param} out."
            raise RequestError(message, param=param, code="unsupported_parameter")
    return {name: value for name, value in given.items() if name in known}
