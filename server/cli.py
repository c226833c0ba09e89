"""The ``saccade`` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from decoding.config import EngineConfig
from decoding.errors import SaccadeError, nearest
from server.engine_driver import ENGINE
from server.flags import Parser, add_engine_flags, engine_config, nonempty, positive
from server.observation import Observation
from server.observation_flags import add_observation_flags, observation
from server.reading_flags import add_reading_flags, reading
from server.serve_flags import KEY_VARIABLE, add_limit_flags, add_security_flags, limits, security, tls

if TYPE_CHECKING:  # a wrong command line is answered before what is large is imported
    from server.settings import ServerSettings

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_MAX_TOKENS = 128

# commands beside the server: modules with a main(argv), imported (and torch with them) only when asked for
TOOLS = {
    "train": ("training.cli", "train a drafter for a target, or a small model"),
    "report": ("benchmarks.report_cli", "measure how many drafted tokens are accepted"),
    "calibrate": ("benchmarks.calibrate_cli", "build a tree of fixed shape for Medusa heads"),
    "bench": ("benchmarks.load.cli", "measure any server of OpenAI's API under load, or two side by side"),
    "datastore": ("server.datastore", "build the corpus that the retrieval drafter copies from"),
    "ray": ("server.ray.launch", "serve replicas of a model behind one address, with Ray Serve"),
}

_EXAMPLES = """\
examples:
  saccade serve demo/target --speculate draft=demo/draft --speculate ngram
  saccade generate demo/target --prompt "def fib(n):" --speculate ngram --seed 7

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"prompt": "def fib(n):", "max_tokens": 64, "stream": true}'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, or 1 after an error that is the user's to mend; argparse ends the process with 2 for a wrong command line.
    """
    words = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        if words and words[0] in TOOLS:
            run: Callable[[Sequence[str]], int] = import_module(TOOLS[words[0]][0]).main
            return run(words[1:])
        args = parse(words)
        return run_server(args) if args.command == "serve" else _generate(args)
    except SaccadeError as error:
        print(f"saccade: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `saccade generate ... | head`: whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails, too
        return 141


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process, with a message, if it is wrong."""
    parser = Parser(
        prog="saccade",
        description="An LLM inference server in which every forward pass verifies token trees.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"saccade {version('saccade')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    parsers = {"serve": _serve_parser(commands), "generate": _generate_parser(commands)}
    parsers |= {name: commands.add_parser(name, help=text) for name, (_, text) in TOOLS.items()}
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in parsers:
        parser.error(f"unknown command {first!r}: {nearest(first, parsers)}")
    args, extra = parser.parse_known_args(argv)
    if extra:
        parsers.get(args.command, parser).refuse(extra)
    return args


def _serve_parser(commands: argparse._SubParsersAction[Parser]) -> Parser:
    parser = commands.add_parser("serve", help="serve a model over HTTP, with OpenAI's API")
    add_engine_flags(parser)
    names = "what clients call it (default: MODEL)"
    parser.add_argument("--served-model-name", nargs="+", type=nonempty, metavar="NAME", help=names)
    parser.add_argument("--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="(default: %(default)s; 0: a free one)")
    add_reading_flags(parser)
    add_limit_flags(parser)
    add_security_flags(parser)
    add_observation_flags(parser)
    return parser


def _generate_parser(commands: argparse._SubParsersAction[Parser]) -> Parser:
    parser = commands.add_parser("generate", help="continue one prompt, without a server")
    add_engine_flags(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-tokens", type=positive, default=DEFAULT_MAX_TOKENS, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="0: the likeliest token (default: the model's, else 1)")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this mass")
    parser.add_argument("--top-k", type=int, help="draw from this many tokens")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")
    return int(text)


def run_server(args: argparse.Namespace, engine: str = ENGINE) -> int:
    """``saccade serve``.

    Args:
        engine: the class that the engine process runs, as "module:class".
    """
    from server.log import own_process_log

    told = observation(args)
    own_process_log(told.log_format, told.log_level)
    try:
        _serve(args, told, engine)
    except SaccadeError as error:
        if told.log_format == "text":
            raise
        logging.getLogger("saccade").error("%s", error)
        return 1
    return 0


def _serve(args: argparse.Namespace, told: Observation, engine: str) -> None:
    from server.listening import Address
    from server.serve import serve

    config = engine_config(args)
    settings = server_settings(args, config)
    serve(config, settings, getattr(args, "chat_template", None), Address(args.host, args.port), tls(args), engine)


def server_settings(args: argparse.Namespace, config: EngineConfig) -> ServerSettings:
    """The HTTP side's settings, out of the flags of ``saccade serve`` and the environment.

    Raises:
        ConfigError: keys or origins that cannot be.
    """
    from server.settings import ServerSettings

    return ServerSettings(
        model_names=tuple(getattr(args, "served_model_name", [config.model])),
        seed=config.seed,
        rows=config.max_num_seqs,
        **reading(args),
        limits=limits(args),
        security=security(args, os.environ.get(KEY_VARIABLE)),
        observation=observation(args),
    )


def _generate(args: argparse.Namespace) -> int:
    from server.offline import Sampling, generate

    config = engine_config(args)
    wanted = {name: getattr(args, name, None) for name in ("temperature", "top_p", "top_k", "seed")}
    report = generate(config, args.prompt, Sampling(max_tokens=args.max_tokens, **wanted))
    print(report, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
