"""The process that measures: threads are decided before torch is imported, as the server decides them."""

from __future__ import annotations

import os
import sys

from decoding.config import EngineConfig
from server.engine_launch import engine_environment


def begin_again(threads: int) -> None:
    """Start this very command anew where the environment lacks what OpenMP reads when torch is imported."""
    environment = engine_environment(EngineConfig("", threads=threads), os.environ)
    if environment != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, environment)
