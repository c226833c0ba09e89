"""``saccade train``: data, recipe, trainer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decoding.assemble import resolve_device
from decoding.errors import ModelError
from decoding.text import Tokenizer
from models.families import NATIVE_FAMILIES, supports_natively
from models.loader import CheckpointError, read_config, resolve
from training import distributed
from training.arguments import OPTION_GROUPS, PRECISIONS, parse
from training.capture import check_window
from training.checkpoint import STATE_FILE, forget_state
from training.data import Corpus, WindowSampler, read_documents
from training.errors import TrainError
from training.history import History
from training.recipe import RecipeKind, TrainContext
from training.recipes import RECIPES
from training.trainer import Trainer

logger = logging.getLogger("saccade.train")


def main(argv: Sequence[str]) -> int:
    """``saccade train``, from the words after it.

    Raises:
        SaccadeError: naming what is wrong and how to mend it.
    """
    args = parse(argv)
    logger.setLevel(logging.INFO)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Train as the command line says."""
    kind = RECIPES[args.recipe]()
    device = distributed.start(resolve_device(args.device))
    try:
        history = _train(args, kind, device)
        distributed.settle()
    finally:
        distributed.stop()
    logger.info("%s", ", ".join(f"{name} {value:.4f}" for name, value in history.last().items()))
    logger.info("written to %s", args.out)
    return 0


def _train(args: argparse.Namespace, kind: RecipeKind, device: torch.device) -> History:
    with distributed.main_first():
        _make_folder(args.out)
        _forget_unfinished(args)
    trainer = _prepare(args, kind, device)
    if trainer.resume(_fingerprint(args)):
        logger.info("going on from step %d", trainer.position.step)
    return _run(trainer)


def _run(trainer: Trainer) -> History:
    try:
        return trainer.run()
    except KeyboardInterrupt:
        logger.info("interrupted at step %d; the same command goes on from there", trainer.position.step)
        raise


def _prepare(args: argparse.Namespace, kind: RecipeKind, device: torch.device) -> Trainer:
    options, run_options, optimizer = (_picked(args, group) for group in (kind.options, *OPTION_GROUPS.values()))
    target = _target_folder(args.target, args.window) if kind.needs_target else None
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


def _target_folder(model: str, window: int) -> Path:
    """The target's folder, after what can be known before its weights are read and its text is written."""
    try:
        folder = resolve(model)
        hf = read_config(folder)
        native = NATIVE_FAMILIES[str(hf["model_type"])].configure(hf) if supports_natively(hf) else None
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    except (KeyError, TypeError, ValueError):  # the loader says what is wrong with it
        return folder
    if native is not None:
        check_window(window, native.max_len)
    return folder


def _tokenizer_folder(args: argparse.Namespace) -> Path:
    if args.tokenizer or args.init:
        return Path(args.tokenizer or args.init)
    folder: Path = args.out / ".train" / "tokenizer"
    # that of an unfinished run, whose options must be the same; another one would be of other data
    mine = (folder.parent / STATE_FILE).is_file() or not distributed.is_main()
    if not (mine and (folder / "tokenizer.json").is_file()):
        from training.tokenizer import train_tokenizer

        train_tokenizer(read_documents(_data_files(args, RECIPES[args.recipe]())), args.vocab_size, folder)
    return folder


def _make_folder(out: Path) -> None:
    """Make sure that the result can be written before hours are spent on it."""
    if out.exists() and not out.is_dir():
        raise TrainError(f"--out {out} is a file; give a folder")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise TrainError(f"--out {out} cannot be made: {there} is not a folder that you may write to; give another one")


def _forget_unfinished(args: argparse.Namespace) -> None:
    if args.restart and distributed.is_main():
        forget_state(args.out / ".train")


def _fingerprint(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change between an interrupt and its resumption."""
    free = {"restart", "save_every", "log_every", "validate_every", "micro_batch", "steps", "minutes", "command"}
    options: dict[str, Any] = json.loads(json.dumps(vars(args), default=str))
    return {name: value for name, value in options.items() if name not in free}
