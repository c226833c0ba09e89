"""The words that ``saccade train`` takes. A recipe's flags are the fields of its options."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decoding.command_line import StrictParser, whole_from
from decoding.errors import nearest
from training.optim import OptimizerOptions
from training.recipe import RecipeKind
from training.recipes import RECIPES
from training.tokenizer import SMALLEST
from training.trainer import RunOptions

PRECISIONS = {"bf16": torch.bfloat16, "fp32": None}
OPTION_GROUPS: dict[str, type] = {"length and portions of the run": RunOptions, "optimisation": OptimizerOptions}
MIN_WINDOW = 8  # tokens; less has no room for a few drafted ones

_EPILOG = """\
examples:
  saccade train medusa --target demo/target --data corpus.jsonl --out heads
  saccade train eagle3 --target org/name --self-distill prompts.jsonl --out eagle3
  saccade train RECIPE --help

Ctrl-C saves a checkpoint; the same command goes on from it. On several devices: torchrun -m training RECIPE ...
"""
_USAGE = {True: "--target MODEL [--data FILE ... | --self-distill PROMPTS]", False: "--data FILE ..."}
_METAVARS = {int: "N", float: "X", str: "VALUE"}
_FIELD = re.compile(r"    (\w+): [^#]*(?:# (.*))?")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = StrictParser(
        prog="saccade train",
        description="Train a drafter for any target, or a small model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipes = parser.add_subparsers(dest="recipe", metavar="RECIPE", required=True, parser_class=StrictParser)
    parsers = {name: _add_recipe(recipes, name, kind()) for name, kind in RECIPES.items()}
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in parsers:
        parser.error(f"unknown recipe {first!r}: {nearest(first, parsers)}")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parsers[args.recipe].refuse(extra)
    return args


def _add_recipe(recipes: Any, name: str, kind: RecipeKind) -> StrictParser:
    parser: StrictParser = recipes.add_parser(
        name,
        help=kind.help,
        description=f"Train {kind.help}.",
        usage=f"saccade train {name} {_USAGE[kind.needs_target]} --out FOLDER ...",
    )
    _add_data(parser.add_argument_group("model and data"), kind)
    common = parser.add_argument_group("computing")
    common.add_argument("--seed", type=whole_from(0), default=0, metavar="N", help="(default: %(default)s)")
    common.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default)")
    help_text = "of the forward pass (default: %(default)s)"
    common.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16", help=help_text)
    common.add_argument("--checkpointing", action="store_true", help="less memory, more computing")
    common.add_argument("--restart", action="store_true", help="drop an unfinished run in --out")
    for title, options in {name: kind.options, **OPTION_GROUPS}.items():
        _add_options(parser.add_argument_group(title), options)
    return parser


def _add_data(group: Any, kind: RecipeKind) -> None:
    add = group.add_argument
    if kind.needs_target:
        add("--target", required=True, metavar="MODEL", help="folder or hub id of the target")
    text = "text files, or JSONL with text, prompt and completion, or token_ids on each line"
    add("--data", type=Path, nargs="+", metavar="FILE", help=text)
    if kind.needs_target:
        text = "the target continues these prompts (JSONL, or plain text), as data"
        add("--self-distill", type=Path, metavar="PROMPTS", help=text)
        text = "written after each prompt (default: %(default)s)"
        add("--distill-tokens", type=whole_from(1), default=256, metavar="N", help=text)
        text = "of the writing (default: %(default)s)"
        add("--distill-temperature", type=float, default=1.0, metavar="X", help=text)
        text = "as --speculate of saccade serve; changes the time of the writing only"
        add("--distill-speculate", action="append", metavar="DRAFTER", help=text)
    else:
        add("--tokenizer", metavar="FOLDER", help="default: --init's, else one is trained on the data")
        text = "of a tokenizer that is trained (default: %(default)s)"
        add("--vocab-size", type=whole_from(SMALLEST), default=8192, metavar="N", help=text)
    text = "folder of the result; checkpoints lie in it, too"
    add("--out", type=Path, required=True, metavar="FOLDER", help=text)
    text = "tokens of a training window, at most the model's context (default: %(default)s)"
    add("--window", type=whole_from(MIN_WINDOW), default=512, metavar="N", help=text)


def _add_options(group: Any, options: type) -> None:
    """A flag for each field of a dataclass: its default comes from there, its help is the remark behind the field."""
    remarks = _remarks(options)
    for field in dataclasses.fields(options):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        text = remarks.get(field.name, "").replace("%", "%%")
        if default not in (None, ""):  # else the remark says what happens without
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default: {'yes' if default is True else 'no' if default is False else shown})"
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif isinstance(default, tuple):
            kind = type(default[0])
            group.add_argument(flag, type=kind, nargs=len(default), default=default, metavar=_METAVARS[kind], help=text)
        else:
            kind = type(default) if default is not None else {"int | None": int, "float | None": float}[str(field.type)]
            group.add_argument(flag, type=kind, default=default, metavar=_METAVARS[kind], help=text)


def _remarks(options: type) -> dict[str, str]:
    """The comments behind a dataclass's fields; none where Python has no source at hand."""
    try:
        lines = inspect.getsource(options).splitlines()
    except OSError:
        return {}
    return {match[1]: match[2] or "" for line in lines if (match := _FIELD.fullmatch(line))}
