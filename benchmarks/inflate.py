"""A real and large model family, made of the demo's: the same function at the cost of another shape.

    python -m benchmarks.inflate demo/target OUT --shape 0.3b [--drafters draft,eagle3] [--dtype bfloat16]

The trained target is padded to any width, depth and vocabulary, and its drafters, which lie beside it, to the
proportions of published ones (inflate_shapes.py). The family computes what the small one computes: drafts are accepted
as in real text, while a step costs what such a model costs. How that is done: inflate_axes.py. What is written:

    OUT/target      Llama, in shards, with tokenizer; loads in Saccade, transformers and what converts from it
    OUT/draft       the same at half the width, a tenth of the target's parameters or more
    OUT/eagle3, OUT/mtp, OUT/medusa, OUT/early-exit     --speculate eagle3=OUT/eagle3 and so on
    OUT/inflate.json                    shapes, parameters, seconds

Exact up to rounding: in float64 log-probabilities agree to nine digits. Doubling head_dim scales the queries by a root
of two, which bfloat16 rounds; other matrices keep their bits. Texts longer than the small model's context (--context)
have no sense.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from benchmarks.inflate_files import parameters, refuse_full
from benchmarks.inflate_heads import HEADS
from benchmarks.inflate_model import Inflation, read_llama
from benchmarks.inflate_shapes import DRAFTS, TARGETS, Shape, draft_shape
from decoding.errors import ConfigError, ModelError, SaccadeError, nearest
from models.checkpoint import CheckpointError
from models.loader import DTYPES
from server.flags import Parser, positive

TARGET, DRAFT = "target", "draft"
DRAFTERS = (DRAFT, *HEADS)


@dataclass(frozen=True)
class Made:
    """One model of the family."""

    name: str
    folder: str
    parameters: int
    share: float  # of the target's parameters
    seconds: float


def inflate(
    source: Path,
    out: Path,
    shape: Shape,
    *,
    drafters: Sequence[str] = DRAFTERS,
    draft: Shape | None = None,
    dtype: str = "bfloat16",
    context: int | None = None,
    seed: int = 0,
) -> list[Made]:
    """Write a family.

    Args:
        source: folder of the small target; those of the drafters lie beside it under their names.
        draft: shape of the draft model; default: ``draft_shape``.
        context: positions, where they are to be more than the small model's.

    Returns:
        what was made, the target first.

    Raises:
        ModelError: a model that is missing, cannot be read or is of a kind that cannot be inflated.
        ConfigError: an unknown drafter or dtype, a shape that cannot hold the model, a folder that is taken or full.
    """
    for name in drafters:
        if name not in DRAFTERS:
            raise ConfigError(f"unknown drafter {name!r}: {nearest(name, DRAFTERS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: {nearest(dtype, DTYPES)}")
    for name in (TARGET, *drafters):
        refuse_full(out / name)

    def inflation(folder: Path, wanted: Shape) -> Inflation:
        return Inflation(folder, wanted, dtype=DTYPES[dtype], context=context, seed=seed)

    made: list[Made] = []
    target = inflation(source, shape)
    try:
        for name in (TARGET, *drafters):
            started, beside = time.monotonic(), source.with_name(name)
            if name == TARGET:
                target.write(out / TARGET)
            elif name == DRAFT:
                small = Shape.of(read_llama(beside)[1])
                inflation(beside, draft or draft_shape(shape, small)).write(out / DRAFT)
            else:
                HEADS[name](beside, out / name, target)
            size = parameters(out / name)
            share = size / made[0].parameters if made else 1.0
            made.append(Made(name, str(out / name), size, share, time.monotonic() - started))
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}); free some space, or choose another folder") from error
    document = {"source": str(source), "dtype": dtype, "seed": seed, "shape": asdict(shape)}
    document["made"] = [asdict(one) for one in made]
    (out / "inflate.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = Parser(
        prog="python -m benchmarks.inflate",
        description="Pad a small Llama and its drafters to a large family that computes the same.",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="TARGET", help="folder of the small target, such as demo/target")
    add("out", type=Path, metavar="OUT", help="folder of the family; it must have none in it yet")
    add("--shape", default=None, metavar="NAME", help=f"one of {', '.join(TARGETS)} (default: TARGET's own)")
    listed = "made of those beside TARGET, with commas, or none (default: %(default)s)"
    add("--drafters", default=",".join(DRAFTERS), metavar="NAMES", help=listed)
    add("--dtype", default="bfloat16", choices=list(DTYPES), help="(default: %(default)s)")
    add("--context", type=positive, metavar="TOKENS", default=None, help="positions, if more than TARGET's")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    for field in fields(Shape):
        if field.name != "tied":
            add(f"--{field.name.replace('_', '-')}", type=positive, metavar="N", help="in place of the shape's")
    tied = parser.add_mutually_exclusive_group()
    tied.add_argument("--tied", dest="tied", action="store_true", help="the LM head is the embedding")
    tied.add_argument("--untied", dest="tied", action="store_false", help="the LM head is its own")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    return args


def chosen_shape(args: argparse.Namespace) -> tuple[Shape, Shape | None]:
    """Shapes of target and draft model; None: as ``draft_shape`` says.

    Raises:
        ConfigError: an unknown name.
        ModelError: the small target cannot be read.
    """
    if args.shape is not None and args.shape not in TARGETS:
        raise ConfigError(f"unknown shape {args.shape!r}: {nearest(args.shape, TARGETS)}")
    base = TARGETS[args.shape] if args.shape else Shape.of(read_llama(args.source)[1])
    changed = {field.name: getattr(args, field.name) for field in fields(Shape) if hasattr(args, field.name)}
    return replace(base, **changed), None if changed else DRAFTS.get(args.shape)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a family, say how large it is.

    Returns:
        0; 1 after an error that is the user's to mend.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    drafters = [] if args.drafters == "none" else args.drafters.split(",")
    try:
        shape, draft = chosen_shape(args)
        with torch.inference_mode():
            made = inflate(
                args.source,
                args.out,
                shape,
                drafters=drafters,
                draft=draft,
                dtype=args.dtype,
                context=args.context,
                seed=args.seed,
            )
    except SaccadeError as error:
        print(f"inflate: {error}", file=sys.stderr)
        return 1
    for one in made:
        size = f"{one.parameters / 1e6:>10,.1f} M parameters {100 * one.share:>6.1f}% {one.seconds:>7.1f} s"
        print(f"{one.name:<8}{size}   {one.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
