"""Flags of ``saccade serve`` about metrics, log and traces, with vLLM's names."""

from __future__ import annotations

import argparse
import dataclasses
from typing import get_args

from server.observation import LogFormat, LogLevel, Observation


def add_observation_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of Observation."""
    add = parser.add_argument_group("observability").add_argument
    lines = "json: one object a line, and a line for every request when it ends, without its prompt (default: text)"
    add("--log-format", choices=get_args(LogFormat), help=lines)
    level = "the least that is logged (default: info); with debug, the text format has a line for every request as well"
    add("--log-level", choices=get_args(LogLevel), help=level)
    add("--vllm-metrics", action="store_true", help="tell metrics under vLLM's names as well, for its dashboards")
    add(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send a span for every request to this OpenTelemetry collector, over HTTP, such as "
        "http://127.0.0.1:4318/v1/traces; needs saccade[otel]",
    )


def observation(args: argparse.Namespace) -> Observation:
    """The settings out of the flags that were given."""
    names = {field.name for field in dataclasses.fields(Observation)}
    return Observation(**{name: value for name, value in vars(args).items() if name in names})
