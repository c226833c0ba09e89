"""A request on its way through the engine: all its prompts and choices, as one stream of deltas, with its account."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from decoding.errors import RequestError, SaccadeError
from decoding.messages import SpeculationStats, TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest
from decoding.text import Tokenizer
from server.engine_client import EngineClient
from server.errors import GenerationError
from server.limits import Limits
from server.openai.choice_output import ChoiceOutput, Delta, OutputOptions, ScoredToken, concatenated, score_prompt


@dataclass(frozen=True)
class PromptRequest:
    """One prompt: what the engine gets, and its text for echo."""

    request: GenerateRequest
    text: str = ""


class Generation:
    """Runs all prompts of one HTTP request. Choice ``j`` of prompt ``i`` has the index ``i * n + j``.

    Args:
        on_tokens: called with a choice's index and the event whenever tokens of it have come.
        max_collected: tokens of an answer that is collected; an alternative with a logprob counts as one.

    Attributes:
        failure: the error that ended it.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        prompts: Sequence[PromptRequest],
        options: OutputOptions,
        on_tokens: Callable[[int, TokenEvent], None],
        max_collected: int = Limits.max_answer_tokens,
    ) -> None:
        self.options = options
        self._max_collected = max_collected
        self.failure: SaccadeError | None = None
        self.prompts = [
            PromptRun(client, tokenizer, prompt, options, place * prompt.request.params.n, on_tokens)
            for place, prompt in enumerate(prompts)
        ]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What the choices gain, as it comes; each one's last delta has its finish reason.

        Closing the generator cancels what still runs.

        Raises:
            RequestError, UnavailableError, EngineDeadError, GenerationError: the first that any prompt meets.
        """
        if len(self.prompts) == 1:
            source = self.prompts[0].deltas()
        else:
            source = _merge([run.deltas() for run in self.prompts])
        async with aclosing(source) as deltas:
            try:
                async for delta in deltas:
                    if not delta.empty:
                        yield delta
            except SaccadeError as error:
                self.failure = error
                raise

    async def collected(self) -> list[Delta]:
        """Each returned choice's whole output, in order.

        Raises:
            RequestError: it has become too large to be kept until it is complete; or as ``deltas`` does.
        """
        parts: dict[int, list[Delta]] = {}
        left = self._max_collected
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                parts.setdefault(delta.index, []).append(delta)
                left -= delta.weight
                if left < 0:
                    self.failure = self._too_large()
                    raise self.failure
        wholes = {index: concatenated(each) for index, each in parts.items()}
        if self.options.best is None:
            return [wholes[index] for index in sorted(wholes)]
        return [replace(wholes[choice.index], index=place) for place, choice in enumerate(self.returned)]

    def _too_large(self) -> RequestError:
        message = (
            f"The answer grew too large to be sent whole: this server keeps {self._max_collected} tokens, alternatives "
            "with a logprob included. Stream it, or ask for fewer tokens, choices or logprobs."
        )
        return RequestError(message, code="answer_too_large")

    @property
    def returned(self) -> list[ChoiceOutput]:
        """The choices of the answer, by their index there; those of ``best_of`` when all have ended."""
        best = self.options.best
        return self.choices if best is None else [choice for run in self.prompts for choice in run.ranked()[:best]]

    def so_far(self, index: int) -> tuple[int, int]:
        """Prompt tokens and returned tokens of one of ``choices``."""
        each = len(self.prompts[0].choices)
        run = self.prompts[index // each]
        return run.prompt_tokens, run.choices[index % each].returned

    @property
    def choices(self) -> list[ChoiceOutput]:
        return [choice for run in self.prompts for choice in run.choices]

    @property
    def prompt_tokens(self) -> int:
        return sum(run.prompt_tokens for run in self.prompts)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens from the prefix cache; choices of one prompt share its tokens, so its first one counts."""
        return sum(run.choices[0].cached_tokens for run in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.returned for choice in self.choices)

    @property
    def predicted(self) -> bool:
        """The request brought a prediction."""
        return any(run.predicted for run in self.prompts)

    def speculation(self) -> SpeculationStats | None:
        """The account of all choices; None until the first of them has ended."""
        ended = [choice.speculation for choice in self.choices if choice.speculation is not None]
        return _total(ended) if ended else None


