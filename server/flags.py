"""The command line's flags, with vLLM's names. A flag that is not given is not in the result: defaults live
elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from decoding.config import Dtype, EngineConfig
from decoding.errors import nearest

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and answers a wrong word with the nearest right one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)

    def refuse(self, extra: Sequence[str]) -> NoReturn:
        """End with an error about arguments that no flag has taken."""
        wrong = next((word for word in extra if word.startswith("-")), extra[0])
        flags = sorted(flag for flag in self._option_string_actions if flag.startswith("--"))
        self.error(f"unknown argument {wrong}: {nearest(wrong.partition('=')[0], flags)}")


def size(text: str) -> int:
    """Bytes from "2GiB", "512M" or "1000000"; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 2GiB, 512M or 1000000")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of EngineConfig."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model, or a hub id such as org/name")
    add(
        "--speculate",
        action="append",
        metavar="DRAFTER",
        help="a drafter: ngram, or draft=PATH; with options after a colon. Give it several times for several drafters",
    )
    add("--tokenizer", metavar="PATH", help="folder of another tokenizer than the model's")
    add("--chat-template", metavar="TEMPLATE", help="a jinja file, or a template itself, in place of the model's")
    add("--generation-config", metavar="WHICH", help="auto: the model's defaults of sampling; vllm: neutral ones")
    add("--dtype", choices=get_args(Dtype), help="type of the weights (default: the checkpoint's)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or auto (default)")
    add("--seed", type=int, metavar="SEED", help="seed of requests that bring none (default: a random one each)")
    add("--max-model-len", type=positive, metavar="TOKENS", help="longest context (default: the model's)")
    add("--max-num-seqs", type=positive, metavar="N", help="choices in one batch")
    add("--max-num-batched-tokens", type=positive, metavar="TOKENS", help="tokens of one step, tree nodes included")
    add("--max-nodes", type=whole, metavar="NODES", help="drafted nodes of one row in a step, at most 63")
    add("--max-depth", type=whole, metavar="DEPTH", help="depth of a tree")
    add("--kv-cache-memory", type=size, metavar="SIZE", help="memory of the K/V pool, such as 2GiB or 512M")
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help="of the GPU's memory, weights included")
    add("--num-pages", type=positive, metavar="PAGES", help="pages of the K/V pool, in place of a size")
    add(
        "--no-prefix-caching",
        "--no-enable-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="do not keep pages for later requests with the same beginning",
    )
    add("--attention", metavar="BACKEND", help="attention backend (default: auto)")
    add("--threads", type=positive, metavar="N", help="CPU threads of the engine process (default: all cores but one)")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's settings out of the flags that were given."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given["speculate"] = tuple(given.get("speculate", ()))
    return EngineConfig(**given)
