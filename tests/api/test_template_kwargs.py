"""What a client may tell the chat template, and whose message the answer continues."""

from __future__ import annotations

from typing import Any

import pytest

from server.openai.template_kwargs import TemplateKwargs, template_variables
from tests.api.asking import CHAT, HELLO, reached, refused
from tests.api.harness import ids

THINKING = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %} off{% endif %}"
EFFORT = "{{ messages[0].content }} {{ reasoning_effort | default('medium') }}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def kwargs(**given: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": given}


@pytest.mark.parametrize(
    ("template", "body", "prompt"),
    [
        (THINKING, {}, "import os"),
        (THINKING, kwargs(enable_thinking=False), "import os off"),
        (THINKING, kwargs(enable_thinking=True), "import os"),
        (THINKING, {"reasoning_effort": "none"}, "import os off"),
        (THINKING, {"reasoning_effort": "none", **kwargs(enable_thinking=True)}, "import os"),
        (THINKING, kwargs(thinking=False), "import os"),  # the template knows no such thing, nor does it think then
        (EFFORT, {}, "import os medium"),
        (EFFORT, {"reasoning_effort": "high"}, "import os high"),
        (EFFORT, kwargs(reasoning_effort="low"), "import os low"),
        (EFFORT, {"reasoning_effort": "low", **kwargs(reasoning_effort="low")}, "import os low"),
        (EFFORT, {"chat_template_kwargs": {}, "reasoning_effort": None}, "import os medium"),
    ],
)
def test_the_template_is_told_what_it_reads(template: str, body: dict[str, Any], prompt: str) -> None:
    assert reached(CHAT, body, template=template).prompt_ids == ids(prompt)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (kwargs(tokenize=True), "chat_template_kwargs.tokenize"),
        (kwargs(chat_template="x"), "chat_template_kwargs.chat_template"),
        (kwargs(messages=[]), "chat_template_kwargs.messages"),
        (kwargs(add_generation_prompt=False), "chat_template_kwargs.add_generation_prompt"),
        (kwargs(enable_thinking="no"), "chat_template_kwargs.enable_thinking"),
        (kwargs(enable_thinking=True), "chat_template_kwargs.enable_thinking"),
        (kwargs(date_string="x"), "chat_template_kwargs.date_string"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"reasoning_effort": "low", **kwargs(reasoning_effort="high")}, "reasoning_effort"),
    ],
)
def test_what_it_may_not_be_told_or_would_not_read(body: dict[str, Any], param: str) -> None:
    refused(CHAT, body, param)


def test_no_effort_turns_off_what_thinks() -> None:
    for switch in ("enable_thinking", "thinking"):
        assert template_variables(None, "none", frozenset({switch})) == {switch: False}
    both = frozenset({"enable_thinking", "reasoning_effort"})
    assert template_variables(None, "none", both) == {"reasoning_effort": "none"}
    assert template_variables(TemplateKwargs(thinking_budget=5), None, frozenset({"thinking_budget"})) == {
        "thinking_budget": 5
    }


TURNS = [*HELLO, {"role": "assistant", "content": " def f(:  "}]


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({}, "<|im_start|>user\nimport os<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|im_start|>user\nimport os<|im_end|>\n"),
        ({"messages": TURNS, "continue_final_message": True}, None),
        ({"messages": TURNS, "continue_final_message": True, "add_generation_prompt": False}, None),
    ],
)
def test_the_answer_begins_anew_or_goes_on(body: dict[str, Any], prompt: str | None) -> None:
    """What the client wrote is continued where it ends, its last spaces included."""
    expected = prompt or "<|im_start|>user\nimport os<|im_end|>\n<|im_start|>assistant\ndef f(:  "
    assert reached(CHAT, body, template=CHATML).prompt_ids == ids(expected)


def test_a_message_cannot_be_continued_and_answered() -> None:
    both = {"messages": TURNS, "continue_final_message": True, "add_generation_prompt": True}
    refused(CHAT, both, "continue_final_message", "cannot both")


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "{{ messages[-1].content }}{{ messages[-1].content }}"]
)
def test_a_template_that_does_not_end_in_the_message_cannot_continue_it(template: str) -> None:
    refused(CHAT, {"messages": TURNS, "continue_final_message": True}, "continue_final_message", template=template)


def test_special_tokens_are_the_template_s_unless_asked_for() -> None:
    plain = reached(CHAT, {}, template=CHATML).prompt_ids
    assert reached(CHAT, {"add_special_tokens": True}, template=CHATML).prompt_ids == plain, "the demo's has none"