class PromptRun:
    """One prompt of a request.

    Attributes:
        choices: those that are made, more than are returned if the best are.
        logprobs: of the prompt's tokens, when they were asked for; with the first choice's first event.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        prompt: PromptRequest,
        options: OutputOptions,
        first: int,
        on_tokens: Callable[[int, TokenEvent], None],
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._options = options
        self._on_tokens = on_tokens
        self._echoed: set[int] = set()
        count = prompt.request.params.n
        self.choices = [ChoiceOutput(first + j, tokenizer, prompt.request, options) for j in range(count)]
        self.prompt_tokens = len(prompt.request.prompt_ids)
        self.predicted = bool(prompt.request.prediction_ids)
        self.request = prompt.request
        self.logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def ranked(self) -> list[ChoiceOutput]:
        """The choices, the likeliest for its length first; of equals the first one made."""
        return sorted(self.choices, key=lambda choice: choice.mean_logprob, reverse=True)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        waiting: list[TokenEvent] = []  # for the prompt's logprobs, which come with the first choice
        scores: tuple[ScoredToken, ...] | None = None
        unscored = self._prompt.request.params.prompt_logprobs is not None
        async with aclosing(self._client.generate(self._prompt.request)) as events:
            async for event in events:
                if unscored and event.prompt_logprobs is None and event.finish_reason != "error":
                    waiting.append(event)
                    continue
                if unscored and event.prompt_logprobs is not None:
                    self.logprobs, unscored = event.prompt_logprobs, False
                    scores = await self._score(event.prompt_logprobs)
                for each in (event, *waiting):
                    yield self._take(each, scores)
                waiting.clear()
        if waiting:
            raise GenerationError("The engine did not score the prompt.")

    async def _score(self, logprobs: tuple[TokenLogprobs | None, ...]) -> tuple[ScoredToken, ...] | None:
        """The prompt's tokens as an echo tells them, if it does."""
        top = self.request.params.logprobs
        if not self._options.echo or not self._options.scored or top is None:
            return None
        ids, text = self.request.prompt_ids, self._prompt.text
        return await asyncio.to_thread(score_prompt, self._tokenizer, ids, logprobs, top, text)

    def _take(self, event: TokenEvent, scores: tuple[ScoredToken, ...] | None) -> Delta:
        choice = self.choices[event.choice]
        if event.token_ids:
            self._on_tokens(choice.index, event)
        echo = None
        if self._options.echo and event.choice not in self._echoed and event.finish_reason != "error":
            self._echoed.add(event.choice)
            echo = choice.echo(self._prompt.text, scores)
        finished_before = choice.finished
        delta = choice.take(event)
        if choice.finished and not finished_before and event.finish_reason is None:
            self._client.cancel(event.request_id, event.choice)  # a stop string: the engine need not go on
        return delta if echo is None else concatenated([echo, delta])  # the prompt goes out with the first token


async def _merge(sources: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Deltas of several prompts as they come. When one fails or the consumer leaves, the others are closed."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(maxsize=2 * len(sources))

    async def pump(source: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    await queue.put(delta)
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - carried over to the consumer, which raises it
            await queue.put(error)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _total(parts: Sequence[SpeculationStats]) -> SpeculationStats:
    by_drafter = {}
    for name in dict.fromkeys(name for part in parts for name in part.by_drafter):
        found = [part.by_drafter[name] for part in parts if name in part.by_drafter]
        by_drafter[name] = type(found[0])(sum(s.drafted for s in found), sum(s.accepted for s in found))
    return SpeculationStats(
        steps=sum(part.steps for part in parts),
        drafted=sum(part.drafted for part in parts),
        accepted=sum(part.accepted for part in parts),
        by_drafter=by_drafter,
        acceptance=parts[0].acceptance,  # one rule for all choices of a request
    )
