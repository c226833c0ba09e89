"""The engine process: ``python -m server.engine_process``, started by the HTTP process and ended with it.

It reads its EngineConfig as msgpack from standard input, connects to the given Unix socket, answers Ready or
LoadFailed, and then loops: messages in, one step, one message out. Its exit status is 0 after a Shutdown and after
LoadFailed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import signal
import sys
import traceback

import msgspec
import zmq

from decoding.config import EngineConfig
from decoding.errors import ConfigError
from decoding.messages import FromEngine, LoadFailed, Ready, ToEngine
from server.engine_driver import ENGINE, EngineDriver, SteppedEngine, load_engine

PARENT_CHECK_MS = 500  # how long an idle engine waits for messages before it looks whether its parent lives
_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Serve one engine until told to stop, or until the parent is gone."""
    parser = argparse.ArgumentParser(prog="server.engine_process", allow_abbrev=False)
    parser.add_argument("--address", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--engine", default=ENGINE)
    args = parser.parse_args(argv)
    end_with_parent(args.parent)
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
        """Step while there is work, else wait for messages; returns at a Shutdown or when the parent has gone."""
        driver = EngineDriver(engine, self.send, self.receive)
        driver.report()  # before Ready, so that the counters are there when the server is
        self.send(Ready(engine.info))
        while driver.drain():
            if driver.has_work:
                driver.step()
            elif not self._socket.poll(PARENT_CHECK_MS) and os.getppid() != self._parent:
                return


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere the idle loop notices), and leave
    ctrl-C to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _load(target: str, config: EngineConfig, connection: EngineConnection) -> SteppedEngine | None:
    try:
        return load_engine(target, config)
    except ConfigError as error:
        connection.send(LoadFailed(str(error)))
    except Exception as error:  # noqa: BLE001 - a process boundary: the parent tells the user
        traceback.print_exc()
        connection.send(LoadFailed(f"loading {config.model!r} failed: {type(error).__name__}: {error}"))
    return None


if __name__ == "__main__":
    sys.exit(main())
