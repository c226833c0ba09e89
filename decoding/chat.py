"""Chat templates: finding them in a model folder, and rendering messages as transformers does."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from decoding.errors import ModelError, RequestError

_OPEN_END = "\ue000the text goes on here\ue000"  # of private use: no template says it


class ChatTemplate:
    """A model's chat template; some models have a second one, "tool_use", for conversations with tools.

    Args:
        sources: jinja templates by name; "default" is the one to use.
        special_tokens: what templates may name, as ``{"bos_token": "<s>", ...}``.

    Attributes:
        source: all templates, one after the other.
        variables: names that the templates read, and take from whoever renders them.

    Raises:
        ModelError: when a template does not compile.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates = {name: _compile(environment, name, source) for name, source in sources.items()}
        read = [meta.find_undeclared_variables(environment.parse(source)) for source in sources.values()]
        self.variables: frozenset[str] = frozenset().union(*read)
        self.source = "\n".join(sources.values())

    def __bool__(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. ``tools``, ``documents`` and further ``variables`` are the template's.

        Args:
            continue_final_message: the text ends where the last message's content does, so that what is generated
                continues it.

        Raises:
            RequestError: when the model has no template, or the template refuses the messages.
        """
        # templates test `tools is not none`: both must be defined
        given: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **variables}
        template = self._choose(tools=given["tools"])
        # many templates print the word None for a key that is there and null
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            present = _open_ended(present)
        try:
            text = template.render(messages=present, add_generation_prompt=add_generation_prompt, **given)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise RequestError(
                f"The model's chat template cannot render these messages: {error}", param="messages"
            ) from error
        return _cut_at_open_end(text) if continue_final_message else text

    def _choose(self, *, tools: object) -> jinja2.Template:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if not self._templates:
            raise RequestError(
                "This model has no chat template; use /v1/completions, or start the server with --chat-template.",
                param="messages",
            )
        raise RequestError(
            f"This model has chat templates for {', '.join(self._templates)} but none by default; "
            "start the server with --chat-template.",
            param="messages",
        )


def _open_ended(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a mark where the last one's content ends: templates may trim it, and always add something."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise RequestError(
            "continue_final_message continues the text of the last message, and that has none.",
            param="continue_final_message",
        )
    return [*messages[:-1], {**messages[-1], "content": content + _OPEN_END}]


def _cut_at_open_end(text: str) -> str:
    before, mark, _ = text.rpartition(_OPEN_END)
    if not mark or _OPEN_END in before:
        raise RequestError(
            "The model's chat template does not show the last message as it is, so it cannot be continued.",
            param="continue_final_message",
        )
    return before


def find_templates(folder: Path, config: Mapping[str, Any], chosen: str | None) -> dict[str, str]:
    """Template sources by name: ``chosen`` if given, else those of the folder (.jinja before .json before the config).

    Args:
        config: the content of tokenizer_config.json.
        chosen: the path of a jinja file, a template itself, or the name of one of the model's templates.

    Raises:
        ModelError: when ``chosen`` is none of the three.
    """
    own = _own_templates(folder, config)
    if chosen is None:
        return own
    if os.path.isfile(chosen):  # Path.is_file raises for a name too long to be one, as a template is
        return {"default": Path(chosen).read_text(encoding="utf-8")}
    if "{" in chosen:
        return {"default": chosen}
    if chosen in own:
        return {"default": own[chosen]}
    raise ModelError(f"--chat-template {chosen!r} is neither a file, nor a jinja template, nor one of the model's.")


def _own_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    entry = config.get("chat_template")
    if isinstance(entry, str):
        found["default"] = entry
    elif entry is not None:  # a list of named ones
        found.update({named["name"]: named["template"] for named in entry})
    as_json = folder / "chat_template.json"
    if as_json.is_file():
        found["default"] = json.loads(as_json.read_text(encoding="utf-8"))["chat_template"]
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    as_jinja = folder / "chat_template.jinja"
    if as_jinja.is_file():
        found["default"] = as_jinja.read_text(encoding="utf-8")
    return found


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; to a server it means its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates of the transformers library rely on; sandboxed, because templates come with checkpoints."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"The chat template {name!r} does not compile: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
