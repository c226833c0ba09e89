"""Tokens per step under JSON schemas, beside what the same engines do without a grammar.

    python -m benchmarks.structured [--family demo] [--drafters draft ngram] [--schemas FILE] [--requests N] ...

Every schema of the corpus is asked for, one request at a time, in three ways around one loaded target: by plain
decoding, with forced tokens alone (which every engine drafts that may speculate), and with other drafters beside them.
Then as many tokens are written after the same prompt without a grammar. Answers are judged by the jsonschema library,
and must be the same in all ways. Trees are fixed by default, so that tokens per step do not depend on the clock; times
tell what the masks cost.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import base_parser, begin_again, begun, carried_out, read
from benchmarks.family import Family
from benchmarks.settings import AUTO, PLAIN, Engines, load_engines
from decoding.config import Dtype, EngineConfig
from decoding.errors import ConfigError
from decoding.request import GenerateRequest, Grammar, SamplingParams, SpeculationParams
from server.flags import positive

if TYPE_CHECKING:
    from benchmarks.documents import Document
    from decoding.engine import Engine

KIND = "structured"
SCHEMAS = Path("tests/schemas/schemas.jsonl")
FORCED, DRAFTED = "forced", "drafters"
FIXED = "fixed:nodes=24,depth=8,min_probability=0.08"
TREE_SLOTS = 64  # of a request, beside prompt and answer


@dataclass(frozen=True)
class Options:
    """The command line."""

    family: Path
    drafters: tuple[str, ...]
    temperatures: tuple[float, ...]
    schemas: Path
    plan: str
    requests: int | None
    tokens: int
    dtype: Dtype
    device: str
    threads: int
    resume: bool
    out: Path


@dataclass(frozen=True)
class Schema:
    """One of the corpus."""

    name: str
    level: int
    schema: dict[str, Any]
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What one engine made of one request."""

    ids: tuple[int, ...]
    reason: str
    steps: int
    seconds: float  # in steps
    forced: int  # accepted tokens that the drafter of forced tokens had proposed


