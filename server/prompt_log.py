"""Prompts in the log, for who asked for them with --log-prompts: nobody's prompts are logged otherwise."""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.types import Scope

MAX_LOGGED_CHARS = 1000

log = logging.getLogger("saccade")


def log_prompt(scope: Scope, body: dict[str, Any]) -> None:
    """One line of JSON in ASCII, cut: what a client sends can neither begin a line of its own nor fill the disk."""
    asked = json.dumps({name: body[name] for name in ("prompt", "messages", "input") if name in body})
    shown = asked if len(asked) <= MAX_LOGGED_CHARS else asked[:MAX_LOGGED_CHARS] + "…"
    log.info("prompt    %s %s %s", scope["state"]["request_id"], scope["path"], shown)
