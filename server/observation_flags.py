"""Flags of ``saccade serve`` about metrics, log and traces, with vLLM's names."""

from __future__ import annotations

import argparse
import dataclasses

from server.observation import Observation


def add_observation_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of Observation."""
    add = parser.add_argument_group("observability").add_argument
    add("--vllm-metrics", action="store_true", help="tell metrics under vLLM's names as well, for its dashboards")


def observation(args: argparse.Namespace) -> Observation:
    """The settings out of the flags that were given."""
    names = {field.name for field in dataclasses.fields(Observation)}
    return Observation(**{name: value for name, value in vars(args).items() if name in names})
