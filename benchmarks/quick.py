"""``make bench-quick``: the demo model decoded plainly, with each drafter, with both, and by transformers.

    python -m benchmarks.quick [--prompts 20] [--tokens 128] [--rounds 3] [--only plain both] [--check] ...

All systems are in this one process. They take turns prompt by prompt, in an order that changes, and that in several
rounds, so that a machine whose speed drifts is slow for all of them alike. Every text has exactly ``--tokens``
tokens; the times include the prompt; nothing is kept of a prompt from one round to the next (no prefix cache).
Prints a table and the requirements of ``benchmarks/requirements.py``, and writes all of it, each single run too, as
JSON.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from benchmarks.measure import Case, Run, Summary, Task, groups, summarise
from benchmarks.report import render
from benchmarks.requirements import BATCHED_BOTH, BATCHED_PLAIN, CONCURRENT, Finding, judge
from decoding.config import Dtype, EngineConfig
from decoding.errors import ConfigError, SaccadeError, nearest
from server.engine_launch import engine_environment
from server.flags import Parser, positive

if TYPE_CHECKING:  # they import torch, which must not be there before the environment is
    from benchmarks.systems import System

PROMPTS = Path("demo/prompts.jsonl")
RESULTS = Path("benchmarks/results")
TREE_SLOTS = 64  # of a request, beside prompt and text
OURS = {"plain": 1, "ngram": 1, "draft": 1, "both": 1, "auto": 1, BATCHED_PLAIN: CONCURRENT, BATCHED_BOTH: CONCURRENT}
PEERS = ("hf", "hf-assisted", "hf-lookup")
SYSTEMS = (*OURS, *PEERS)

_EPILOG = f"""\
systems: plain, ngram, draft, both (of these drafters), auto (all that lie beside the target);
{BATCHED_PLAIN}, {BATCHED_BOTH}: {CONCURRENT} requests at once;
hf: transformers' generate, hf-assisted: with the draft model, hf-lookup: with prompt lookup
"""


@dataclass(frozen=True)
class Options:
    """The command line."""

    target: str
    draft: str
    dtype: Dtype
    threads: int
    prompts: int
    tokens: int
    rounds: int
    peer_rounds: int
    temperatures: tuple[float, ...]
    only: tuple[str, ...]
    check: bool
    out: Path


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = Parser(
        prog="python -m benchmarks.quick",
        description="Measure the demo model against plain decoding and against transformers, in one process.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", default="demo/target", metavar="PATH", help="(default: %(default)s)")
    add("--draft", default="demo/draft", metavar="PATH", help="draft model, ours and theirs (default: %(default)s)")
    add("--dtype", default="auto", choices=get_args(Dtype), help="of all models (default: the checkpoint's)")
    add("--threads", type=positive, default=2, metavar="N", help="CPU threads (default: %(default)s)")
    add("--prompts", type=positive, default=20, metavar="N", help=f"the first N of {PROMPTS} (default: %(default)s)")
    add("--tokens", type=positive, default=128, metavar="N", help="length of every text (default: %(default)s)")
    add("--rounds", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    add("--peer-rounds", type=positive, default=2, metavar="N", help="rounds with transformers (default: %(default)s)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.8], metavar="T", help="(default: 0 0.8)")
    add("--only", nargs="+", default=list(SYSTEMS), metavar="SYSTEM", help="measure these systems only")
    add("--check", action="store_true", default=False, help="exit with status 1 when a requirement is missed")
    add("--out", type=Path, metavar="FILE", help=f"where the JSON goes (default: {RESULTS}/quick-DATE.json)")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    for name in args.only:
        if name not in SYSTEMS:
            parser.error(f"unknown system {name!r}: {nearest(name, SYSTEMS)}")
    args.temperatures, args.only = tuple(args.temperatures), tuple(args.only)
    args.out = getattr(args, "out", RESULTS / f"quick-{datetime.datetime.now():%Y-%m-%d-%H%M%S}.json")
    return Options(**vars(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Returns:
        0; 1 with ``--check`` when a requirement was missed, and when a model or a prompt cannot be served.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    environment = engine_environment(EngineConfig(options.target, threads=options.threads), os.environ)
    if environment != dict(os.environ):  # OpenMP reads it when torch is imported: begin again
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, environment)
    try:
        findings = bench(options, ["python", "-m", "benchmarks.quick", *argv])
    except SaccadeError as error:
        print(f"bench-quick: {error}", file=sys.stderr)
        return 1
    return int(options.check and any(finding.passed is False for finding in findings))


def bench(options: Options, command: Sequence[str]) -> list[Finding]:
    """The whole measurement; the report goes to standard output, the JSON to ``options.out``.

    Raises:
        ConfigError: a model that cannot be loaded, or more prompts than there are.
        RequestError: a prompt too long for the model.
    """
    import torch

    from benchmarks.provenance import provenance

    torch.set_num_threads(options.threads)
    cases = load_cases(options.target, options.prompts)
    systems, dtypes = load_systems(options, max(len(case.ids) for case in cases))
    source = provenance(command, {"target": options.target, "draft": options.draft}, dtypes)
    warm_up(systems, cases[0], options)
    runs: dict[tuple[float, str], list[Run]] = defaultdict(list)
    for run in measure(systems, cases, options):
        runs[run.temperature, run.system].append(run)
    summaries = [
        summarise(some, runs.get((t, "plain"), []), comparable_text=name not in PEERS or t == 0)
        for (t, name), some in sorted(runs.items(), key=lambda item: (item[0][0], SYSTEMS.index(item[0][1])))
    ]
    findings = judge(runs)
    print(render(source, summaries, findings))
    write(options.out, source, summaries, findings, [run for some in runs.values() for run in some])
    print(f"\nwritten to {options.out}")
    return findings


def load_cases(target: str, count: int) -> list[Case]:
    """The first prompts of the demo, tokenized once for all systems.

    Raises:
        ConfigError: there are not so many.
    """
    from decoding.text import Tokenizer

    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    if count > len(lines):
        raise ConfigError(f"{PROMPTS} has {len(lines)} prompts, not {count}; lower --prompts")
    tokenizer = Tokenizer.load(target)
    texts = [json.loads(line)["prompt"] for line in lines[:count]]
    return [Case(index, tuple(tokenizer.encode(text)), seed=index + 1) for index, text in enumerate(texts)]


def load_systems(options: Options, longest: int) -> tuple[list[System], dict[str, str]]:
    """What is to be measured, and in which dtype each side computes."""
    from benchmarks.peers import load_peers
    from benchmarks.systems import EngineSystem
    from decoding.cache import pages_for
    from decoding.engine import Engine

    speculate = {
        "plain": (),
        "ngram": ("ngram",),
        "draft": (f"draft={options.draft}",),
        "both": (f"draft={options.draft}", "ngram"),
        "auto": (f"draft={options.draft}", *drafters_beside(Path(options.target)), "ngram"),
    }
    pages = 2 * CONCURRENT * pages_for(longest + options.tokens + TREE_SLOTS)  # room enough that none is preempted
    engines: dict[str, Engine] = {}
    systems: list[System] = []
    for name, batch in OURS.items():
        kind = name.partition("-")[0]
        if name in options.only and kind not in engines:
            engines[kind] = Engine.load(
                options.target,
                speculate=speculate[kind],
                dtype=options.dtype,
                device="cpu",
                prefix_caching=False,
                num_pages=pages,
            )
        if name in options.only:
            systems.append(EngineSystem(name, engines[kind], batch))
    dtypes = {f"saccade {kind}": engine.info.dtype for kind, engine in engines.items()}
    if set(options.only) & set(PEERS):
        peers, dtypes["transformers"] = load_peers(options.target, options.draft, options.dtype)
        systems += [peer for peer in peers if peer.name in options.only]
    return systems, dtypes


def drafters_beside(target: Path) -> list[str]:
    """``--speculate`` words of the trained drafters in the folders beside the target's; the draft model aside."""
    from decoding.drafters import DRAFTERS

    folders = {name: target.parent / name for name in DRAFTERS if name != "draft"}
    return [f"{name}={folder}" for name, folder in folders.items() if (folder / "config.json").is_file()]


