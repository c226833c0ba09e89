"""``saccade bench``: its flags, with vLLM's names where it has them, and what they make."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from benchmarks.load.flags import add_flags
from benchmarks.load.prompts import Prompt, Synthetic, approximate_tokens, read_prompts, synthetic_prompts
from benchmarks.load.settings import Extent, Goal, Load, NoServerError, Sampling, Server
from decoding.command_line import StrictParser
from decoding.errors import ConfigError

if TYPE_CHECKING:
    from decoding.text import Tokenizer

_EPILOG = """\
examples:
  saccade bench --concurrency 1 4 16 --num-prompts 64 --html report.html
  saccade bench --request-rate 2 4 8 --duration 30 --goodput ttft:500 tpot:50
  saccade bench --vs http://127.0.0.1:8080 --concurrency 4 --dataset-path benchmarks/workloads/code-editing.jsonl \\
      --ignore-eos --html side-by-side.html
"""
KEY_VARIABLE = "OPENAI_API_KEY"
DEFAULT_ROUNDS = 6  # with two servers
_OURS = (
    "model",
    "prompt",
    "messages",
    "stream",
    "stream_options",
    "n",
    "best_of",
    "max_tokens",
    "max_completion_tokens",
)


def main(argv: Sequence[str]) -> int:
    """Run ``saccade bench WORDS``.

    Returns:
        0; 1 when no request of a server under a load succeeded; 2 when nobody answers.

    Raises:
        SaccadeError: something else that is the user's to mend.
    """
    logging.getLogger("saccade").setLevel(logging.INFO)
    args = parse(argv)
    try:
        return run(args, argv)
    except NoServerError as error:
        print(f"saccade bench: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = StrictParser(
        prog="saccade bench",
        description="Measure any server of OpenAI's API under load, or two of them side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    args, extra = parser.parse_known_args(argv)
    if extra:
        parser.refuse(extra)
    _check(parser, args)
    return args


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure, and write what was asked for."""
    from benchmarks.load.experiment import Plan, measure
    from benchmarks.load.recount import recounted
    from benchmarks.load.results import as_json, result_of
    from benchmarks.load.table import text_table
    from server.listening import allow_many_connections

    if args.html is not None:
        from benchmarks.figures import require

        require()
    for path in (args.output, args.html):
        _check_writable(path)
    sampling = Sampling(args.endpoint, args.temperature, args.seed, args.ignore_eos)
    tokenizer = None if args.tokenizer is None else _tokenizer(args.tokenizer)
    plan = Plan(servers(args), loads(args), tuple(prompts(args, tokenizer)), sampling, extent(args))
    allow_many_connections()  # the usual limit of descriptors is below what an open loop may need
    measured = asyncio.run(measure(plan, False if args.no_progress else None))
    if tokenizer is not None:
        measured = recounted(measured, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    result = result_of(plan, measured, Goal(**dict(args.goodput)), argv)
    print(text_table(result))
    if args.output is not None:
        args.output.write_text(json.dumps(as_json(result), indent=1) + "\n", encoding="utf-8")
    if args.html is not None:
        from benchmarks.load.page import html_page

        args.html.write_text(html_page(result), encoding="utf-8")
    return 0 if all(summary.succeeded for summary in result.summaries) else 1


def servers(args: argparse.Namespace) -> tuple[Server, ...]:
    """Whom the command line names.

    Raises:
        ConfigError: an address or name that cannot be.
    """
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    label = args.label or ("server" if args.vs is None else "A")
    first = Server(label, "--base-url", _address(args.base_url), args.model or "", key, args.extra_body)
    if args.vs is None:
        return (first,)
    # a key of the environment or of the first server is not for another one to see
    extra = args.extra_body | args.vs_extra_body
    second = Server(args.vs_label or "B", "--vs", _address(args.vs), args.vs_model or "", args.vs_api_key, extra)
    if first.label == second.label:
        raise ConfigError(f"both servers are called {first.label!r}; give them two names with --label and --vs-label")
    return first, second


def _address(url: str) -> str:
    """Without a slash or /v1 at its end, as both forms are usual.

    Raises:
        ConfigError: it is none.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no address ({error}); write it as http://127.0.0.1:8000") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        raise ConfigError(f"{url!r} is no address; write it as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def loads(args: argparse.Namespace) -> tuple[Load, ...]:
    """The sweep: closed loops, then open ones."""
    closed = [Load(concurrency=each) for each in args.concurrency or ([] if args.request_rate else [1])]
    opened = [
        Load(
            rate=rate,
            arrival=args.arrival,
            burstiness=args.burstiness,
            burst_size=args.burst_size,
            max_concurrency=args.max_concurrency,
        )
        for rate in args.request_rate
    ]
    return (*closed, *opened)


def extent(args: argparse.Namespace) -> Extent:
    rounds = args.rounds or (1 if args.vs is None else DEFAULT_ROUNDS)
    return Extent(args.num_prompts, args.duration, rounds, args.num_warmups, args.timeout, not args.no_keep_alive)


def prompts(args: argparse.Namespace, tokenizer: Tokenizer | None = None) -> list[Prompt]:
    """What is sent.

    Raises:
        ConfigError: a file that cannot be read, or chats for an endpoint that takes none.
    """
    found = _read(args, tokenizer)
    if args.endpoint != "chat" and any(prompt.messages for prompt in found):
        raise ConfigError(f"{args.dataset_path} has messages, which completions do not take; add --endpoint chat")
    if tokenizer is not None and args.token_ids:
        return [replace(prompt, ids=tuple(tokenizer.encode(prompt.text))) for prompt in found]
    return found


def _read(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[Prompt]:
    def encode(text: str) -> list[int]:
        assert tokenizer is not None
        return tokenizer.encode(text, add_special_tokens=False)

    if args.dataset_path is not None:
        count = approximate_tokens if tokenizer is None else lambda text: len(encode(text))
        return read_prompts(args.dataset_path, args.output_len, args.random_output_len, count)
    shape = Synthetic(args.random_input_len, args.random_output_len, args.random_range_ratio, args.random_prefix_len)
    cut = None if tokenizer is None else lambda text, tokens: tokenizer.decode(encode(text)[:tokens])
    number = args.num_prompts * len(loads(args)) + args.num_warmups  # so that no load finds prompts in a cache
    return synthetic_prompts(shape, number, args.seed, cut)


def _tokenizer(name: str) -> Tokenizer:
    from decoding.config import EngineConfig
    from decoding.text import Tokenizer
    from server.model_folder import tokenizer_folder

    return Tokenizer.load(tokenizer_folder(EngineConfig(name, tokenizer=name)))


def _check(parser: StrictParser, args: argparse.Namespace) -> None:
    """What flags mean together; ends the process, with a message, if that cannot be."""
    rounds = extent(args).rounds
    if args.duration is None and args.num_prompts < rounds:
        parser.error(
            f"--num-prompts {args.num_prompts} is fewer than the {rounds} rounds; give more, or fewer --rounds"
        )
    most = max(args.concurrency, default=0)
    if args.duration is None and args.num_prompts // rounds < most:  # the load would not be what it is called
        each = f"{args.num_prompts // rounds} requests a round" if rounds > 1 else f"{args.num_prompts} requests"
        parser.error(f"{each} are fewer than --concurrency {most}; give --num-prompts {most * rounds} or more")
    if args.duration is not None and math.inf in args.request_rate:
        parser.error("--request-rate inf sends without end under --duration; give a rate, or --num-prompts")
    if args.vs is None and (args.vs_model or args.vs_api_key or args.vs_label or args.vs_extra_body):
        parser.error("the flags --vs-... are of a second server; name it with --vs URL")
    if args.token_ids and (args.tokenizer is None or args.endpoint == "chat"):
        parser.error("--token-ids needs --tokenizer, and --endpoint completions")
    reserved = [name for name in {**args.extra_body, **args.vs_extra_body} if name in _OURS]
    if reserved:
        parser.error(f"--extra-body: {reserved[0]} is set by other flags, or cannot be measured; leave it out")
    if not args.request_rate and (args.max_concurrency or args.arrival != "poisson" or args.burstiness != 1.0):
        parser.error("--arrival, --burstiness and --max-concurrency are of an open loop; give its --request-rate")
    if args.arrival != "poisson" and args.burstiness != 1.0:
        parser.error("--burstiness is of --arrival poisson")


def _check_writable(path: Path | None) -> None:
    """Known before an hour of measuring, not after it.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(path.open("a", encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name a file in a folder that is there") from error
