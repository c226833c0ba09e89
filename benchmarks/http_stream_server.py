"""The HTTP process that ``benchmarks.http_stream`` measures: the whole application, on one core, over a paced engine.

It prints its port when it is ready, and ends at SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from benchmarks.paced_engine import ENGINE, Pace
from decoding.text import Tokenizer
from server.app import build_app
from server.listening import Address, listen
from server.serve import exempt_from_collection, http_server
from server.settings import ServerSettings
from server.socket_client import SocketEngineClient
from server.supervisor import Supervisor


async def run(pace: Pace, tokenizer: Tokenizer) -> None:
    """Serve until SIGTERM, as ``server.serve`` does."""
    engine = Supervisor(lambda: SocketEngineClient(pace.config(), engine=ENGINE))
    await engine.start()
    try:
        settings = ServerSettings(("paced",))
        with listen(Address("127.0.0.1", 0), settings.limits.write_timeout) as listener:
            server = http_server(build_app(engine, tokenizer, settings), settings.limits)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(server, "should_exit", True))
            exempt_from_collection()
            print(listener.getsockname()[1], flush=True)
            await server.serve(sockets=[listener])
    finally:
        await engine.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.http_stream_server", allow_abbrev=False)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--pace", required=True, help="a Pace in JSON")
    parser.add_argument("--profile", help="file for cProfile's statistics")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, {args.core})
    pace = msgspec.json.decode(args.pace, type=Pace)
    tokenizer = Tokenizer.load(args.tokenizer)
    _run(lambda: run(pace, tokenizer), args.profile)
    return 0


def _run(serve: Callable[[], Coroutine[Any, Any, None]], profile: str | None) -> None:
    if profile is None:
        asyncio.run(serve())
        return
    with cProfile.Profile() as profiler:
        asyncio.run(serve())
    profiler.dump_stats(profile)


if __name__ == "__main__":
    sys.exit(main())
