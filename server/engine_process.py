"""The engine process: ``python -m server.engine_process``, started by the HTTP process and ended with it.

It reads its EngineConfig as msgpack from standard input, connects to the given Unix socket, answers Ready or
LoadFailed, and then loops: messages in, one step, one message out. Its exit status is 0 after a Shutdown and after
LoadFailed, 1 when the engine cannot go on.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from typing import get_args

import msgspec
import zmq

from decoding.config import EngineConfig
from decoding.errors import ConfigError, EngineDeadError
from decoding.messages import FromEngine, LoadFailed, Ready, ToEngine
from decoding.parent import end_with_parent
from server.engine_driver import ENGINE, EngineDriver, SteppedEngine, load_engine
from server.idle_memory import IdleMemory
from server.log import own_process_log
from server.observation import LogFormat, LogLevel

PARENT_CHECK_MS = 500  # how long an idle engine waits for messages before it looks who is alive

log = logging.getLogger("saccade.engine")


def main(argv: list[str] | None = None) -> int:
    """Serve one engine until told to stop, or until the parent is gone."""
    parser = argparse.ArgumentParser(prog="server.engine_process", allow_abbrev=False)
    parser.add_argument("--address", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--engine", default=ENGINE)
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="text")
    parser.add_argument("--log-level", choices=get_args(LogLevel), default="info")
    args = parser.parse_args(argv)
    end_with_parent(args.parent)
    own_process_log(args.log_format, args.log_level)
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineConfig)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.SNDHWM, 0)  # a terminal event must not wait for a busy HTTP process
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(args.address)
        connection = EngineConnection(socket, args.parent)
        engine = _load(args.engine, config, connection)
        if engine is None:
            return 0
        gc.collect()
        gc.freeze()  # what is loaded stays: looking through it again would stall a step by a millisecond
        try:
            connection.serve(engine)
        except EngineDeadError as error:
            log.error("the engine ends: %s", error)
            return 1
        finally:
            engine.close()
    return 0


class EngineConnection:
    """The engine's end of the socket: Ready first, then a message a step."""

    def __init__(self, socket: zmq.Socket[bytes], parent: int) -> None:
        self._socket = socket
        self._parent = parent
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self) -> ToEngine | None:
        """The next message that is there; None: there is none."""
        return self._decoder.decode(self._socket.recv()) if self._socket.poll(0) else None

    def serve(self, engine: SteppedEngine) -> None:
        """Step while there is work, else wait for messages; returns at a Shutdown or when the parent has gone.

        Raises:
            EngineDeadError: the engine cannot go on.
        """
        driver = EngineDriver(engine, self.send, self.receive)
        memory = IdleMemory()
        driver.report()  # before Ready, so that the counters are there when the server is
        self.send(Ready(engine.info))
        while driver.drain():
            if driver.has_work:
                driver.step()
            elif not self._socket.poll(PARENT_CHECK_MS):
                if os.getppid() != self._parent:
                    return
                engine.check_health()
                if memory.is_worth_it:
                    memory.give_back()


def _load(target: str, config: EngineConfig, connection: EngineConnection) -> SteppedEngine | None:
    try:
        return load_engine(target, config)
    except ConfigError as error:
        connection.send(LoadFailed(str(error)))
    except Exception as error:  # a process boundary: the parent tells the user
        log.exception("loading failed")
        connection.send(LoadFailed(f"loading {config.model!r} failed: {type(error).__name__}: {error}"))
    return None


if __name__ == "__main__":
    sys.exit(main())
