"""``saccade report acceptance``: how many drafted tokens the target accepts, by drafter, depth and temperature.

Every drafter, and every named combination, runs in one engine on the same prompts with the same seeds. Greedy text of a
small model repeats itself, which flatters every drafter; so there are sampled texts, and real ones, replayed. Writes
to one folder: ``acceptance.json`` with provenance and the counts of every text, ``acceptance.md``, and three plots.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures, plots
from benchmarks.acceptance_runs import REPLAY, Bench, Measured, Oracle, Variant, scripts_of
from benchmarks.acceptance_tables import render
from benchmarks.provenance import provenance
from benchmarks.rates import Estimate, by_depth, conditional, gain, tokens_per_step
from benchmarks.texts import Encode, Prompt, Room, Script, load_prompts, load_scripts
from decoding.assemble import load_target
from decoding.config import Dtype, EngineConfig
from decoding.drafters import DrafterChoice
from decoding.errors import ConfigError, nearest
from decoding.plan_choice import FixedPlan
from training.checkpoint import replace_folder


@dataclass(frozen=True)
class Options:
    """The command line. Each default is written here once."""

    model: str
    prompts: Path
    out: Path
    speculate: tuple[str, ...] = ()
    sets: str = ""  # "a;b;a+b"; default: every drafter alone, and all of them together
    temperatures: tuple[float, ...] = (0.0, 0.7, 0.8, 1.0)
    max_tokens: int = 96  # of each text
    limit: int | None = None  # prompts, and replayed texts
    replay: Path | None = None  # default: the prompts themselves
    nodes: int = 32
    max_depth: int = 8  # as in the published tables
    batch: int = 16  # texts at once
    dtype: Dtype = EngineConfig.dtype
    device: str = EngineConfig.device
    threads: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    source: dict[str, Any]
    measured: list[Measured]
    oracles: list[Oracle]


def report(options: Options, command: Sequence[str]) -> None:
    """Measure, print the tables, write the files.

    Raises:
        ConfigError: models, drafters, files or settings that cannot work; the message names the fix.
        RequestError: a temperature out of range.
    """
    figures.require()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sets = parse_sets(options)
    config = EngineConfig(
        options.model,
        speculate=options.speculate,
        dtype=options.dtype,
        device=options.device,
        max_nodes=options.nodes,
        max_depth=options.max_depth,
    )
    check_limits(options)
    loaded = load_target(config)
    prompts, scripts = load_texts(options, loaded.tokenizer.encode, loaded.target.max_model_len)
    make_folder(options.out)
    longest = max([len(p.ids) + p.tokens for p in prompts] + [len(s.ids) for s in scripts])
    bench = Bench(config, loaded, longest, options.batch)
    measured = list(measure(bench, sets, options.temperatures, prompts, scripts))
    singles = dict.fromkeys(name for names in sets for name in names)
    oracles = list(bound(bench, list(singles), measured, prompts, scripts))
    dtype = str(loaded.target.dtype).removeprefix("torch.")
    source = provenance(command, models_of(options), {"saccade": dtype})
    done = Report({**source, "settings": settings_of(options, prompts, scripts)}, measured, oracles)
    write(options.out, done)


def parse_sets(options: Options) -> list[tuple[str, ...]]:
    """The drafters to be measured together.

    Raises:
        ConfigError: no drafters, unknown or repeated names.
    """
    names = [DrafterChoice.parse(text).name for text in options.speculate]
    if not names:
        raise ConfigError("there is nothing to measure; give at least one --speculate, such as --speculate ngram")
    if not options.sets:
        return [(name,) for name in names] + ([tuple(names)] if len(names) > 1 else [])
    sets = [tuple(name.strip() for name in part.split("+")) for part in options.sets.split(";") if part.strip()]
    for name in (name for each in sets for name in each):
        if name not in names:
            raise ConfigError(f"--sets names {name!r}, which is no --speculate of this report: {nearest(name, names)}")
    if any(len(set(each)) < len(each) for each in sets) or len(set(sets)) < len(sets) or not sets:
        raise ConfigError(f'--sets {options.sets!r} must name different sets of different drafters, as in "a;b;a+b"')
    return sets


def check_limits(options: Options) -> None:
    """Ranges of the settings that are this report's own.

    Raises:
        ConfigError: naming the flag.
    """
    if not 1 <= options.nodes <= 63:
        raise ConfigError(f"--nodes must be in 1 .. 63, not {options.nodes}")
    if not 1 <= options.max_depth <= 63:
        raise ConfigError(f"--max-depth must be in 1 .. 63, not {options.max_depth}")
    if options.max_tokens < least_tokens(options):
        raise ConfigError(
            f"--max-tokens {options.max_tokens} leaves no step that could accept {options.max_depth} tokens; give at "
            f"least {least_tokens(options)}, or lower --max-depth"
        )


def least_tokens(options: Options) -> int:
    """Of a text: one of the prompt's own step, and those of one step that accepts all that it may."""
    return options.max_depth + 2


def load_texts(options: Options, encode: Encode, context: int) -> tuple[list[Prompt], list[Script]]:
    """Prompts and real texts, in tokens of the target.

    Raises:
        ConfigError: files that cannot be read or used.
    """
    room = Room(context, least_tokens(options))
    prompts = load_prompts(options.prompts, encode, room, max_tokens=options.max_tokens, limit=options.limit)
    return prompts, load_scripts(options.replay or options.prompts, encode, room, limit=options.limit)


