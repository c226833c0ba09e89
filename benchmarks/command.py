"""What the commands of the speed benchmarks share: flags, the process that measures, where results go."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from benchmarks import documents
from benchmarks.documents import RESULTS, Document
from decoding.config import Dtype, EngineConfig
from decoding.errors import ConfigError, SaccadeError, nearest
from server.engine_launch import engine_environment
from server.flags import Parser, positive

if TYPE_CHECKING:
    from benchmarks.family import Family


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """What ``base_parser`` knows, and ``read`` adds to."""

    family: Path
    drafters: tuple[str, ...]
    temperatures: tuple[float, ...]
    dtype: Dtype
    device: str
    threads: int
    resume: bool
    out: Path


@dataclass(frozen=True, kw_only=True)
class BenchOptions(BaseOptions):
    """The same of ``bench_parser``."""

    prompts: int
    prompt_tokens: int  # of each, the last ones


def base_parser(name: str, description: str, epilog: str | None = None) -> Parser:
    """A parser with the flags that all of them have."""
    parser = Parser(prog=f"python -m benchmarks.{name}", description=description, epilog=epilog)
    add = parser.add_argument
    add("--family", type=Path, default=Path("demo"), metavar="FOLDER", help="target and drafters (default: demo)")
    add("--drafters", nargs="+", default=[], metavar="NAME", help="auto's (default: all of the family, and ngram)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0], metavar="T", help="(default: 0 1)")
    add("--dtype", default="auto", choices=get_args(Dtype), help="(default: the checkpoint's)")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--threads", type=positive, default=2, metavar="N", help="CPU threads (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help=f"(default: {RESULTS}/{name}-FAMILY-DATE.json)")
    add("--resume", action="store_true", default=False, help="measure only what --out does not have")
    return parser


def bench_parser(name: str, description: str, epilog: str | None = None) -> Parser:
    """One with the flags of those that measure on prompts of demo/prompts.jsonl."""
    parser = base_parser(name, description, epilog)
    add = parser.add_argument
    add("--prompts", type=positive, default=40, metavar="N", help="the first N (default: %(default)s)")
    add("--prompt-tokens", type=positive, default=128, metavar="N", help="the last N of each (default: %(default)s)")
    return parser


def read(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The command line as keywords of the command's options; ends the process, with a message, if it is wrong."""
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    if args.resume and "out" not in args:
        parser.error("--resume goes on with a file; name it with --out")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}
    name = parser.prog.rpartition(".")[2]
    stamp = f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    return {"out": RESULTS / f"{name}-{args.family.name}-{stamp}.json", **given}


def known(parser: Parser, names: Sequence[str], valid: Sequence[str]) -> None:
    """End the process, with a message, if a name is not among the valid ones."""
    for name in names:
        if name not in valid:
            parser.error(f"unknown system {name!r}: {nearest(name, valid)}")


def opened(path: Path, kind: str, *, resume: bool) -> Document:
    """The document to go on with, or a new one.

    Raises:
        ConfigError: it is the result of another command.
    """
    if not (resume and path.exists()):
        return Document(kind)
    document = documents.load(path)
    if document.kind != kind:
        raise ConfigError(f"{path} is the result of another benchmark ({document.kind}); name another --out")
    return document


def begun(options: BaseOptions, kind: str) -> tuple[Family, Document]:
    """A measurement in this process begins: torch has its threads, the family is found, the document is open.

    Raises:
        ConfigError: there is no such family, or the document is the result of another command.
    """
    import torch

    from benchmarks.family import Family

    torch.set_num_threads(options.threads)
    return Family.find(options.family), opened(options.out, kind, resume=options.resume)


def begin_again(threads: int) -> None:
    """Start this very command anew where the environment lacks what OpenMP reads when torch is imported."""
    environment = engine_environment(EngineConfig("", threads=threads), os.environ)
    if environment != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, environment)


def carried_out(name: str, work: Callable[[], None]) -> int:
    """The exit status: 1, with the reason, when a model or a prompt cannot be served."""
    try:
        work()
    except SaccadeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0
