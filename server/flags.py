"""The command line's flags, with vLLM's names. A flag that is not given is not in the result: defaults live
elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from typing import Any, get_args

from decoding.acceptance import Acceptance
from decoding.command_line import StrictParser, whole_from
from decoding.config import Dtype, EngineConfig

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


class Parser(StrictParser):
    """Leaves out what is not given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, **kwargs)


def size(text: str) -> int:
    """Bytes from "2GiB", "512M" or "1000000"; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 2GiB, 512M or 1000000")
    return int(float(match[1]) * _UNITS[match[2].lower()])


positive = whole_from(1)
whole = whole_from(0)


def share(text: str) -> float:
    """A number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:  # false for nan
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def seed(text: str) -> int:
    """A whole number of 64 bits, with or without a sign."""
    with contextlib.suppress(ValueError):
        if -(2**63) <= int(text) < 2**64:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 64 bits")


def nonempty(text: str) -> str:
    """A name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a name cannot be empty")
    return text


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of EngineConfig."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model, or a hub id such as org/name")
    add(
        "--speculate",
        action="append",
        metavar="DRAFTER",
        help="ngram, suffix, recycling, lookahead, prediction, retrieval=PATH, early-exit, draft=PATH, medusa=PATH, "
        "mtp=PATH, eagle=PATH or eagle3=PATH; with options after a colon. Give it several times for several drafters",
    )
    add("--tokenizer", metavar="PATH", help="folder of another tokenizer than the model's")
    add("--chat-template", metavar="TEMPLATE", help="a jinja file, or a template itself, in place of the model's")
    add("--generation-config", metavar="WHICH", help="auto: the model's defaults of sampling; vllm: neutral ones")
    add("--dtype", choices=get_args(Dtype), help="type of the weights (default: the checkpoint's)")
    add(
        "--quantization",
        metavar="FORMAT",
        help="of the weights, the drafters' too: int8 halves what a step reads, and changes the text a little (see "
        f"docs/models.md); none {_default('quantization')}",
    )
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or auto (default)")
    add("--seed", type=seed, metavar="SEED", help="seed of requests that bring none (default: a random one each)")
    add("--max-model-len", type=positive, metavar="TOKENS", help="longest context (default: the model's)")
    add("--max-num-seqs", type=positive, metavar="N", help=f"choices in one batch {_default('max_num_seqs')}")
    add(
        "--max-num-batched-tokens",
        type=positive,
        metavar="TOKENS",
        help=f"tokens of one step, tree nodes included {_default('max_num_batched_tokens')}",
    )
    nodes = f"drafted nodes of one row in a step, at most 63; 0 is plain decoding {_default('max_nodes')}"
    add("--max-nodes", type=whole, metavar="NODES", help=nodes)
    add("--max-depth", type=whole, metavar="DEPTH", help=f"depth of a tree {_default('max_depth')}")
    add(
        "--plan",
        metavar="PLAN",
        help=f"auto weighs drafts against what they cost; fixed:nodes=24,depth=8,min_probability=0.08 gives every row "
        f"the same trees {_default('plan')}",
    )
    add(
        "--acceptance",
        metavar="RULE",
        help=f"of requests that name no rule {_default('acceptance')}; typical, or with options "
        "typical:epsilon=0.09,delta=0.3,bonus=argmax, accepts more drafts and changes the text",
    )
    size_help = "memory of the K/V pool, such as 2GiB or 512M (default: 2GiB on a CPU)"
    add("--kv-cache-memory", type=size, metavar="SIZE", help=size_help)
    gpu = f"of the GPU's memory, weights included {_default('gpu_memory_utilization')}"
    add("--gpu-memory-utilization", type=share, metavar="SHARE", help=gpu)
    add("--num-pages", type=positive, metavar="PAGES", help="pages of the K/V pool, in place of a size")
    add(
        "--no-prefix-caching",
        "--no-enable-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="do not keep pages for later requests with the same beginning",
    )
    add("--attention", metavar="BACKEND", help="attention backend (default: auto)")
    eager = "no CUDA graphs: slower in small batches, but less memory and a quicker start"
    add("--enforce-eager", action="store_true", help=eager)
    ranks = f"processes that share the model's layers, each with a GPU of its own {_default('tensor_parallel_size')}"
    add("--tensor-parallel-size", "-tp", type=positive, metavar="N", help=ranks)
    ranks = f"processes that share the layers of a draft model: 1, or as many {_default('draft_tensor_parallel_size')}"
    add("--draft-tensor-parallel-size", type=positive, metavar="N", help=ranks)
    threads = "CPU threads of the engine (default: one for each core, less one for the HTTP process; within a quota)"
    add("--threads", type=positive, metavar="N", help=threads)


def _default(field: str) -> str:
    (default,) = (each.default for each in dataclasses.fields(EngineConfig) if each.name == field)
    return f"(default: {default})"


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's settings out of the flags that were given.

    Raises:
        ConfigError: --acceptance names no rule, or options that cannot be.
    """
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given["speculate"] = tuple(given.get("speculate", ()))
    config = EngineConfig(**given)
    Acceptance.parse(config.acceptance)  # a mistake in it is known before a model is loaded
    return config
