"""The log of ``saccade serve``: lines for people, or JSON for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from server.observation import LogFormat, LogLevel, Observation
from server.request_log import REQUESTS

FIELDS = "fields"  # of a record: what its line has beside its message


class JsonFormatter(logging.Formatter):
    """One object a line, in ASCII: nothing that comes from outside can begin a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, FIELDS, {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def begin_log(observation: Observation) -> None:
    """The log of a process that is not ours from its beginning."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    set_up_log(observation.log_format, observation.log_level)


def set_up_log(form: LogFormat, level: LogLevel) -> None:
    """Give the handlers that are there their format, and our loggers their level; others warn at the least."""
    least = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("saccade").setLevel(least)
    shown = form == "json" or least <= logging.DEBUG
    logging.getLogger(REQUESTS).setLevel(least if shown else max(least, logging.WARNING))
    if form == "json":
        for handler in root.handlers:
            handler.setFormatter(JsonFormatter())
