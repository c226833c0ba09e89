"""What a large datastore costs: to build, to open, to search.

    python -m benchmarks.datastore [--size 1GiB] [--tokenizer demo/target] [--path FILE] [--searches 1000]

Without FILE one of made-up text is built in a temporary folder (with FILE and no such file: there, to be kept). Another
process then opens it and searches, so that the memory of the build does not show. Two kinds of texts are looked up:
pieces of the corpus, which match as far as the drafter looks, and the same tokens in another order, which match by a
few tokens as new text does. Each kind is looked up twice, and the first time includes bringing pages into memory.
Whether they come from the disk or from the system's cache of files is not in our hands; --drop asks the system to
forget the file before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks.command import carried_out
from benchmarks.provenance import cpu_model
from decoding.datastore.build import encoded, write
from decoding.datastore.corpus import Piece
from decoding.datastore.layout import Datastore, Header, Vocabulary, place_kind, token_kind
from decoding.drafters.base import DrafterContext
from decoding.drafters.retrieval import RetrievalDrafter, RetrievalOptions
from decoding.errors import ConfigError
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence as Row
from decoding.text import Tokenizer
from models import kernels
from server.flags import Parser, positive, size

WORDS, PHRASES, PHRASE_WORDS = 60_000, 200_000, 6
DOCUMENT_WORDS = 2_000
REPEATED = 0.5  # of the words come in phrases that come again
CONTEXT = DrafterContext(
    name="retrieval",
    bit=0,
    target=cast(Any, None),
    tokenizer=cast(Any, None),
    dtype=torch.float32,
    device=torch.device("cpu"),
    attention="auto",
    max_model_len=4096,
    max_step_tokens=64,
)


def made_up_text(seed: int = 0) -> Iterator[str]:
    """Documents without end, of words whose frequencies fall as 1 / rank, half of them in phrases that come again."""
    luck = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    spelled = zip(luck.choice(letters, (WORDS, 10)), luck.integers(2, 10, WORDS), strict=True)
    words = np.array(["".join(row[:length]) for row, length in spelled])
    share = 1 / np.arange(1, WORDS + 1)
    share /= share.sum()
    phrases = words[luck.choice(WORDS, (PHRASES, PHRASE_WORDS), p=share)]
    while True:
        rows = DOCUMENT_WORDS // PHRASE_WORDS
        lines = words[luck.choice(WORDS, (rows, PHRASE_WORDS), p=share)]
        again = luck.random(rows) < REPEATED
        lines[again] = phrases[luck.integers(PHRASES, size=int(again.sum()))]
        yield "\n".join(" ".join(line) for line in lines)


def build(path: Path, file_bytes: int, tokenizer: Tokenizer) -> Header:
    """A datastore of made-up text that is as large as asked for, to within a document or so.

    Raises:
        ConfigError: it cannot be written, or sorted.
    """
    vocabulary = Vocabulary.of(tokenizer, "benchmark")
    each = token_kind(vocabulary.size).itemsize + place_kind(file_bytes // 6).itemsize
    pieces = (Piece(text) for text in made_up_text())

    def enough() -> Iterator[Any]:
        left = file_bytes // each
        for chunk in encoded(pieces, tokenizer):
            yield chunk
            left -= len(chunk.ids) + 1
            if left <= 0:
                return

    return write(path, enough(), vocabulary)


def measure(path: Path, searches: int) -> dict[str, float]:
    """Seconds and bytes of memory, in this process."""
    found: dict[str, float] = {}
    kernels.load()  # what libraries take does not count
    before, started = resident(), time.perf_counter()
    store = Datastore.open(path)
    found["open ms"] = 1e3 * (time.perf_counter() - started)
    context = replace(CONTEXT, target=cast(Any, SimpleNamespace(vocab_size=store.vocabulary.size)))
    drafter = RetrievalDrafter(RetrievalOptions(str(path)), context, store)
    found["resident MiB before"] = before / 2**20
    found["resident MiB once open"] = resident() / 2**20
    known = texts_of(store, searches)
    luck = np.random.default_rng(1)
    for name, texts in {"known": known, "new": luck.permuted(known, axis=1)}.items():
        rows = [step_of(text) for text in texts]
        for turn in ("first", "again"):
            times = search(drafter, rows)
            found[f"us a search, {name} text, {turn}"] = 1e6 * statistics.mean(times)
            found[f"us a search, {name} text, {turn}, median"] = 1e6 * statistics.median(times)
        found[f"resident MiB after {name} text"] = resident() / 2**20
    return found


def texts_of(store: Datastore, count: int, length: int = 16) -> np.ndarray:
    """[count, length] pieces of the corpus from all over it, free of separators (another token stands for them)."""
    places = np.random.default_rng(0).integers(0, len(store.tokens) - length, count)
    texts = store.tokens[places[:, None] + np.arange(length)].astype(np.int64)
    return np.where(texts < store.vocabulary.size, texts, 0)


def step_of(text: np.ndarray) -> tuple[Plan, Quota]:
    """A step of one row that ends in this text, with room for a full tree."""
    row = Row(GenerateRequest("r", tuple(text.tolist()), SamplingParams(max_tokens=1)), 0, 0)
    planned = (PlannedRow(row, row.length - 1, 1),)
    return Plan(planned, planned), Quota((RowQuota(63, 63, frozenset(["retrieval"])),))


def search(drafter: RetrievalDrafter, steps: Sequence[tuple[Plan, Quota]]) -> list[float]:
    """Seconds of each."""
    times = []
    for plan, quota in steps:
        started = time.perf_counter()
        drafter.propose(plan, quota, cast(Any, None))
        times.append(time.perf_counter() - started)
    return times


def resident() -> int:
    """Bytes of memory that this process has in use, pages of mapped files included.

    Raises:
        ConfigError: the system does not say.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"memory is read from /proc, which is not there ({error}); run this on Linux") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def drop(path: Path) -> None:
    """Ask the system to forget what it keeps of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.measure:
        print(json.dumps(measure(args.path, args.searches)))
        return 0
    return carried_out("python -m benchmarks.datastore", lambda: report(args))


def report(args: argparse.Namespace) -> None:
    """Build, if need be, measure in another process, print."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmark.datastore") if args.path is None else args.path
        if not path.exists():
            started = time.perf_counter()
            header = build(path, args.size, Tokenizer.load(args.tokenizer))
            print(
                f"built in {time.perf_counter() - started:.0f} s: {header.tokens} tokens, {header.documents} documents"
            )
        print(f"{path.stat().st_size / 2**30:.3f} GiB, on {cpu_model()}")
        if args.drop:
            drop(path)
        command = [sys.executable, "-m", "benchmarks.datastore", "--measure", "--path", str(path)]
        done = subprocess.run(
            [*command, "--searches", str(args.searches)], stdout=subprocess.PIPE, text=True, check=True
        )
        for name, value in json.loads(done.stdout).items():
            print(f"{value:10.1f}  {name}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = Parser(prog="python -m benchmarks.datastore", description="Measure a large datastore.")
    add = parser.add_argument
    add("--size", type=size, default=2**30, metavar="SIZE", help="of the file to build (default: 1GiB)")
    add("--tokenizer", type=Path, default=Path("demo/target"), metavar="FOLDER", help="(default: %(default)s)")
    add("--path", type=Path, default=None, metavar="FILE", help="the datastore; built if it is not there, and kept")
    add("--searches", type=positive, default=1000, metavar="N", help="of each kind (default: %(default)s)")
    add("--drop", action="store_true", default=False, help="have the system forget the file before it is opened")
    add("--measure", action="store_true", default=False, help=argparse.SUPPRESS)  # the process that is measured
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    return args


if __name__ == "__main__":
    sys.exit(main())