def warm_up(systems: Sequence[System], case: Case, options: Options) -> None:
    """Everything once, unmeasured: first calls compile, allocate and choose kernels."""
    for system in systems:
        for temperature in options.temperatures:
            system.run(Task(-1, temperature, (case,) * system.batch, options.tokens))
    gc.collect()
    gc.freeze()  # what is loaded need not be looked through again in somebody's measured time


def measure(systems: Sequence[System], cases: Sequence[Case], options: Options) -> Iterator[Run]:
    """Every system on every prompt in every round, taking turns."""
    for number in range(options.rounds):
        taking_part = [system for system in systems if not system.peer or number < options.peer_rounds]
        for temperature in options.temperatures:
            print(f"round {number + 1} of {options.rounds}, temperature {temperature:g}", file=sys.stderr)
            for piece, filled in groups(cases, CONCURRENT):
                tasks = [Task(number, temperature, (case,), options.tokens) for case in piece]
                for task in [*tasks, Task(number, temperature, filled, options.tokens)]:
                    yield from _turns([s for s in taking_part if s.batch == len(task.cases)], task)


def _turns(systems: Sequence[System], task: Task) -> Iterator[Run]:
    # by chance, but the same in every measurement: who follows whom must not matter
    order = random.Random(f"{task.round} {task.temperature} {task.cases[0].index}").sample(systems, len(systems))
    for system in order:
        gc.collect()
        yield system.run(task)


def write(
    path: Path,
    source: dict[str, object],
    summaries: Sequence[Summary],
    findings: Sequence[Finding],
    runs: Sequence[Run],
) -> None:
    """All of it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "provenance": source,
        "summaries": [asdict(summary) for summary in summaries],
        "requirements": [asdict(finding) for finding in findings],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
