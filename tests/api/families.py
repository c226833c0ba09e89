"""Chat templates in the manner of families of models that call tools, and a tokenizer that has their special tokens."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from starlette.testclient import TestClient

from decoding.text import Tokenizer
from server.app import build_app
from server.fake_client import FakeEngineClient, Script
from server.settings import ServerSettings
from tests.api.harness import DEMO, INFO, SETTINGS

HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% if tools %}<|python_tag|> or a function call as JSON: "
    "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}{% for m in messages %}"
    "<|{{ 'ipython' if m.role == 'tool' else m.role }}|>"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS]"
    "{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids must have 9 characters') }}{% endif %}"
    "{{ c.function | tojson }}{{ c.id }}{% endfor %}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}{{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
THINKING = HERMES.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def special_tokenizer(folder: Path, template: str, *special: str) -> Tokenizer:
    """The demo's tokenizer with further special tokens."""
    shutil.copy(DEMO / "tokenizer.json", folder)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config |= {"chat_template": template, "additional_special_tokens": list(special)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@contextlib.contextmanager
def serving(script: Script, tokenizer: Tokenizer, settings: ServerSettings = SETTINGS) -> Iterator[TestClient]:
    """A client of the application with another tokenizer."""
    client = FakeEngineClient(replace(INFO, vocab_size=tokenizer.vocab_size), script)
    yield TestClient(build_app(client, tokenizer, settings), raise_server_exceptions=False)
