"""What drafters that remember take: memory over thousands of requests, and time to update and to match.

    python -m benchmarks.store_bounds --requests 10000 [--drafters suffix:max_cache_mb=32 recycling retrieval=PATH ...]

No model runs: texts spliced from the workloads and from random tokens are dictated to the engine, one request after
the other, by tenants who take turns (``cache_salt``). Each set of drafters has a process of its own. Memory is how much
the process has grown since the first hundredth of the requests, without what is mapped from files (which is shown
beside it); its bound is what the drafters say of themselves together (``memory_bound`` of their options), or
``--bound``. Time is that of all the drafters' calls, those at a request's begin and end too, over all tokens, prompts
included: a prompt's tokens go into a store like others.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import workload_files
from benchmarks.command import begin_again, carried_out, opened, read
from benchmarks.family import Family
from decoding.config import EngineConfig
from decoding.errors import ConfigError
from server.flags import Parser, positive, size

if TYPE_CHECKING:
    from benchmarks.documents import Document
    from benchmarks.silent_target import Dictated
    from decoding.engine import Engine

KIND = "store-bounds"
CONTEXT = 1024
STATUS = Path("/proc/self/status")
LOOKS = 100  # at the memory
REMEMBERING = ("suffix:max_cache_mb=16", "recycling")  # by default; those of them that are in the table
PLAN = "fixed:nodes=16,depth=16,min_probability=0"  # drafters are asked in every step, and verified


@dataclass(frozen=True)
class Options:
    """The command line."""

    family: Path
    drafters: tuple[str, ...]
    requests: int
    prompt_tokens: int
    tokens: int
    tenants: int
    bound: int | None
    threads: int
    resume: bool
    out: Path


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = Parser(prog="python -m benchmarks.store_bounds", description="Measure what stores of past texts take.")
    add = parser.add_argument
    add("--family", type=Path, default=Path("demo"), metavar="FOLDER", help="whose tokenizer (default: %(default)s)")
    add("--drafters", nargs="+", default=[], metavar="NAME", help=f"(default: {' '.join(REMEMBERING)})")
    add("--requests", type=positive, default=10_000, metavar="N", help="(default: %(default)s)")
    add("--prompt-tokens", type=positive, default=32, metavar="N", help="of every request (default: %(default)s)")
    add("--tokens", type=positive, default=64, metavar="N", help="of every answer (default: %(default)s)")
    add("--tenants", type=positive, default=4, metavar="N", help="who do not share texts (default: %(default)s)")
    add("--bound", type=size, default=None, metavar="SIZE", help="of drafters that name none, as 64M (default: none)")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="(default: in benchmarks/results)")
    add("--resume", action="store_true", default=False, help="measure only what --out does not have")
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    command = ["python", "-m", "benchmarks.store_bounds", *argv]
    return carried_out("store-bounds", lambda: _report(bench(options, command)))


def _report(document: Document) -> None:
    from benchmarks.drafters_tables import stores_text

    print(stores_text(document.pieces))


def bench(options: Options, command: Sequence[str]) -> Document:
    """A piece for each set of drafters; the document is in ``options.out`` after each of them.

    Raises:
        ConfigError: drafters that are not there, a document of another kind, a machine that does not tell.
    """
    from benchmarks.provenance import provenance
    from benchmarks.workload_systems import labelled
    from decoding.drafters import DRAFTERS

    if not STATUS.is_file():
        raise ConfigError(f"this machine has no {STATUS}, from which memory is read; measure on Linux")
    family = Family.find(options.family)
    document = opened(options.out, KIND, resume=options.resume)
    sets = labelled(options.drafters or [words for words in REMEMBERING if words.partition(":")[0] in DRAFTERS])
    if not sets:
        raise ConfigError(f"there is none of {', '.join(REMEMBERING)}; name what to measure with --drafters")
    done = {piece["drafters"] for piece in document.pieces}
    document.sessions.append(provenance(command, family.models, {"none": "float32"}))
    for name, words in sets.items():
        if name not in done:
            piece = _apart(words, options)
            document.pieces.append({"drafters": name, **piece, "session": len(document.sessions) - 1})
            document.save(options.out)
    return document


def _apart(words: str, options: Options) -> dict[str, Any]:
    """``measure`` in a process of its own, so that no other set's memory is in the way."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
        return process.submit(measure, words, options).result()


