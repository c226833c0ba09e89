"""A tiny engine without a model: it says the prompt again and again. For tests of what stands around an engine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from decoding.config import EngineConfig
from decoding.errors import ModelError
from decoding.messages import EngineInfo, EngineStats, FinishReason, SpeculationStats, TokenEvent
from decoding.request import GenerateRequest

CRASH, FAIL, REJECT_SALT = (
    13,
    14,
    "reject",
)  # token ids at which it crashes or fails the request; a salt that it refuses


@dataclass
class _Choice:
    request: GenerateRequest
    choice: int
    made: int = 0


class CountingEngine:
    """Implements SteppedEngine. The model's name says how loading goes: "missing", "broken", "exits" or anything."""

    def __init__(self, config: EngineConfig) -> None:
        self.info = EngineInfo(config.model, 1000, 100, (0,), (), "float32", "cpu")
        self._open: dict[tuple[str, int], _Choice] = {}
        self._finished = 0
        self._steps = 0

    @classmethod
    def load(cls, config: EngineConfig) -> CountingEngine:
        if config.model == "missing":
            raise ModelError("there is no folder 'missing'; give another")
        if config.model == "broken":
            raise RuntimeError("a mistake")
        if config.model == "exits":
            os._exit(3)
        return cls(config)

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def submit(self, request: GenerateRequest) -> None:
        request.validate(self.info.vocab_size, self.info.max_model_len, self.info.drafters)
        for choice in range(request.params.n):
            self._open[request.request_id, choice] = _Choice(request, choice)

    def cancel(self, request_id: str, choice: int | None = None) -> list[TokenEvent]:
        found = [c for (rid, number), c in self._open.items() if rid == request_id and choice in (None, number)]
        return [self._end(each, (), "cancelled") for each in found]

    def step(self) -> list[TokenEvent]:
        time.sleep(0.002)
        self._steps += 1
        return [self._advance(choice) for choice in list(self._open.values())]

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._open), steps=self._steps, requests_finished=self._finished, pages_total=7)

    def close(self) -> None:
        self._open.clear()

    def _advance(self, choice: _Choice) -> TokenEvent:
        prompt = choice.request.prompt_ids
        token = prompt[choice.made % len(prompt)]
        choice.made += 1
        if token == CRASH:
            raise RuntimeError("the engine met its crash token")
        if token == FAIL:
            return self._end(choice, (), "error")
        if choice.made == choice.request.params.max_tokens:
            return self._end(choice, (token,), "length")
        first = choice.made == 1
        return TokenEvent(
            choice.request.request_id, choice.choice, (token,), seed=choice.request.params.seed if first else None
        )

    def _end(self, choice: _Choice, tokens: tuple[int, ...], reason: FinishReason) -> TokenEvent:
        del self._open[choice.request.request_id, choice.choice]
        self._finished += 1
        return TokenEvent(
            choice.request.request_id,
            choice.choice,
            tokens,
            finish_reason=reason,
            error="the request failed" if reason == "error" else None,
            speculation=SpeculationStats(steps=choice.made),
        )
