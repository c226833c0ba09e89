"""Flags of ``saccade serve`` about what is read out of outputs, with vLLM's names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from decoding.errors import ConfigError

_NAMES = ("tool_call_parser", "reasoning_parser", "enable_auto_tool_choice")


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """The format of tool calls and of reasoning."""
    add = parser.add_argument_group("tools and reasoning").add_argument
    add(
        "--tool-call-parser",
        type=_tool_format,
        metavar="NAME",
        help="how the model writes tool calls: hermes, llama3_json, mistral, qwen3_coder, seed_oss or none (default: "
        "auto, by its chat template)",
    )
    add(
        "--enable-auto-tool-choice",
        action="store_true",
        help="do not start where requests could not leave the choice of tools to the model; where they can, they "
        "always can",
    )
    add(
        "--reasoning-parser",
        type=_reasoning_format,
        metavar="NAME",
        help="how it marks its reasoning: deepseek_r1, qwen3, glm45, mistral, seed_oss or none (default: auto, by "
        "its chat template)",
    )


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ServerSettings out of the flags that were given."""
    return {name: value for name, value in vars(args).items() if name in _NAMES}


def _tool_format(name: str) -> str:
    from server.openai.tools.table import find_tool_format

    return _known(name, find_tool_format)


def _reasoning_format(name: str) -> str:
    from server.openai.reasoning import find_reasoning_format

    return _known(name, find_reasoning_format)


def _known(name: str, find: Callable[[str, str], object]) -> str:
    try:
        find(name, "")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name
