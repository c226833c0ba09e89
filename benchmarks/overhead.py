"""What a step's time is made of: the target, drafting, other tensor operations, and the host.

    python -m benchmarks.overhead [--family demo] [--systems plain draft] [--batches 1 8] ...

How it counts. The same requests under a fixed plan give the same steps, so that one stretch of steps can be run again
and again:

1. as it is, with a clock around each step: the *step's* time;
2. once while every tensor operation is written down, with its arguments and in whose part it was called: the target
   (``forward``, ``logits``), the drafters (``guess``, ``propose``, ``observe``), or others (batches, sampling, noise,
   trees, K/V);
3. nothing but the operations, all steps in a row: each called anew with the arguments that it had, in a loop that does
   nothing else. The loop's own time, over calls that do nothing, is taken off. Weights are read in the order of the
   step, from the caches or the memory that they come from there.

1 and 3 take turns, several rounds; of each step the median counts, and the table shows the mean over the steps. What
is left of the step's time is the *host*: Python, NumPy, and the way from one operation to the next. A call's own price
(the dispatcher, making its results) belongs to the operation, some microseconds each; the table says how many calls
there are. "in target", "in drafting" and "elsewhere" are the host's time within those parts and outside of them, from a
run with clocks around the parts. For a large model the first two are small differences of large times; "elsewhere" is
the engine's own, and is sound there, too.

Between operations the host's work displaces code and data from the first caches. In 3 it does not: operations are
faster there than in a step, and "host" is an upper bound, but for noise. A lower one, "at least", is a step's time less
that of its operations as they come, each between two clocks: there the clocks' own work displaces even more.

Operations of drafters without a model are not called again like that: they change what these keep (the index of
``ngram``), or need what they have forgotten since. Their time is that of the operations as they come.

With one thread the clock is the thread's CPU time, which other processes do not count in; with more it is the wall's.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command import begin_again, carried_out
from benchmarks.family import Family, load_prompts
from benchmarks.measure import Case
from decoding.config import EngineConfig
from decoding.engine import Engine
from decoding.request import GenerateRequest, SamplingParams
from server.flags import Parser, positive

PLAIN = "plain"
TARGET, DRAFTING, OTHER = PARTS = ("target", "drafting", "other")
GUESSING = "guessing"  # the part of DRAFTING that is not called again
PLAN = "fixed:nodes=12,depth=4"  # of systems that draft
SETTLING = 12  # steps before the first that counts: prompts, and what the collection of garbage drove from the caches


@dataclass(frozen=True)
class Call:
    """One tensor operation of a step."""

    part: str
    operation: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Writes down the operations that run while it is entered; those of GUESSING it only clocks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.count = 0
        self.seconds = 0.0  # of all of them as they came
        self.guessing = 0.0  # of these those of GUESSING, which are not among the calls
        self._clock = clock
        self._part = OTHER

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if self._part != GUESSING:
            self.calls.append(Call(self._part, func, args, given))
        started = self._clock()
        result = func(*args, **given)
        taken = self._clock() - started
        self.count += 1
        self.seconds += taken
        self.guessing += taken if self._part == GUESSING else 0.0
        return result

    def named(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, what it does being recorded as a part's."""

        def within(*args: Any, **kwargs: Any) -> Any:
            before, self._part = self._part, part
            try:
                return call(*args, **kwargs)
            finally:
                self._part = before

        return within


class Clocks:
    """The time that each part of a step takes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._clock = clock

    def named(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time being counted as a part's."""

        def within(*args: Any, **kwargs: Any) -> Any:
            started = self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += self._clock() - started

        return within


class Part:
    """A collaborator of a step, some of whose methods are watched: their names, and as which part."""

    def __init__(self, inner: Any, watch: Recorder | Clocks, parts: dict[str, str]) -> None:
        self._inner = inner
        self._named = {name: watch.named(part, getattr(inner, name)) for name, part in parts.items()}

    def __getattr__(self, name: str) -> Any:
        return self._named[name] if name in self._named else getattr(self._inner, name)