def parse(argv: Sequence[str]) -> Options:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = base_parser("structured", "Measure tokens per step under JSON schemas, and without.")
    add = parser.add_argument
    add("--schemas", type=Path, default=SCHEMAS, metavar="FILE", help="(default: %(default)s)")
    add("--plan", default=FIXED, help="auto, or fixed:nodes=24,depth=8 (default: %(default)s)")
    add("--requests", type=positive, default=None, metavar="N", help="that many, spread over the file (default: all)")
    add("--tokens", type=positive, default=600, metavar="N", help="of an answer, at most (default: %(default)s)")
    return Options(**read(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin_again(options.threads)
    command = ["python", "-m", "benchmarks.structured", *argv]
    return carried_out("structured", lambda: _report(bench(options, command)))


def _report(document: Document) -> None:
    from benchmarks.structured_tables import structured_text

    print(structured_text(document.pieces))


def bench(options: Options, command: Sequence[str]) -> Document:
    """A piece for each temperature and schema; the document is in ``options.out`` after each temperature.

    Raises:
        ConfigError: a model or a file of schemas that is not there, a document of another kind.
        RequestError: a schema that cannot be enforced.
    """
    from benchmarks.provenance import provenance

    family, document = begun(options, KIND)
    schemas = load_schemas(options.schemas, options.requests)
    engines = load(family, options)
    document.sessions.append(provenance(command, family.models, {"saccade": engines.dtype}))
    done = {(piece["temperature"], piece["name"]) for piece in document.pieces}
    gc.collect()
    gc.freeze()
    for temperature in options.temperatures:
        due = [schema for schema in schemas if (temperature, schema.name) not in done]
        for piece in measure(engines.by_name, due, temperature, options):
            document.pieces.append({**piece, "family": family.name, "session": len(document.sessions) - 1})
        document.save(options.out)
        print(f"T={temperature:g}: done", file=sys.stderr)
    return document


def load_schemas(path: Path, count: int | None) -> list[Schema]:
    """The corpus, or as many of it as wanted, from everywhere in it.

    Raises:
        ConfigError: no such file, or something else is in it.
    """
    try:
        found = [Schema(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a file of schemas with --schemas") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{path} holds no schemas; each line must be an object with {_fields()}") from None
    wanted = min(count or len(found), len(found))
    return [found[len(found) * number // wanted] for number in range(wanted)]


def _fields() -> str:
    return ", ".join(Schema.__annotations__)


def load(family: Family, options: Options) -> Engines:
    """Plain decoding, forced tokens alone, and the drafters."""
    from decoding.cache import pages_for

    base = EngineConfig(
        str(family.target),
        dtype=options.dtype,
        device=options.device,
        num_pages=2 * pages_for(options.tokens + 4 * TREE_SLOTS),
        prefix_caching=False,
        plan=options.plan,
    )
    drafters = options.drafters or (*(name for name in ("draft",) if name in family.drafters), "ngram")
    ways: dict[str, tuple[str, Sequence[str]]] = {PLAIN: (PLAIN, ()), DRAFTED: (AUTO, drafters)}
    return load_engines(ways, family, base)


def measure(
    engines: dict[str, Engine], schemas: Sequence[Schema], temperature: float, options: Options
) -> Iterator[dict[str, Any]]:
    """Every schema with every engine, in turns."""
    for place, schema in enumerate(schemas):
        params = SamplingParams(max_tokens=options.tokens, temperature=temperature, seed=place + 1)
        answers = {name: follow(*way, schema, params) for name, way in _ways(engines).items()}
        made = len(answers[PLAIN].ids)
        free = SamplingParams(max_tokens=max(made, 1), temperature=temperature, seed=place + 1, ignore_eos=True)
        unbound = {name: follow(*way, schema, free, bound=False) for name, way in _ways(engines).items()}
        yield {
            "name": schema.name,
            "level": schema.level,
            "temperature": temperature,
            "complaint": judged(engines[PLAIN], schema, answers[PLAIN]),
            "same": len({answer.ids for answer in answers.values()}) == 1,
            "answers": {name: _counts(answer) for name, answer in answers.items()},
            "free": {name: _counts(answer) for name, answer in unbound.items()},
        }


def _ways(engines: dict[str, Engine]) -> dict[str, tuple[Engine, SpeculationParams]]:
    return {
        PLAIN: (engines[PLAIN], SpeculationParams(enabled=False)),
        FORCED: (engines[PLAIN], SpeculationParams()),
        DRAFTED: (engines[DRAFTED], SpeculationParams()),
    }


def follow(
    engine: Engine, speculation: SpeculationParams, schema: Schema, params: SamplingParams, *, bound: bool = True
) -> Answer:
    """One request from its beginning to its end."""
    from server.openai.json_schema.reading import schema_source

    grammar = Grammar("json_schema", schema_source(schema.schema, schema.name)) if bound else None
    ids = tuple(engine.tokenizer.encode(schema.prompt))
    started = engine.stats().step_seconds
    engine.submit(GenerateRequest("it", ids, params, speculation, grammar=grammar))
    made: list[int] = []
    while engine.has_work:
        for event in engine.step():
            made += event.token_ids
            last = event
    stats = last.speculation
    assert stats is not None
    forced = stats.by_drafter.get(FORCED)
    seconds = engine.stats().step_seconds - started
    return Answer(tuple(made), str(last.finish_reason), stats.steps, seconds, forced.accepted if forced else 0)


def judged(engine: Engine, schema: Schema, answer: Answer) -> str | None:
    """What is wrong with an answer; None: it is complete, and satisfies its schema."""
    from benchmarks.schema_judge import complaint

    if answer.reason != "stop":
        return f"it ended by {answer.reason}"
    return complaint(engine.tokenizer.decode(answer.ids[:-1]), schema.schema)


def _counts(answer: Answer) -> dict[str, Any]:
    counts = asdict(answer)
    return {**counts, "ids": len(answer.ids)}


if __name__ == "__main__":
    sys.exit(main())
