"""``saccade generate``: one prompt, no server."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, fields

import torch

from decoding.acceptance import LOSSY
from decoding.config import EngineConfig
from decoding.engine import Engine
from decoding.errors import ModelError
from decoding.generation import Generation
from decoding.machine import cores
from decoding.request import SamplingParams
from server.engine_driver import memory_named


@dataclass(frozen=True)
class Sampling:
    """What was asked for on the command line; None: the model's default, else the neutral one."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def params(self, defaults: dict[str, float]) -> SamplingParams:
        """The engine's parameters; ``defaults`` are the model's."""
        chosen = {name: int(value) if name == "top_k" else value for name, value in defaults.items()}
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return SamplingParams(**{**chosen, **{name: value for name, value in given.items() if value is not None}})


def generate(config: EngineConfig, prompt: str, sampling: Sampling) -> str:
    """Write the continuation of a prompt to standard output as it is made.

    Returns:
        A line that says how it went.

    Raises:
        ConfigError: the model cannot be loaded.
        ModelError: it breaks down on the text.
        RequestError: the prompt or the sampling parameters cannot be served.
    """
    if config.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (config.threads or cores().lone_threads()) // config.tensor_parallel_size))
    with memory_named():
        engine = Engine.load(config)
    try:
        return _stream(engine, prompt, sampling.params(engine.info.default_sampling))
    finally:
        engine.close()


def _stream(engine: Engine, prompt: str, params: SamplingParams) -> str:
    started = time.monotonic()
    for piece in engine.stream(prompt, params):
        if isinstance(piece, Generation):
            sys.stdout.write("\n")
            if piece.error is not None:
                raise ModelError(piece.error)
            return report(piece, time.monotonic() - started)
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    raise AssertionError("a stream ends with its Generation")


def report(generation: Generation, seconds: float) -> str:
    """Tokens, their rate, and what speculation did."""
    tokens, stats = len(generation.token_ids), generation.speculation
    parts = [f"{tokens} tokens in {seconds:.2f} s", f"{tokens / max(seconds, 1e-9):.1f} tokens/s"]
    if stats.steps:
        parts.append(f"{tokens / stats.steps:.2f} tokens/step")
    if stats.drafted:
        parts.append(f"{stats.accepted} of {stats.drafted} draft tokens accepted")
    if stats.acceptance in LOSSY:
        parts.append(f"lossy ({stats.acceptance} acceptance)")
    return ", ".join([*parts, f"seed {generation.seed}"])
