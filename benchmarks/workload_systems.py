"""What serves a workload: our engine with one set of drafters or another, and the peers' own n-gram lookups.

Requests come one after the other, and what a system has learned from earlier ones of the same round it may use; from
round to round it starts anew, so that every round is the same work. Our engine does so by serving each round under a
cache salt of its own: drafters keep the texts of different salts apart. A server of llama.cpp that remembers is
started again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.family import Family
from benchmarks.measure import Case, Run, Task
from benchmarks.settings import PLAIN
from benchmarks.systems import EngineSystem, System
from benchmarks.workload_files import Request
from decoding.drafters import DRAFTERS
from decoding.errors import ConfigError
from decoding.request import GenerateRequest

if TYPE_CHECKING:
    from benchmarks.llama_cpp import LlamaServer
    from benchmarks.tuning import Trial

# in this order in the table; some may be missing from DRAFTERS
WITHOUT_TRAINING = ("ngram", "suffix", "recycling", "lookahead", "early-exit", "prediction")
PREDICTION = "prediction"


def default_sets(family: Family) -> list[str]:
    """Every drafter that needs no training, the family's draft model, and all of them together."""
    alone = [name for name in WITHOUT_TRAINING if name in DRAFTERS]
    alone += [name for name in ("draft",) if name in family.drafters]
    return [*alone, *(["+".join(alone)] if len(alone) > 1 else [])]


def members(words: str) -> tuple[str, ...]:
    """The drafters of a set: "ngram:max_match=3+draft" is two."""
    named = "|".join(re.escape(name) for name in sorted(DRAFTERS, key=len, reverse=True))
    return tuple(re.split(rf"\+(?=(?:{named})(?:[+:=]|$))", words))


def label(words: str) -> str:
    """A set's name in the table: its drafters with their options, without paths."""
    return "+".join(_unplaced(member) for member in members(words))


def _unplaced(member: str) -> str:
    head, equals, path = member.partition("=")
    if not equals or ":" in head:  # no path: what equals sign there is belongs to an option
        return member
    options = path.rpartition(":")[2] if "=" in path.rpartition(":")[2] else ""
    return f"{head}:{options}" if options else head


def labelled(sets: Sequence[str]) -> dict[str, str]:
    """label -> the set's words.

    Raises:
        ConfigError: two that have the same label.
    """
    found: dict[str, str] = {}
    for words in sets:
        name = label(words)
        if name in found or name == PLAIN:
            raise ConfigError(f"--drafters {words} would be called {name!r} like another system; leave one of them out")
        found[name] = words
    return found


class WorkloadSystem(EngineSystem):
    """Our engine with one set of drafters."""

    def __init__(self, name: str, engine: Any, scope: str) -> None:
        """
        Args:
            scope: of the rounds: the workload, and the temperature.
        """
        super().__init__(name, engine)
        self._scope = scope
        self._predicts = PREDICTION in engine.info.drafters

    def request(self, name: str, case: Case, task: Task) -> GenerateRequest:
        asked = replace(super().request(name, case, task), cache_salt=f"{self._scope}, round {task.round}")
        if self._predicts and isinstance(case, Request) and case.prediction:
            asked = replace(asked, **{"prediction_ids": case.prediction})
        return asked


class InOrder:
    """A server of llama.cpp that may remember the requests of a round."""

    peer = True
    batch = 1

    def __init__(self, server: LlamaServer) -> None:
        self.name = server.name
        self.setting = server.setting
        self._server = server
        self._round: int | None = None

    def run(self, task: Task) -> Run:
        if task.round != self._round:
            self._server.forget()
            self._round = task.round
        return self._server.timed(task)


@dataclass(frozen=True)
class PeerOptions:
    """How the peers are started."""

    dtype: str
    device: str
    threads: int
    llama_build: Path
    trial: Trial | None  # what they are tuned on; None: they are not


def peers(names: Sequence[str], family: Family, options: PeerOptions, running: ExitStack) -> list[System]:
    """Those named, plain and with n-gram lookup; ``running`` ends them."""
    return [system for name in names for system in PEERS[name](str(family.target), options, running)]


def _transformers(target: str, options: PeerOptions, running: ExitStack) -> list[System]:
    from benchmarks.peers import load_transformers

    found = load_transformers(target, None, options.dtype, options.threads, device=options.device, trial=options.trial)
    for system in found:
        running.callback(system.close)
    return list(found)


def _llama(target: str, options: PeerOptions, running: ExitStack) -> list[System]:
    from benchmarks.llama_cpp import load_llama

    servers = load_llama(target, None, options.dtype, options.threads, options.llama_build, trial=options.trial)
    for server in servers:
        running.callback(server.close)
    return [InOrder(server) for server in servers]


PEERS: Mapping[str, Callable[[str, PeerOptions, ExitStack], list[System]]] = {
    "transformers": _transformers,
    "llama": _llama,
}