def measure(set_words: str, options: Options) -> dict[str, Any]:
    """Serve all requests, and look at memory and clocks.

    Raises:
        ConfigError: drafters that cannot be built.
    """
    import torch

    from benchmarks.silent_target import SilentTarget, spliced_texts
    from benchmarks.workload_systems import members
    from decoding.text import Tokenizer

    torch.set_num_threads(options.threads)
    family = Family.find(options.family)
    tokenizer, words = Tokenizer.load(family.target), family.speculate(members(set_words))
    corpus = [token for name in workload_files.names() for token in _tokens(name, tokenizer)]
    length, mapped = options.prompt_tokens + options.tokens, memory("RssFile")
    engine, rule, timed = build(words, SilentTarget(tokenizer.vocab_size, CONTEXT), tokenizer, options)
    texts = spliced_texts(corpus, length, tokenizer.vocab_size)
    found = Found(engine, timed)
    found.serve(rule, islice(texts, options.requests), options)
    return {
        "requests": options.requests,
        "tenants": options.tenants,
        "tokens": options.requests * length,
        "answered": options.requests * options.tokens,
        "steps": engine.stats().steps,
        "seconds": sum(found.seconds),
        "token_seconds": [each / length for each in found.seconds],
        "growth": found.growth,
        "mapped": memory("RssFile") - mapped,
        "bound": bound_of(words, tokenizer.vocab_size) or options.bound,
    }


def _tokens(name: str, tokenizer: Any) -> Iterator[int]:
    for request in workload_files.load(name, tokenizer).requests:
        yield from request.ids


def build(words: Sequence[str], target: Any, tokenizer: Any, options: Options) -> tuple[Engine, Dictated, list[Timed]]:
    """An engine around a silent target, the rule that dictates its texts, and its drafters."""
    from benchmarks.silent_target import Dictated
    from decoding.assemble import LoadedModel, build_drafters, build_stepper
    from decoding.engine import Engine
    from decoding.verify import rule_by_request
    from models.tree_ops import load_tree_ops

    pages = (options.prompt_tokens + options.tokens) // 8 + 16
    config = EngineConfig(
        "silent",
        speculate=tuple(words),
        plan=PLAN,
        prefix_caching=False,
        num_pages=pages,
        max_num_seqs=1,
    )
    loaded = LoadedModel(target, tokenizer, tokenizer.vocab_size, (), {})
    timed = [Timed(drafter) for drafter in build_drafters(config, loaded)]
    rule = Dictated(rule_by_request(load_tree_ops(target.device)))
    stepper = build_stepper(config, loaded, list(timed), rule)  # type: ignore[arg-type]
    return Engine(config, loaded, stepper), rule, timed


class Timed:
    """A drafter, and the seconds that it takes when requests begin and end; the engine counts the others."""

    CALLS = ("admit", "forget")

    def __init__(self, inner: Any) -> None:
        self.seconds = 0.0
        self._inner = inner
        self._calls = {name: self._clocked(getattr(inner, name)) for name in self.CALLS}

    def __getattr__(self, name: str) -> Any:
        return self._calls[name] if name in Timed.CALLS else getattr(self._inner, name)

    def _clocked(self, call: Any) -> Any:
        def clocked(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return clocked


class Found:
    """What comes of serving: seconds of each request, and how far the memory has grown, look by look."""

    def __init__(self, engine: Engine, timed: Sequence[Timed]) -> None:
        self.seconds: list[float] = []
        self.growth: list[int] = []
        self._engine = engine
        self._timed = timed

    def serve(self, rule: Dictated, texts: Iterator[list[int]], options: Options) -> None:
        """All requests, one after the other."""
        every, start = max(1, options.requests // LOOKS), None
        for number, text in enumerate(texts):
            before = self._clock()
            self._answer(rule, text, f"tenant {number % options.tenants}", number, options)
            self.seconds.append(self._clock() - before)
            if (number + 1) % every == 0:
                if start is None:
                    give_back()
                    start = memory("RssAnon")
                self.growth.append(memory("RssAnon") - start)

    def _clock(self) -> float:
        """Seconds that the drafters have taken."""
        return self._engine.stats().draft_seconds + sum(each.seconds for each in self._timed)

    def _answer(self, rule: Dictated, text: Sequence[int], salt: str, number: int, options: Options) -> None:
        from decoding.request import GenerateRequest, SamplingParams

        params = SamplingParams(max_tokens=options.tokens, temperature=0.0, seed=0, ignore_eos=True)
        prompt = tuple(text[: options.prompt_tokens])
        rule.begin(text, len(prompt))
        self._engine.submit(GenerateRequest(str(number), prompt, params, cache_salt=salt))
        while self._engine.has_work:
            for event in self._engine.step():
                rule.length += len(event.token_ids)


def give_back() -> None:
    """Return what is free to the system, where the C library can: stores would grow into it unseen otherwise."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory(what: str) -> int:
    """Bytes of this process: RssAnon is its own, RssFile mapped from files."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def bound_of(words: Sequence[str], vocab_size: int) -> int | None:
    """Bytes that a set's drafters may take together, by their options; None where none of them says."""
    from decoding.drafters import DrafterChoice
    from decoding.drafters.base import BoundedOptions

    options = [DrafterChoice.parse(word).options for word in words]
    limits = [each.memory_bound(vocab_size) for each in options if isinstance(each, BoundedOptions)]
    return sum(limits) if limits else None


if __name__ == "__main__":
    sys.exit(main())
