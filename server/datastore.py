"""``saccade datastore``: builds the corpus of the retrieval drafter, and checks one."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from decoding.command_line import StrictParser
from decoding.config import EngineConfig
from decoding.datastore.build import encoded, write
from decoding.datastore.corpus import Piece, find_files, read_pieces
from decoding.datastore.layout import Datastore, Header, Vocabulary, check_contents
from decoding.text import Tokenizer
from server.flags import nonempty
from server.model_folder import tokenizer_folder

logger = logging.getLogger("saccade.datastore")

_EPILOG = """\
example:
  saccade datastore build src/ docs/ answers.jsonl --include '*.py' --tokenizer demo/target --out corpus.datastore
  saccade serve demo/target --speculate retrieval=corpus.datastore
"""


def main(argv: Sequence[str]) -> int:
    """Run ``saccade datastore WORDS``.

    Raises:
        SaccadeError: something that is the user's to mend.
    """
    args = parse(argv)
    logger.setLevel(logging.INFO)
    return _build(args) if args.command == "build" else _check(args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = StrictParser(
        prog="saccade datastore",
        description="Make the corpus that --speculate retrieval=PATH copies from.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=StrictParser)
    build = commands.add_parser("build", help="tokenise and sort a corpus")
    text = 'text files, folders of them, or JSONL with "text", "prompt" and "completion", or "token_ids" on each line'
    build.add_argument("corpus", nargs="+", type=Path, metavar="CORPUS", help=text)
    model = "folder of the model that is to be served, or of its tokenizer; or a hub id"
    build.add_argument("--tokenizer", required=True, type=nonempty, metavar="MODEL", help=model)
    build.add_argument("--out", required=True, type=Path, metavar="PATH", help="the file to write")
    pattern = "of the files within folders, only those whose name fits, such as '*.py'; can be given several times"
    build.add_argument("--include", action="append", default=[], metavar="PATTERN", help=pattern)
    check = commands.add_parser("check", help="read a datastore and hold it against its checksums")
    check.add_argument("path", type=Path, metavar="PATH", help="the datastore")
    check.add_argument("--tokenizer", type=nonempty, metavar="MODEL", help="make sure that it is for this model, too")
    args, extra = parser.parse_known_args(argv)
    if extra:
        (build if args.command == "build" else check).refuse(extra)
    return args


def _build(args: argparse.Namespace) -> int:
    files = find_files(args.corpus, args.include)
    tokenizer = _tokenizer(args.tokenizer)
    vocabulary = Vocabulary.of(tokenizer, Path(args.tokenizer).name)
    header = write(args.out, encoded(_pieces(files), tokenizer), vocabulary)
    logger.info("written to %s: %s", args.out, _summary(header))
    return 0


def _check(args: argparse.Namespace) -> int:
    header = check_contents(args.path)
    if args.tokenizer is not None:
        Datastore.open(args.path).check_vocabulary(_tokenizer(args.tokenizer), args.path)
    logger.info("%s is whole: %s", args.path, _summary(header))
    return 0


def _pieces(files: Sequence[Path]) -> Iterator[Piece]:
    """The corpus, with a bar on a terminal."""
    total = sum(file.stat().st_size for file in files if file.exists())
    with tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=None) as bar:
        for file in files:
            for piece in read_pieces(file):
                bar.update(piece.read)
                yield piece


def _tokenizer(name: str) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(EngineConfig(name, tokenizer=name)))


def _summary(header: Header) -> str:
    documents = f"{header.documents} document{'s' if header.documents != 1 else ''}"
    return f"{documents}, {header.tokens} tokens, {header.file_bytes / 2**20:.3g} MiB"