@contextmanager
def watched(engine: Engine, watch: Recorder | Clocks) -> Iterator[None]:
    """Watch the parts of the engine's steps."""
    stepper = engine._stepper
    target, drafters = stepper.target, stepper.drafters
    stepper.target = Part(target, watch, {"forward": TARGET, "logits": TARGET})  # type: ignore[assignment]
    guess = GUESSING if isinstance(watch, Recorder) else DRAFTING
    parts = {"guess": guess, **dict.fromkeys(("propose", "with_top", "observe", "read_prompts"), DRAFTING)}
    stepper.drafters = Part(drafters, watch, parts)  # type: ignore[assignment]
    try:
        yield
    finally:
        stepper.target, stepper.drafters = target, drafters


@dataclass(frozen=True)
class Share:
    """The mean step of a stretch, in seconds."""

    system: str
    batch: int
    temperature: float
    step: float
    target: float  # tensor operations of each part
    drafting: float
    other: float
    calls: float  # tensor operations
    target_host: float  # what is no tensor operation, within the parts
    drafting_host: float
    other_host: float
    least_host: float

    @property
    def host(self) -> float:
        return self.step - self.target - self.drafting - self.other


class Stretch:
    """The same steps of the same requests, any number of times.

    Args:
        steps: how many of them count.
    """

    def __init__(
        self, engine: Engine, cases: Sequence[Case], temperature: float, steps: int, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._cases = cases
        self._temperature = temperature
        self._steps = steps
        self._runs = 0
        self.clock = clock

    def run(self) -> list[float]:
        """As it is: seconds of each step."""
        seconds = []
        for _ in self._begun():
            started = self.clock()
            self._engine.step()
            seconds.append(self.clock() - started)
        return seconds

    def parts(self) -> list[dict[str, float]]:
        """With clocks around the parts: seconds of each for each step, and of what is in none of them (``OTHER``)."""
        seconds = []
        for _ in self._begun():
            clocks = Clocks(self.clock)
            with watched(self._engine, clocks):
                started = self.clock()
                self._engine.step()
                clocks.seconds[OTHER] = self.clock() - started - sum(clocks.seconds.values())
            seconds.append(clocks.seconds)
        return seconds

    def record(self) -> list[Recorder]:
        """The operations of each step."""
        steps = []
        for _ in self._begun():
            recorder = Recorder(self.clock)
            with watched(self._engine, recorder), recorder:
                self._engine.step()
            steps.append(recorder)
        return steps

    @torch.inference_mode()
    def replay(self, steps: Sequence[Sequence[Call]]) -> list[dict[str, float]]:
        """Nothing but the operations, all steps in a row: seconds of each part, for each step."""
        taken = self._replayed(steps)
        nothing = self._replayed(
            [[Call(call.part, _nothing, call.args, call.kwargs) for call in calls] for calls in steps]
        )
        return [{part: taken[i][part] - nothing[i][part] for part in PARTS} for i in range(len(steps))]

    def _replayed(self, steps: Sequence[Sequence[Call]]) -> list[dict[str, float]]:
        pieces = [
            [(part, list(piece)) for part, piece in itertools.groupby(calls, key=lambda call: call.part)]
            for calls in steps
        ]
        seconds = [dict.fromkeys(PARTS, 0.0) for _ in steps]
        for step, of_parts in zip(pieces, seconds, strict=True):
            for part, calls in step:
                started = self.clock()
                for call in calls:
                    call.operation(*call.args, **call.kwargs)
                of_parts[part] += self.clock() - started
        return seconds

    def _begun(self) -> Iterator[int]:
        self._runs += 1
        room = (SETTLING + self._steps + 1) * 8  # tokens that the steps cannot use up
        for number, case in enumerate(self._cases):
            params = SamplingParams(max_tokens=room, temperature=self._temperature, seed=case.seed, ignore_eos=True)
            # what drafters have learned in earlier runs would change the steps
            self._engine.submit(GenerateRequest(str(number), case.ids, params, cache_salt=f"run {self._runs}"))
        gc.collect()
        gc.disable()
        try:
            for _ in range(SETTLING):
                self._engine.step()
            yield from range(self._steps)
        finally:
            gc.enable()
            self._engine.close()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a loop over calls takes by itself."""


def measure(system: str, stretch: Stretch, batch: int, temperature: float, rounds: int) -> Share:
    """Rounds of steps, of their parts and of their operations, in turns."""
    stretch.run()
    recorded = stretch.record()
    steps = [recorder.calls for recorder in recorded]
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for number, seconds in enumerate(stretch.run()):
            times["step", number].append(seconds)
        for number, parts in enumerate(stretch.parts()):
            times["in target", number].append(parts[TARGET])
            times["in drafting", number].append(parts[DRAFTING])
            times["elsewhere", number].append(parts[OTHER])
        for number, recorder in enumerate(stretch.record()):
            times["as they come", number].append(recorder.seconds)
            times[GUESSING, number].append(recorder.guessing)
        for number, parts in enumerate(stretch.replay(steps)):
            for part in PARTS:
                times[part, number].append(parts[part])
    mean = {
        name: statistics.fmean(statistics.median(times[name, number]) for number in range(len(steps)))
        for name in ("step", "in target", "in drafting", "elsewhere", "as they come", GUESSING, *PARTS)
    }
    return Share(
        system,
        batch,
        temperature,
        step=mean["step"],
        target=mean[TARGET],
        drafting=mean[DRAFTING] + mean[GUESSING],
        other=mean[OTHER],
        calls=statistics.fmean(recorder.count for recorder in recorded),
        target_host=mean["in target"] - mean[TARGET],
        drafting_host=mean["in drafting"] - mean[DRAFTING] - mean[GUESSING],
        other_host=mean["elsewhere"] - mean[OTHER],
        least_host=mean["step"] - mean["as they come"],
    )


def render(shares: Sequence[Share]) -> str:
    """A table, in microseconds."""
    words = (
        "step",
        "target",
        "drafting",
        "other",
        "host",
        "share",
        "at least",
        "in target",
        "in drafting",
        "elsewhere",
        "calls",
    )
    lines = [f"{'system':10}{'batch':>6}{'T':>5}" + "".join(f"{word:>{len(word) + 3}}" for word in words)]
    for s in shares:
        seconds = (s.step, s.target, s.drafting, s.other, s.host, s.target_host, s.drafting_host, s.other_host)
        cells = [f"{1e6 * value:.0f}" for value in seconds]
        cells = [*cells[:5], f"{s.host / s.step:.1%}", f"{s.least_host / s.step:.1%}", *cells[5:], f"{s.calls:.0f}"]
        line = f"{s.system:10}{s.batch:6}{s.temperature:5g}"
        lines.append(line + "".join(f"{cell:>{len(word) + 3}}" for word, cell in zip(words, cells, strict=True)))
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = Parser(prog="python -m benchmarks.overhead", description="What a step's time is made of, on a CPU.")
    add = parser.add_argument
    add("--family", type=Path, default=Path("demo"), metavar="FOLDER", help="target and drafters (default: demo)")
    add("--systems", nargs="+", default=[PLAIN, "draft"], metavar="NAME", help="plain, or one drafter")
    add("--batches", type=positive, nargs="+", default=[1, 8], metavar="N", help="requests at once (default: 1 8)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.8], metavar="T", help="(default: 0 0.8)")
    add("--plan", default=PLAN, help="a fixed one, of systems that draft (default: %(default)s)")
    add("--steps", type=positive, default=24, metavar="N", help="that count (default: %(default)s)")
    add("--rounds", type=positive, default=7, metavar="N", help="(default: %(default)s)")
    add("--prompt-tokens", type=positive, default=128, metavar="N", help="(default: %(default)s)")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    begin_again(options.threads)
    return carried_out("overhead", lambda: print(render(list(shares(options)))))


def shares(options: argparse.Namespace) -> Iterator[Share]:
    """Every system, batch and temperature that is asked for.

    Raises:
        ConfigError: a model that cannot be loaded.
    """
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    family = Family.find(options.family)
    cases = load_prompts(family.target, max(options.batches), options.prompt_tokens)
    for system in options.systems:
        drafters = () if system == PLAIN else family.speculate([system])
        config = EngineConfig(
            str(family.target), speculate=drafters, device="cpu", prefix_caching=False, plan=options.plan
        )
        engine = Engine.load(config)
        for batch in options.batches:
            for temperature in options.temperatures:
                stretch = Stretch(engine, cases[:batch], temperature, options.steps, clock)
                print(f"{system}, batch {batch}, temperature {temperature:g}", file=sys.stderr)
                yield measure(system, stretch, batch, temperature, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
