"""``saccade train``: flags from the recipe's options, then data, recipe, trainer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decoding.errors import ModelError
from decoding.text import Tokenizer
from training import distributed
from training.checkpoint import forget_state
from training.data import Corpus, WindowSampler, read_documents
from training.errors import TrainError
from training.optim import OptimizerOptions
from training.recipe import RecipeKind, TrainContext
from training.recipes import RECIPES
from training.trainer import RunOptions, Trainer

logger = logging.getLogger("saccade.train")

PRECISIONS = {"bf16": torch.bfloat16, "fp32": None}
OPTION_GROUPS: tuple[type, ...] = (RunOptions, OptimizerOptions)


def main(argv: Sequence[str]) -> int:
    """``saccade train``, from the words after it.

    Raises:
        SaccadeError: naming what is wrong and how to mend it.
    """
    parser = argparse.ArgumentParser(
        prog="saccade train",
        description="Train a drafter for any target, or a small model. On several devices: torchrun -m training ...",
        allow_abbrev=False,
    )
    recipes = parser.add_subparsers(dest="recipe", metavar="RECIPE", required=True)
    for name, kind in RECIPES.items():
        _add_recipe(recipes.add_parser(name, help=kind().help, allow_abbrev=False), kind())
    logger.setLevel(logging.INFO)
    return run(parser.parse_args(argv))


def _add_recipe(parser: argparse.ArgumentParser, kind: RecipeKind) -> None:
    if kind.needs_target:
        parser.add_argument("--target", required=True, metavar="MODEL", help="folder or hub id of the target")
        parser.add_argument(
            "--self-distill", type=Path, metavar="PROMPTS", help="the target continues these prompts (JSONL), as data"
        )
        parser.add_argument("--distill-tokens", type=int, default=256, help="written after each prompt")
        parser.add_argument("--distill-temperature", type=float, default=1.0)
        parser.add_argument(
            "--distill-speculate", action="append", metavar="DRAFTER", help="as --speculate; changes the time only"
        )
    else:
        parser.add_argument("--tokenizer", metavar="FOLDER", help="default: --init's, else one is trained on the data")
        parser.add_argument("--vocab-size", type=int, default=8192, help="of a tokenizer that is trained")
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text files, or JSONL with text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result; checkpoints lie in it, too")
    parser.add_argument("--window", type=int, default=512, help="tokens of a training window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16", help="of the forward pass")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more computing")
    parser.add_argument("--restart", action="store_true", help="drop an unfinished run in --out")
    for group in (kind.options, *OPTION_GROUPS):
        _add_options(parser.add_argument_group(group.__name__), group)


def _add_options(group: Any, options: type) -> None:
    """A flag for each field of a dataclass; its default comes from there."""
    for field in dataclasses.fields(options):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        elif isinstance(default, tuple):
            group.add_argument(flag, type=type(default[0]), nargs=len(default), default=default)
        else:
            kind = type(default) if default is not None else {"int | None": int, "float | None": float}[str(field.type)]
            group.add_argument(flag, type=kind, default=default, help=f"(default: {default})")


def run(args: argparse.Namespace) -> int:
    """Train as the command line says."""
    kind = RECIPES[args.recipe]()
    device = distributed.start(_device(args.device))
    try:
        with distributed.main_first():
            _forget_unfinished(args)
        trainer = _prepare(args, kind, device)
        if trainer.resume(_fingerprint(args)):
            logger.info("going on from step %d", trainer.position.step)
        history = trainer.run()
    finally:
        distributed.stop()
    logger.info("%s", ", ".join(f"{name} {value:.4f}" for name, value in history.last().items()))
    logger.info("written to %s", args.out)
    return 0


def _prepare(args: argparse.Namespace, kind: RecipeKind, device: torch.device) -> Trainer:
    options, run_options, optimizer = (_picked(args, group) for group in (kind.options, *OPTION_GROUPS))
    _check_folder(args.out)
    target = _target_folder(args.target) if kind.needs_target else None
    with distributed.main_first():
        tokenizer_folder = target or _tokenizer_folder(args)
        files = _data_files(args, kind)
    tokenizer = Tokenizer.load(tokenizer_folder)
    corpus = Corpus.build(read_documents(files), tokenizer, tokenizer.eos_token_id, tokenizer.vocab_size)
    sampler = WindowSampler(corpus, args.window, run_options.batch, args.seed)
    logger.info(
        "%d tokens, %d steps an epoch of %d x %d tokens",
        len(corpus.tokens),
        sampler.steps_per_epoch,
        run_options.batch,
        args.window,
    )
    autocast = PRECISIONS[args.precision]
    context = TrainContext(
        target=target,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        device=device,
        autocast=autocast,
        window=args.window,
        seed=args.seed,
        corpus=corpus.tokens,
        checkpointing=args.checkpointing,
    )
    torch.manual_seed(args.seed)
    return Trainer(kind.build(options, context), sampler, run_options, optimizer, args.out, device, autocast)


def _picked(args: argparse.Namespace, options: type) -> Any:
    return options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(options)})


def _data_files(args: argparse.Namespace, kind: RecipeKind) -> list[Path]:
    files = list(args.data or [])
    if kind.needs_target and args.self_distill is not None:
        from training.self_distill import distill

        files.append(
            distill(
                args.target,
                args.self_distill,
                args.out / ".train" / "self_distilled.jsonl",
                max_tokens=args.distill_tokens,
                temperature=args.distill_temperature,
                seed=args.seed,
                speculate=tuple(args.distill_speculate or ()),
                device=args.device,
            )
        )
    if not files:
        raise TrainError("there is nothing to train on: give --data, or --self-distill for a drafter")
    return files


def _target_folder(model: str) -> Path:
    from models.loader import CheckpointError, resolve

    try:
        return resolve(model)
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def _tokenizer_folder(args: argparse.Namespace) -> Path:
    if args.tokenizer or args.init:
        return Path(args.tokenizer or args.init)
    folder: Path = args.out / ".train" / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        from training.tokenizer import train_tokenizer

        train_tokenizer(read_documents(_data_files(args, RECIPES[args.recipe]())), args.vocab_size, folder)
    return folder


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise TrainError(f"unknown device {name!r}; use cpu, cuda, cuda:N or auto") from None


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise TrainError(f"--out {out} is a file; give a folder")


def _forget_unfinished(args: argparse.Namespace) -> None:
    if args.restart and distributed.is_main():
        forget_state(args.out / ".train")


def _fingerprint(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change between an interrupt and its resumption."""
    free = {"restart", "save_every", "log_every", "validate_every", "micro_batch", "steps", "minutes", "command"}
    options: dict[str, Any] = json.loads(json.dumps(vars(args), default=str))
    return {name: value for name, value in options.items() if name not in free}
