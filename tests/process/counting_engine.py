"""A tiny engine without a model: it says the prompt again and again. For tests of what stands around an engine."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from decoding.config import EngineConfig
from decoding.errors import ModelError
from decoding.messages import EngineInfo, EngineStats, FinishReason, SpeculationStats, TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest

CRASH, FAIL, HANG, SLOW = 13, 14, 15, 16  # tokens at which it crashes, fails the request, hangs, or takes its time


@dataclass
class _Choice:
    request: GenerateRequest
    choice: int
    made: int = 0


class CountingEngine:
    """Implements SteppedEngine. The model's name says how loading goes: "missing", "broken", "slow", "late", "exits"
    or anything.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.info = EngineInfo(config.model, 1000, 100, (0,), (), "float32", "cpu")
        self._open: dict[tuple[str, int], _Choice] = {}
        self._choices: dict[str, int] = {}  # of each request that is not over
        self._rows = config.max_num_seqs
        self._finished = 0
        self._steps = 0

    @classmethod
    def load(cls, config: EngineConfig) -> CountingEngine:
        if noise := os.environ.get("SACCADE_TEST_NOISE"):
            os.write(2, f"{noise}\n".encode())  # past all loggers, as a library does that is not in Python
        if config.model == "missing":
            raise ModelError("there is no folder 'missing'; give another")
        if config.model == "broken":
            raise RuntimeError("a mistake")
        if Path(config.model).name == "slow":
            time.sleep(2.0)
        if Path(config.model).name == "late":
            time.sleep(1.0)
            raise ModelError("the last shard is torn; download it again")
        if config.model == "exits":
            os._exit(3)
        return cls(config)

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def submit(self, request: GenerateRequest) -> None:
        request.validate(self.info.vocab_size, self.info.max_model_len, self.info.drafters)
        self._choices[request.request_id] = request.params.n
        for choice in range(request.params.n):
            self._open[request.request_id, choice] = _Choice(request, choice)

    def cancel(self, request_id: str, choice: int | None = None) -> list[TokenEvent]:
        numbers = range(self._choices.get(request_id, 0)) if choice is None else (choice,)
        found = [self._open[request_id, number] for number in numbers if (request_id, number) in self._open]
        return [self._end(each, (), "cancelled") for each in found]

    def step(self, arrivals: Callable[[], None] | None = None) -> list[TokenEvent]:
        time.sleep(0.002)
        self._steps += 1
        return [self._advance(choice) for choice in list(itertools.islice(self._open.values(), self._rows))]

    def stats(self) -> EngineStats:
        running = min(len(self._open), self._rows)
        return EngineStats(
            running=running,
            waiting=len(self._open) - running,
            pages_total=7,
            pages_free=7,
            steps=self._steps,
            requests_finished=self._finished,
        )

    def check_health(self) -> None:
        """It needs nobody else."""

    def close(self) -> None:
        self._open.clear()

    def _advance(self, choice: _Choice) -> TokenEvent:
        prompt = choice.request.prompt_ids
        token = prompt[choice.made % len(prompt)]
        choice.made += 1
        if token == CRASH:
            raise RuntimeError("the engine met its crash token")
        if token == SLOW:
            time.sleep(0.05)
        if token == HANG:
            time.sleep(3600)
        if token == FAIL:
            return self._end(choice, (), "error")
        if choice.made == choice.request.params.max_tokens:
            return self._end(choice, (token,), "length")
        first = choice.made == 1
        return TokenEvent(
            choice.request.request_id,
            choice.choice,
            (token,),
            logprobs=_scored(choice, (token,)),
            seed=choice.request.params.seed if first else None,
        )

    def _end(self, choice: _Choice, tokens: tuple[int, ...], reason: FinishReason) -> TokenEvent:
        del self._open[choice.request.request_id, choice.choice]
        self._finished += 1
        if not any((choice.request.request_id, other) in self._open for other in range(choice.request.params.n)):
            del self._choices[choice.request.request_id]
        return TokenEvent(
            choice.request.request_id,
            choice.choice,
            tokens,
            logprobs=_scored(choice, tokens),
            finish_reason=reason,
            error="the request failed" if reason == "error" else None,
            speculation=SpeculationStats(steps=choice.made),
        )


def _scored(choice: _Choice, tokens: tuple[int, ...]) -> tuple[TokenLogprobs, ...] | None:
    """The next ids as alternatives."""
    count = choice.request.params.logprobs
    if count is None:
        return None
    return tuple(TokenLogprobs(token, -0.5, tuple((token + i, -0.5 - i) for i in range(count))) for token in tokens)