def make_folder(path: Path) -> None:
    """Make sure that there is a folder to write to, before anything is measured.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made ({error.strerror}); give a folder that can be") from None


def variants(temperatures: Sequence[float]) -> Iterator[Variant]:
    """What is measured at each temperature."""
    for temperature in temperatures:
        yield Variant(temperature)
        if temperature > 0:
            yield Variant(temperature, coupled=False)
            yield Variant(temperature, coupled=False, rule="typical")
        yield Variant(temperature, pruned=True)


def measure(
    bench: Bench,
    sets: Sequence[tuple[str, ...]],
    temperatures: Sequence[float],
    prompts: Sequence[Prompt],
    scripts: Sequence[Script],
) -> Iterator[Measured]:
    """Every set of drafters on texts of every variant, and on the real ones."""
    for names in sets:
        for variant in variants(temperatures):
            yield _told(bench.generate(prompts, names, variant))
        yield _told(bench.replay(scripts, names, Variant(0.0)))


def bound(
    bench: Bench,
    names: Sequence[str],
    measured: Sequence[Measured],
    prompts: Sequence[Prompt],
    scripts: Sequence[Script],
) -> Iterator[Oracle]:
    """Each drafter's guesses along the target's texts of the lowest and the highest temperature, and the real ones."""
    texts = {m.variant: m.tokens for m in measured if m.tokens}
    temperatures = sorted({variant.temperature for variant in texts})
    for name in names:
        for temperature in dict.fromkeys([temperatures[0], temperatures[-1]]):
            own = scripts_of(prompts, texts[Variant(temperature)])
            for coupled in (True, False) if temperature > 0 else (True,):
                variant = Variant(temperature, coupled)
                found = bench.oracle(own, name, variant, variant.label)
                yield from [found] if found else []
        found = bench.oracle(scripts, name, Variant(0.0), REPLAY)
        yield from [found] if found else []


def models_of(options: Options) -> dict[str, str]:
    """The target and the drafters' checkpoints."""
    choices = [DrafterChoice.parse(text) for text in options.speculate]
    return {"target": options.model, **{c.name: c.options.path for c in choices if hasattr(c.options, "path")}}


def settings_of(options: Options, prompts: Sequence[Prompt], scripts: Sequence[Script]) -> dict[str, Any]:
    """What the report's reader must know beside the command."""
    return {
        "drafters": {c.name: asdict(c.options) for c in map(DrafterChoice.parse, options.speculate)},
        "prompts": len(prompts),
        "tokens": sum(p.tokens for p in prompts),
        "replayed": len(scripts),
        "nodes": options.nodes,
        "max_depth": options.max_depth,
        "pruned": FixedPlan.min_probability,
    }


def write(folder: Path, done: Report) -> None:
    """Tables to standard output; JSON, Markdown and plots to the folder, all or none of them.

    Raises:
        TrainError: the folder cannot be written to, or the disk is full; the tables are printed all the same.
    """
    print(render(done.source, done.measured, done.oracles, markdown=False))
    names: list[str] = []
    replace_folder(folder, lambda draft: names.extend(file.name for file in write_files(draft, done)))
    print("\nwritten: " + ", ".join(str(folder / name) for name in names))


def write_files(folder: Path, done: Report) -> list[Path]:
    """JSON, Markdown and plots; the files that were written."""
    document = {
        **{"provenance": done.source},
        "measured": [summary(m, done.measured) for m in done.measured],
        "oracle": [asdict(oracle) for oracle in done.oracles],
    }
    json_file = folder / "acceptance.json"
    json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = render(done.source, done.measured, done.oracles, markdown=True)
    (folder / "acceptance.md").write_text(page, encoding="utf-8")
    return [json_file, folder / "acceptance.md", *plots.draw(folder, done.measured, done.oracles)]


def summary(m: Measured, everything: Sequence[Measured]) -> dict[str, Any]:
    """A measurement for the JSON file: rates, and the counts behind them."""
    plain = next((o for o in everything if o.drafters == m.drafters and o.variant == _uncoupled(m)), None)
    coupled = m.text != REPLAY and m.variant.coupled and plain is not None
    return {
        "drafters": m.drafters,
        "text": m.text,
        "variant": asdict(m.variant),
        "tokens_per_step": _plain(tokens_per_step(m.counts)),
        "over_uncoupled": _plain(gain(m.counts, plain.counts)) if coupled and plain else None,
        "nodes_per_step": m.nodes,
        "by_depth": [_plain(e) for e in by_depth(m.counts)],
        "conditional": [_plain(e) for e in conditional(m.counts)],
        "counts": [asdict(counts) for counts in m.counts],
        "texts": m.digests(),
    }


def _uncoupled(m: Measured) -> Variant:
    return Variant(m.variant.temperature, coupled=False)


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else asdict(estimate)


def _told(m: Measured) -> Measured:
    print(f"{m.drafters}, {m.text}: {tokens_per_step(m.counts)} tokens per step", file=sys.stderr, flush=True)
    return m
