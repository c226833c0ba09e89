"""``make bench-gpu``: an 8B-shaped target on a CUDA device, against the device's bandwidth and against transformers.

    python -m benchmarks.gpu [--shape 8b] [--device cuda] [--folder build/gpu] [--budget 440] ...

Phases, each written as soon as it is measured; what the time does not suffice for is named and left out:

1. ``family``: the demo's models are inflated to the shape, in bfloat16 (inflate.py), unless the folder has them.
2. ``forward``: the target's forward pass over trees of 1 to 64 random tokens.
3. ``limits``: plain decoding at batch 1 against the time that a copy of the weights' bytes takes.
4. ``cell``: one request at a time: plain decoding, the best fixed setting and ``auto``, as in matrix.py.
5. ``peer``: transformers, with a static cache and compiled if that is faster, in turns with plain and ``auto``.
6. ``cell``: the rest of the never-slower matrix, shorter.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import matrix
from benchmarks.cells import to_json
from benchmarks.closed_loop import Load, run_loop
from benchmarks.command import begin_again, carried_out
from benchmarks.documents import RESULTS, Document
from benchmarks.family import Family, load_prompts
from benchmarks.inflate_shapes import DRAFTS, TARGETS, Shape
from benchmarks.measure import Case, Task
from benchmarks.settings import AUTO, PLAIN, SETTINGS, Engines, load_engines
from decoding.errors import nearest
from server.flags import Parser, positive

if TYPE_CHECKING:
    from benchmarks.peers import TransformersSystem
    from benchmarks.systems import System

KIND = "gpu"
DEMO = Path("demo/target")
DRAFTERS = ("draft", "eagle3")
# a hair larger than the demo: all phases in seconds on a CPU, for tests of this very command
SHAPES = {**TARGETS, "tiny": Shape(320, 9, 5, 5, 64, 768, 8256, tied=True)}
COPY_BYTES = 2**32
PATIENCE = 3
PEER_TOKENS = 64
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True)
class Options:
    """The command line."""

    shape: str
    device: str
    folder: Path
    concurrency: tuple[int, ...]
    seconds: float
    runs: int
    prompts: int
    transformers: bool
    budget: float
    threads: int
    out: Path


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = Parser(prog="python -m benchmarks.gpu", description="Measure an inflated target on a CUDA device.")
    add = parser.add_argument
    add("--shape", default="8b", metavar="NAME", help=f"one of {', '.join(SHAPES)} (default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    add("--folder", type=Path, default=Path("build/gpu"), help="where the models go (default: %(default)s)")
    add("--concurrency", type=positive, nargs="+", default=[1, 4, 16, 64], metavar="N", help="(default: 1 4 16 64)")
    add("--seconds", type=float, default=0.8, help="of a run, if it decodes plainly (default: %(default)s)")
    add("--runs", type=positive, default=5, metavar="N", help="paired rounds (default: %(default)s)")
    add("--prompts", type=positive, default=40, metavar="N", help="the first N (default: %(default)s)")
    text = "do not compare with transformers"
    add("--without-transformers", dest="transformers", action="store_false", default=True, help=text)
    add("--budget", type=float, default=440.0, metavar="SECONDS", help="no phase begins after (default: %(default)s)")
    add("--threads", type=positive, default=4, metavar="N", help="CPU threads (default: %(default)s)")
    add("--out", type=Path, default=RESULTS / "gpu.json", metavar="FILE", help="(default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    if args.shape not in SHAPES:
        parser.error(f"unknown shape {args.shape!r}: {nearest(args.shape, SHAPES)}")
    args.concurrency = tuple(args.concurrency)
    return Options(**vars(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status: 1 without a device."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    return carried_out("bench-gpu", lambda: _report(bench(options, ["python", "-m", "benchmarks.gpu", *argv])))


def _report(document: Document) -> None:
    from benchmarks.gpu_tables import gpu_text

    print(gpu_text(document.pieces))


def bench(options: Options, command: Sequence[str]) -> Document:
    """All phases that the budget allows; the document is in ``options.out`` after each piece.

    Raises:
        ConfigError: no such device, a model that cannot be loaded, no room for it.
    """
    import torch

    from benchmarks.provenance import provenance
    from decoding.assemble import resolve_device

    started = time.monotonic()
    device = resolve_device(options.device)  # before minutes are spent
    torch.set_num_threads(options.threads)
    family, seconds = prepare(options)
    cases = load_prompts(family.target, options.prompts, longest=128)
    engines = load(family, cases, options)
    source = provenance(command, family.models, {"saccade": engines.dtype})
    source["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    document = Document(KIND, [source], [{"session": 0, "part": "family", "seconds": seconds}])
    for piece in _phases(family, engines, cases, options, started):
        document.pieces.append({"family": family.name, **piece, "session": 0})
        document.save(options.out)
        print(f"{time.monotonic() - started:4.0f} s: {piece['part']}", file=sys.stderr)
    return document


def prepare(options: Options) -> tuple[Family, float]:
    """The inflated family, and the seconds that it took to write.

    Raises:
        ConfigError: no room for it.
    """
    import torch

    from benchmarks.inflate import inflate

    folder, started = options.folder / options.shape, time.monotonic()
    if not (folder / "inflate.json").is_file():
        with torch.inference_mode():
            inflate(DEMO, folder, SHAPES[options.shape], drafters=DRAFTERS, draft=DRAFTS.get(options.shape))
    return Family.find(folder), time.monotonic() - started


def load(family: Family, cases: Sequence[Case], options: Options) -> Engines:
    """Every setting around one target, its prompts in the prefix caches."""
    ways = {name: (name, ()) for name in SETTINGS}
    engines = load_engines(ways, family, matrix.base_config(matrix_options(options), family, cases))
    matrix.fill_prefix_caches(engines, cases)
    gc.collect()
    gc.freeze()
    return engines


def matrix_options(options: Options) -> matrix.Options:
    """The never-slower matrix as it is measured here."""
    given = matrix.parse(["--select-runs", "1", "--device", options.device, "--temperatures", "0", "1"])
    return replace(
        given,
        concurrency=options.concurrency,
        seconds=options.seconds,
        warm_up=2 * options.seconds,
        runs=options.runs,
        prompts=options.prompts,
        threads=options.threads,
    )


def _phases(
    family: Family, engines: Engines, cases: Sequence[Case], options: Options, started: float
) -> Iterator[dict[str, Any]]:
    """The pieces, in the order of what must not be missing."""
    from benchmarks.forward_cost import CONTEXT, ForcedTrees

    times = ForcedTrees(engines.target).seconds(10 * options.runs)
    yield {"part": "forward", "context": CONTEXT, "times": {str(size): found for size, found in times.items()}}
    yield limits(family, engines, cases, options)
    yield from (cell(family, engines, cases, options, 1, temperature) for temperature in TEMPERATURES)
    if options.transformers and _in_time("transformers", options, started):
        yield peer(family, engines, cases, options)
    for concurrency in sorted(set(options.concurrency) - {1}):
        for temperature in TEMPERATURES:
            if _in_time(f"concurrency {concurrency} at temperature {temperature:g}", options, started):
                yield cell(family, engines, cases, options, concurrency, temperature)


def cell(
    family: Family,
    engines: Engines,
    cases: Sequence[Case],
    options: Options,
    concurrency: int,
    temperature: float,
) -> dict[str, Any]:
    """One cell of the never-slower matrix."""
    found = matrix.measure_cell(engines, cases, family.name, concurrency, temperature, matrix_options(options))
    return {**to_json(found), "part": "cell"}


def _in_time(what: str, options: Options, started: float) -> bool:
    if time.monotonic() - started < options.budget:
        return True
    print(f"{what}: left out, the {options.budget:.0f} seconds of --budget are over", file=sys.stderr)
    return False


def limits(family: Family, engines: Engines, cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """Plain steps at batch 1, and the bandwidth of a copy."""
    from benchmarks.roofline import copy_bandwidth, roofline_of

    device = engines.target.device
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 64
    roof = roofline_of(family.target, engines.target, copy_bandwidth(device, size))
    steps = []
    for number in range(-1, options.runs):
        load = Load(1, 0.0, 48, 48, PATIENCE * options.seconds, first=number + 1)
        found = run_loop(engines.by_name[PLAIN], cases, load)
        if number >= 0:
            steps.append(found.seconds / found.steps)
    return {"part": "limits", "context": 128, "steps": steps, "roofline": asdict(roof)}


def peer(family: Family, engines: Engines, cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """transformers' plain decoding at its best, in turns with ours; temperature 0."""
    from benchmarks.compare import in_turns
    from benchmarks.systems import EngineSystem

    theirs = _transformers(family, engines, cases)
    systems: list[System] = [*(EngineSystem(name, engines.by_name[name]) for name in (PLAIN, AUTO)), theirs]
    tasks = [Task(number, 0.0, (case,), PEER_TOKENS) for number in range(-1, options.runs) for case in cases[:2]]
    runs = [run for run in in_turns(systems, tasks) if run.round >= 0]
    return {
        "part": "peer",
        "temperature": 0.0,
        "concurrency": 1,
        "settings": {theirs.name: theirs.setting},
        "runs": [asdict(run) for run in runs],
    }


def _transformers(family: Family, engines: Engines, cases: Sequence[Case]) -> TransformersSystem:
    """As it comes, or with a static cache, compiled where there is a GPU: whichever is faster on other prompts."""
    from transformers import CompileConfig

    from benchmarks.peers import Loaded, TransformersSetting, TransformersSystem
    from benchmarks.tuning import Trial, tune

    device = engines.target.device
    loaded = Loaded.load(str(family.target), None, engines.dtype, str(device))
    static: dict[str, Any] = {"cache_implementation": "static"}
    if device.type == "cuda":
        static["compile_config"] = CompileConfig(mode="reduce-overhead")
    settings = [TransformersSetting(), TransformersSetting(options=static)]
    starts = {each.label: partial(TransformersSystem, "hf", loaded, each) for each in settings}
    return tune(starts, Trial(tuple(cases[-2:]), PEER_TOKENS))


if __name__ == "__main__":
    sys.exit(main())
