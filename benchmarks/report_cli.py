"""``saccade report``: what a report can be made of, and the words that it takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from decoding.config import Dtype
from server.flags import Parser, nonempty, positive

_EPILOG = """\
example:
  saccade report acceptance demo/target --speculate draft=demo/draft --speculate ngram \\
      --sets "draft;ngram;draft+ngram" --prompts demo/prompts.jsonl --out acceptance/
"""


def main(argv: Sequence[str]) -> int:
    """Run ``saccade report WORDS``.

    Raises:
        SaccadeError: something that is the user's to mend.
    """
    if argv[:1] == ["costs"]:
        return report_costs(argv)
    args = parse(argv)
    from benchmarks.acceptance import Options, report  # with torch, which --help can do without

    given = {name: value for name, value in vars(args).items() if name != "what"}
    given["speculate"] = tuple(given.get("speculate", ()))
    report(Options(**given), ["saccade", "report", *argv])
    return 0


def report_costs(argv: Sequence[str]) -> int:
    """Run ``saccade report costs WORDS``."""
    args = parse_costs(argv)
    from benchmarks.cost_report import Options, report

    given = {name: value for name, value in vars(args).items() if name != "what"}
    given["speculate"] = tuple(given.get("speculate", ()))
    print(report(Options(**given)))
    return 0


def parse_costs(argv: Sequence[str]) -> argparse.Namespace:
    """As ``parse``, of the costs."""
    parser = Parser(
        prog="saccade report costs",
        description="What a step and drafting cost on this machine: what the planner weighs drafts against.",
        epilog="example:\n  saccade report costs demo/target --speculate draft=demo/draft --plot costs.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["costs"], help=argparse.SUPPRESS)
    add("model", metavar="MODEL", help="folder of the target, or a hub id such as org/name")
    add("--speculate", action="append", metavar="DRAFTER", help="as for saccade serve; several times for several")
    add("--anew", action="store_true", default=False, help="measure even if there is a measurement of this machine")
    add("--plot", type=Path, metavar="FILE", help="where a plot goes, such as costs.png")
    add("--dtype", choices=get_args(Dtype), help="of all models (default: the checkpoint's)")
    add("--quantization", metavar="FORMAT", help="as for saccade serve")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or auto (default)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: as saccade serve)")
    add("--tensor-parallel-size", "-tp", type=positive, metavar="N", help="as for saccade serve; threads of each rank")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    return args


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong. What is not given is not in the result."""
    parser = Parser(
        prog="saccade report",
        description="Measure how many drafted tokens a target accepts, by drafter, depth and temperature. "
        "`saccade report costs --help` is about what steps cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["acceptance", "costs"], help="the report; what follows is about acceptance")
    add("model", metavar="MODEL", help="folder of the target, or a hub id such as org/name")
    add("--speculate", action="append", metavar="DRAFTER", help="as for saccade serve; several times for several")
    text = 'drafters to be measured together, such as "a;b;a+b" (default: each alone, and all together)'
    add("--sets", type=nonempty, help=text)
    add("--prompts", type=Path, required=True, metavar="FILE", help='JSONL: {"prompt": TEXT} on each line')
    text = "real text, JSONL or plain, on which drafts are scored without being verified (default: the prompts)"
    add("--replay", type=Path, metavar="FILE", help=text)
    add("--temperatures", type=_temperatures, metavar="T,T", help="(default: 0,0.7,0.8,1)")
    add("--max-tokens", type=positive, metavar="N", help="length of every text that is made (default: 96)")
    add("--limit", type=positive, metavar="N", help="the first N prompts and real texts only")
    add("--nodes", type=positive, metavar="N", help="drafted nodes of a tree, at most 63 (default: 32)")
    add("--max-depth", type=positive, metavar="DEPTH", help="depth of a tree (default: 8)")
    add("--batch", type=positive, metavar="N", help="texts at once (default: 16)")
    add("--dtype", choices=get_args(Dtype), help="of all models (default: the checkpoint's)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or auto (default)")
    add("--threads", type=positive, metavar="N", help="CPU threads")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where tables, plots and counts go")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    return args


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of temperatures; write it as 0,0.8,1") from None
    if not all(0 <= value <= 100 for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} must be different temperatures from 0 to 100, such as 0,0.8,1")
    return values
