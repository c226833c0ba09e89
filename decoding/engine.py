"""The engine: requests in, token events out, one synchronous step at a time.

    engine = Engine.load("demo/target", speculate=("draft=demo/draft", "ngram"))
    print(engine.generate("def fib(n):", SamplingParams(max_tokens=64, seed=7))[0].text)

Not thread-safe: one thread (the engine process's loop) owns it.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Any

from decoding.acceptance import Acceptance
from decoding.assemble import LoadedModel, build_drafters, build_stepper, load_target
from decoding.cache import pages_for
from decoding.config import EngineConfig
from decoding.cost_file import learn_costs
from decoding.errors import ConfigError, EngineDeadError, RequestError
from decoding.generation import Generation, GenerationBuilder
from decoding.grammar.compiler import BackgroundCompiler, GrammarCompiler
from decoding.grammar.queue import GrammarQueue
from decoding.messages import EngineInfo, EngineStats, TokenEvent
from decoding.request import GenerateRequest, Grammar, SamplingParams, SpeculationParams
from decoding.sequence import Sequence, SequenceId
from decoding.step import Arrivals, Stepper
from decoding.text import TextDelta
from models.batch import PAGE_SIZE
from models.parallel.ranks import RankError

SEED_BITS = 53  # of a seed that the engine draws: JSON readers keep integers of that size exactly


class Engine:
    """A loaded model that serves requests. ``Engine.load`` makes one."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, stepper: Stepper) -> None:
        self.config = config
        self._acceptance = Acceptance.parse(config.acceptance)
        self.tokenizer = loaded.tokenizer
        self.info = EngineInfo(
            model=config.model,
            max_model_len=loaded.target.max_model_len,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_ids,
            drafters=stepper.drafters.names,
            dtype=str(loaded.target.dtype).removeprefix("torch."),
            device=str(loaded.target.device),
            default_sampling=loaded.default_sampling,
            quantization=config.quantization,
            acceptance=config.acceptance,
            recalling=tuple(drafter.name for drafter in stepper.drafters.members if drafter.needs.recalls),
            tensor_parallel_size=1 if loaded.ranks is None else loaded.ranks.driver.size,
        )
        self._loaded = loaded
        self._stepper = stepper
        compiler = GrammarCompiler(loaded.tokenizer, loaded.vocab_size, loaded.eos_ids)
        self._grammars = GrammarQueue(BackgroundCompiler(compiler), loaded.eos_ids)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._open: dict[str, set[int]] = {}  # choices by request: a queue may be long, and is not to be looked through
        self._numbers = itertools.count()
        self._local: dict[str, GenerationBuilder] = {}  # requests of generate and stream
        self._undelivered: list[TokenEvent] = []  # of submitted requests, made while generate or stream stepped

    @classmethod
    def load(cls, model: str | EngineConfig, **settings: Any) -> Engine:
        """Load a model folder or hub id; ``settings`` are fields of EngineConfig.

        Raises:
            ConfigError: settings or checkpoints that cannot work; the message names the fix.
        """
        config = (
            dataclasses.replace(model, **settings)
            if isinstance(model, EngineConfig)
            else EngineConfig(model, **settings)
        )
        loaded = load_target(config)
        try:
            stepper = build_stepper(config, loaded, build_drafters(config, loaded))
            learn_costs(stepper, config, loaded.vocab_size, loaded.folder)
            engine = cls(config, loaded, stepper)
        except BaseException as error:
            loaded.close()
            if isinstance(error, RankError):
                raise ConfigError(f"{config.model} cannot be loaded: {error}") from error
            raise
        engine._grammars.warm()
        return engine

    # requests --------------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: a request that cannot be served; nothing is queued.
        """
        self._check_request(request)
        self._queue(request)

    def _check_request(self, request: GenerateRequest) -> None:
        request.validate(self.info.vocab_size, self.info.max_model_len, self.info.drafters)
        request.params.check_something_is_left(self.info.vocab_size, self.info.eos_token_ids)
        if request.request_id in self._open:
            raise RequestError(f"there is already a request {request.request_id!r}.", param="request_id")
        pages = pages_for(len(request.prompt_ids) + request.params.max_tokens)
        total = self._stepper.cache.prefixes.pool.num_pages
        if pages > total:
            raise RequestError(
                f"The request needs {pages * PAGE_SIZE} tokens of K/V cache, and the server has {total * PAGE_SIZE}. "
                "Shorten the prompt or lower max_tokens.",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _queue(self, request: GenerateRequest) -> None:
        seed = request.params.seed
        if seed is None:
            seed = self.config.seed if self.config.seed is not None else secrets.randbits(SEED_BITS)
        if request.speculation.acceptance is None:
            speculation = dataclasses.replace(request.speculation, acceptance=self._acceptance)
            request = dataclasses.replace(request, speculation=speculation)
        self._open[request.request_id] = set(range(request.params.n))
        for choice in range(request.params.n):
            sequence = Sequence(request, choice, seed)
            self._sequences[sequence.id] = sequence
            self._stepper.scheduler.add(sequence)
            self._grammars.add(sequence)

    def cancel(self, request_id: str, choice: int | None = None) -> list[TokenEvent]:
        """End a request, or one choice of it: its last events. Nothing happens for one that has ended."""
        open_choices = sorted(self._open.get(request_id, ()))
        wanted = [self._sequences[request_id, each] for each in open_choices if choice in (None, each)]
        ended = {sequence.id for sequence in wanted}
        # what generate or stream stepped for them and nobody has fetched yet goes out before their end
        waiting = [e for e in self._undelivered if (e.request_id, e.choice) in ended]
        self._undelivered = [e for e in self._undelivered if (e.request_id, e.choice) not in ended]
        events = [self._stepper.committer.end(sequence, "cancelled") for sequence in wanted]
        self._deliver(events)
        return waiting + events

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._undelivered)

    def step(self, arrivals: Arrivals | None = None) -> list[TokenEvent]:
        """One forward pass over whatever is to be done; the tokens that came out for submitted requests.

        Args:
            arrivals: may be called in mid-step, to submit requests (and do nothing else) that can still be in the pass.
        """
        waiting, self._undelivered = self._undelivered, []
        return waiting + self._advance(arrivals)

    def _advance(self, arrivals: Arrivals | None = None) -> list[TokenEvent]:
        """A step, and the ends of those whose grammar cannot be compiled."""
        scheduler, committer = self._stepper.scheduler, self._stepper.committer
        idle = not scheduler.running and not any(sequence.is_ready for sequence in scheduler.waiting)
        failed = self._grammars.settle(idle=idle)
        events = [committer.end(sequence, "error", error.message, error.code) for sequence, error in failed]
        try:
            events += self._stepper.step(arrivals)
        except RankError as error:
            raise EngineDeadError(str(error)) from error
        while committer.set_back:
            sequence, spent = committer.set_back.pop()
            if sequence.id in self._sequences and not sequence.is_ready:
                self._grammars.add(sequence, spent)
        return self._deliver(events)

    def _deliver(self, events: list[TokenEvent]) -> list[TokenEvent]:
        """Hand the events of ``generate`` and ``stream`` to their builders; the others."""
        submitted = []
        for event in events:
            if event.finish_reason is not None:
                self._forget(event)
            if event.request_id in self._local:
                self._local[event.request_id].add(event, self.cancel)
            else:
                submitted.append(event)
        if not self._sequences:
            self._stepper.cache.prefixes.pool.check_idle()
        return submitted

    def _forget(self, last: TokenEvent) -> None:
        self._grammars.forget(self._sequences.pop((last.request_id, last.choice)), last.error_code)
        open_choices = self._open[last.request_id]
        open_choices.discard(last.choice)
        if not open_choices:
            del self._open[last.request_id]

    # in-process use --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Many[int] | Many[str] | Many[Many[int]],
        params: SamplingParams | None = None,
        *,
        speculation: SpeculationParams | None = None,
        prediction: str | Many[int] = (),
        stop: Many[str] = (),
        grammar: Grammar | None = None,
    ) -> list[Generation]:
        """Complete one prompt or several (text or token ids) and wait: params.n generations per prompt, in order.

        Args:
            prediction: text (or token ids) that is expected to come, for the drafter of that name.
            grammar: what each text must be.

        Raises:
            RequestError: a prompt, parameter or grammar that cannot be served.
        """
        several = not isinstance(prompts, str) and bool(prompts) and not isinstance(prompts[0], int)
        builders: list[GenerationBuilder] = []
        try:
            for prompt in prompts if several else [prompts]:
                builders.append(self._start(prompt, params, speculation, prediction, stop, grammar))
            while any(builder.is_open for builder in builders):
                self._undelivered += self._advance()
            return [generation for builder in builders for generation in builder.generations()]
        finally:
            for builder in builders:
                self._leave(builder)

    def stream(
        self,
        prompt: str | Many[int],
        params: SamplingParams | None = None,
        *,
        speculation: SpeculationParams | None = None,
        prediction: str | Many[int] = (),
        stop: Many[str] = (),
        grammar: Grammar | None = None,
    ) -> Iterator[TextDelta | Generation]:
        """Complete one prompt: pieces of text of choice 0 as they are made, at last its Generation."""
        params = dataclasses.replace(params or SamplingParams(), n=1)
        builder = self._start(prompt, params, speculation, prediction, stop, grammar)
        try:
            while builder.deltas or builder.is_open:
                if builder.deltas:
                    yield builder.deltas.popleft()
                else:
                    self._undelivered += self._advance()
            yield builder.generations()[0]
        finally:
            self._leave(builder)

    def _start(
        self,
        prompt: Any,
        params: SamplingParams | None,
        speculation: SpeculationParams | None,
        prediction: str | Many[int],
        stop: Many[str],
        grammar: Grammar | None,
    ) -> GenerationBuilder:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if isinstance(prediction, str):
            prediction = self.tokenizer.encode(prediction, add_special_tokens=False)
        request = GenerateRequest(
            request_id=f"local-{next(self._numbers)}",
            prompt_ids=tuple(ids),
            params=params or SamplingParams(),
            speculation=speculation or SpeculationParams(),
            prediction_ids=tuple(prediction),
            grammar=grammar,
        )
        self._check_request(request)  # before the builder, which trusts it
        if grammar is not None:
            self._grammars.require(grammar)
        builder = self._local[request.request_id] = GenerationBuilder(request, self.tokenizer, tuple(stop))
        self._queue(request)
        return builder

    def _leave(self, builder: GenerationBuilder) -> None:
        self.cancel(builder.request.request_id)
        del self._local[builder.request.request_id]

    # observation -----------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since loading, gauges of now."""
        stepper, totals = self._stepper, self._stepper.committer.totals
        pool = stepper.cache.prefixes.pool
        speculation, counts = totals.speculation.stats(stepper.drafters.names), totals.counts
        return EngineStats(
            running=len(stepper.scheduler.running),
            waiting=len(stepper.scheduler.waiting),
            pages_total=pool.num_pages,
            pages_free=pool.num_free,
            pages_cached=pool.num_cached,
            steps=totals.steps,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            cached_prompt_tokens=totals.cached_prompt_tokens,
            preemptions=stepper.scheduler.preemptions,
            requests_finished=totals.requests_finished,
            drafted=speculation.drafted,
            accepted=speculation.accepted,
            by_drafter=speculation.by_drafter,
            step_seconds=stepper.seconds,
            draft_seconds=stepper.drafters.seconds,
            forward_seconds=stepper.laps.seconds["forward"],
            part_seconds=dict(stepper.laps.seconds),
            drafter_seconds=dict(stepper.drafters.taken),
            drafts=sum(counts.paths),
            accepted_at=tuple(counts.accepted_at),
            accepted_by=counts.accepted_by(stepper.committer.sources),
            row_tokens=tuple(counts.row_tokens),
            step_sizes=tuple(counts.sizes),
            step_nodes=counts.nodes,
            step_work=tuple(counts.work),
            step_tokens=counts.tokens,
            steps_by_gear=dict(counts.gears),
            queued=tuple(counts.queued),
            queued_seconds=counts.queued_seconds,
        )

    def check_health(self) -> None:
        """Look whether the other ranks live, if there are any.

        Raises:
            EngineDeadError: one has ended: there is no engine any more.
        """
        if self._loaded.ranks is not None:
            self._loaded.ranks.check()

    def check(self) -> None:
        """Raise PoolError unless every page is accounted for."""
        self._stepper.cache.check(self._sequences.values())

    def close(self) -> None:
        """End every request. Drafters write what is to outlive the engine.

        It can go on being used, unless it had several ranks: the others end here.
        """
        for request_id in list(self._open):
            self.cancel(request_id)
        self._stepper.drafters.close()
        self._grammars.close()
        self._loaded.close()
