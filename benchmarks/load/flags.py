"""The flags of ``saccade bench``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

from benchmarks.load.prompts import Synthetic
from benchmarks.load.settings import PATHS, Arrival, Endpoint, Extent, Goal, Sampling
from decoding.command_line import StrictParser, whole_from
from decoding.errors import nearest
from server.flags import nonempty, seed, share

DEFAULT_URL = "http://127.0.0.1:8000"
_DEFAULTS, _SYNTHETIC = Extent(), Synthetic()


def add_flags(parser: StrictParser) -> None:
    _add_servers(parser)
    _add_loads(parser)
    _add_prompts(parser)
    _add_outputs(parser)


def _add_servers(parser: StrictParser) -> None:
    add = parser.add_argument_group("servers").add_argument
    add("--base-url", default=DEFAULT_URL, metavar="URL", help="with or without /v1 (default: %(default)s)")
    add("--model", type=nonempty, help="its name there (default: the first one that the server lists)")
    add("--api-key", type=nonempty, metavar="KEY", help="default: OPENAI_API_KEY of the environment")
    add("--label", type=nonempty, metavar="NAME", help="what reports call the server")
    add("--extra-body", type=fields, default={}, metavar="JSON", help='fields of each request, such as {"top_k": 40}')
    add("--vs", metavar="URL", help="a second server: both take turns on the same prompts, and are compared")
    add("--vs-model", type=nonempty, metavar="MODEL", help="the second server's (as --model)")
    add(
        "--vs-api-key",
        type=nonempty,
        metavar="KEY",
        help="the second server's; never the first one's or the environment's",
    )
    add("--vs-label", type=nonempty, metavar="NAME", help="what reports call it")
    add("--vs-extra-body", type=fields, default={}, metavar="JSON", help="fields for it, over those of --extra-body")


def _add_loads(parser: StrictParser) -> None:
    add = parser.add_argument_group("load; several numbers are a sweep").add_argument
    many = "closed loop: requests in flight at every moment (default: 1, without --request-rate)"
    add("--concurrency", type=whole_from(1), nargs="+", default=[], metavar="N", help=many)
    rates = "open loop: requests a second, whatever becomes of them; inf: all at once"
    add("--request-rate", type=rate, nargs="+", default=[], metavar="R", help=rates)
    add("--arrival", choices=get_args(Arrival), default="poisson", help="in an open loop (default: %(default)s)")
    gamma = "shape of the gamma distribution of gaps: 1 is Poisson, less is burstier (default: 1)"
    add("--burstiness", type=above_zero, default=1.0, metavar="SHAPE", help=gamma)
    add("--burst-size", type=whole_from(1), default=8, metavar="N", help="requests of a burst (default: %(default)s)")
    add("--max-concurrency", type=whole_from(1), metavar="N", help="requests in flight in an open loop, at most")
    add("--num-prompts", type=whole_from(1), default=_DEFAULTS.requests, metavar="N", help=_of("requests of each load"))
    add("--duration", type=above_zero, metavar="SECONDS", help="of each load, in place of a number of requests")
    rounds = "pieces that each load is cut into (default: 1; 6 with --vs)"
    add("--rounds", type=whole_from(1), metavar="N", help=rounds)
    warm = _of("requests to each server before")
    add("--num-warmups", type=whole_from(1), default=_DEFAULTS.warm_ups, metavar="N", help=warm)
    add("--timeout", type=above_zero, default=_DEFAULTS.timeout, metavar="SECONDS", help=_of("for one request"))
    fresh = "a new connection for each request: for servers that close kept ones without notice"
    add("--no-keep-alive", action="store_true", help=fresh)


def _add_prompts(parser: StrictParser) -> None:
    add = parser.add_argument_group("requests").add_argument
    add("--endpoint", type=endpoint, default="completions", help=f"{' or '.join(PATHS)} (default: %(default)s)")
    file = "JSONL with prompt or messages, Spec-Bench's question.jsonl, or ShareGPT's JSON (default: synthetic prompts)"
    add("--dataset-path", type=Path, metavar="FILE", help=file)
    length = "tokens of every answer (default: what the file says, or else --random-output-len)"
    add("--output-len", type=whole_from(1), metavar="TOKENS", help=length)
    tokens = whole_from(1)
    add("--random-input-len", type=tokens, default=_SYNTHETIC.input_len, metavar="TOKENS", help=_of("of a prompt"))
    add("--random-output-len", type=tokens, default=_SYNTHETIC.output_len, metavar="TOKENS", help=_of("of an answer"))
    spread = "lengths are drawn from length * (1 ± RATIO) (default: 0)"
    add("--random-range-ratio", type=share, default=0.0, metavar="RATIO", help=spread)
    prefix = "of a beginning that all prompts share (default: 0)"
    add("--random-prefix-len", type=whole_from(0), default=0, metavar="TOKENS", help=prefix)
    add("--tokenizer", type=nonempty, metavar="MODEL", help="for exact lengths (default: a word is taken for a token)")
    ids = "send prompts as token ids of --tokenizer: for servers that would cut the same text differently"
    add("--token-ids", action="store_true", help=ids)
    heat = Sampling().temperature
    add("--temperature", type=not_negative, default=heat, metavar="T", help=f"of all requests (default: {heat:g})")
    add("--seed", type=seed, default=0, help="of prompts, arrivals and requests (default: 0)")
    add("--ignore-eos", action="store_true", help="answers of exactly the tokens asked for; servers of vLLM's fields")


def _add_outputs(parser: StrictParser) -> None:
    add = parser.add_argument_group("results").add_argument
    targets = "targets in ms, such as ttft:200 tpot:50 e2el:5000; requests that meet all of them are counted"
    add("--goodput", type=target, nargs="+", default=[], metavar="TIME:MS", help=targets)
    add("--output", type=Path, metavar="FILE", help="everything, in JSON")
    add("--html", type=Path, metavar="FILE", help="a report with plots, in one file")
    add("--no-progress", action="store_true", help="no bar")


def _of(words: str) -> str:
    return f"{words} (default: %(default)s)"


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    return math.nan


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if 0.0 < (value := _number(text)) < math.inf:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    if 0.0 <= (value := _number(text)) < math.inf:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def rate(text: str) -> float:
    """Requests a second; inf is one."""
    if (value := _number(text)) > 0.0:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests a second; give one above 0, or inf")


def fields(text: str) -> dict[str, Any]:
    """An object of JSON."""
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write it as '{{\"top_k\": 40}}', in single quotes")


def endpoint(text: str) -> Endpoint:
    """An endpoint by its name or its path."""
    for name, path in PATHS.items():
        if text in (name, path):
            return name
    raise argparse.ArgumentTypeError(f"unknown endpoint {text!r}: {nearest(text, PATHS)}")


def target(text: str) -> tuple[str, float]:
    """A time's name and its limit."""
    name, colon, limit = text.partition(":")
    names = [field.name for field in dataclasses.fields(Goal)]
    if not colon or name not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is no target such as ttft:200: {nearest(name, names)}")
    return name, above_zero(limit)
