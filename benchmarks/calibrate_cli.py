"""``saccade calibrate``: the words that it takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from decoding.config import Dtype
from server.flags import Parser, positive

_EPILOG = """\
example:
  saccade calibrate demo/target --speculate medusa=heads/ --prompts demo/prompts.jsonl
  saccade serve demo/target --speculate medusa=heads/:tree=calibrated --max-nodes 63
"""


def main(argv: Sequence[str]) -> int:
    """Run ``saccade calibrate WORDS``.

    Raises:
        SaccadeError: something that is the user's to mend.
    """
    args = parse(argv)
    from benchmarks.calibrate import Options, calibrate  # with torch, which --help can do without

    print(calibrate(Options(**vars(args)), ["saccade", "calibrate", *argv]))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong. What is not given is not in the result."""
    parser = Parser(
        prog="saccade calibrate",
        description="Measure how often the guesses of Medusa heads are right, and build the best tree of fixed shape.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of the target, or a hub id such as org/name")
    add("--speculate", required=True, metavar="medusa=PATH", help="the heads; medusa: those within MODEL")
    add("--prompts", type=Path, required=True, metavar="FILE", help='JSONL: {"prompt": TEXT} on each line')
    text = "score the heads on the text of the prompts, not on what the target writes after them"
    add("--real-text", action="store_true", help=text)
    add("--nodes", type=positive, metavar="N", help="nodes of the tree, at most 63 (default: 63)")
    add("--temperature", type=float, help="of what the target writes (default: 0)")
    add("--max-tokens", type=positive, metavar="N", help="that the target writes after each prompt (default: 128)")
    add("--limit", type=positive, metavar="N", help="the first N prompts only")
    add("--out", type=Path, metavar="FILE", help="the tree (default: medusa_choices.json beside the heads)")
    add("--dtype", choices=get_args(Dtype), help="of target and heads (default: the checkpoint's)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or auto (default)")
    add("--threads", type=positive, metavar="N", help="CPU threads")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    return args
