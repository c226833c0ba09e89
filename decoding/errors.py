"""Every error that Saccade raises on purpose, in one tree.

SaccadeError
  ConfigError           a flag or option that cannot work; the message names the fix
    ModelError          a checkpoint that cannot be loaded or served
  RequestError          a request that cannot be served; carries the OpenAI fields (param, code)
  EngineDeadError       the engine process ended while requests were in flight
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaccadeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(SaccadeError):
    """A setting that cannot work. The message names the cause and the fix."""


class ModelError(ConfigError):
    """A checkpoint that cannot be loaded or served."""


class RequestError(SaccadeError):
    """A request that cannot be served: the client's mistake, an HTTP 400.

    Args:
        message: one sentence or two for the person who sent the request.
        param: the request field at fault.
        code: OpenAI's machine-readable code.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class EngineDeadError(SaccadeError):
    """The engine ended; the request was not finished and can be sent again."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A half-sentence for error messages: the valid names, the one most like ``name`` first named."""
    options = list(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listed = "there are: " + ", ".join(options) if options else "there are none"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed
