"""The log of ``saccade serve`` and of the processes that it starts: lines for people, or JSON for programs."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from server.observation import LogFormat, LogLevel

REQUESTS = "saccade.requests"  # the logger of requests' own lines
FIELDS = "fields"  # of a record: what its line has beside its message
JOIN_SECONDS = 1.0
LONGEST_LINE = 2**20  # characters of what a child writes; the rest is another line

# The id of the request that the running task answers. Lines come from libraries, too, which know of no request.
answering: ContextVar[str | None] = ContextVar("answering", default=None)


class JsonFormatter(logging.Formatter):
    """One object a line, in ASCII: nothing that comes from outside can begin a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := answering.get()) is not None:
            entry["request_id"] = request_id
        entry |= getattr(record, FIELDS, {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """Lines for people; one that is written while a request is answered names it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = answering.get()
        shown = record.message
        if request_id is not None and request_id not in shown:
            shown = f"[{request_id}] {shown}"
        return f"{record.levelname}: {shown}"


def set_up_log(form: LogFormat, level: LogLevel) -> None:
    """Give the handlers that are there their format, and our loggers their level; others warn at the least."""
    least = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("saccade").setLevel(least)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that have left, as often as they like
    shown = form == "json" or least <= logging.DEBUG
    logging.getLogger(REQUESTS).setLevel(least if shown else max(least, logging.WARNING))
    formatter = JsonFormatter() if form == "json" else TextFormatter()
    for handler in root.handlers:
        handler.setFormatter(formatter)


def own_process_log(form: LogFormat, level: LogLevel) -> None:
    """The log of a process that is ours from its beginning to its end. In JSON its warnings, and the exception that it
    dies of, are lines as well.
    """
    logging.basicConfig(stream=sys.stderr)
    set_up_log(form, level)
    if form == "json":
        logging.captureWarnings(True)
        sys.excepthook = _last_words


def _last_words(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger("saccade").critical("the process ends: %s", error, exc_info=(kind, error, traceback))


class Relay:
    """What a child process writes to its standard error, line by line, for a log of JSON.

    The child's own log is JSON already. What else comes out of it (of a library in C++, of the interpreter as it dies)
    becomes a line of the given logger.
    """

    def __init__(self, logger: str) -> None:
        self._log = logging.getLogger(logger)
        self._read_end, self._write_end = os.pipe()
        # a thread, not the event loop: a child's last words are read even when the loop has ended
        self._thread = threading.Thread(target=self._read, name=f"log of {logger}", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """What the child gets as its standard error."""
        return self._write_end

    def handed_over(self) -> None:
        """The child has it: when the child ends, so does the relay."""
        os.close(self._write_end)

    def join(self) -> None:
        """Wait for the last line of a child that has ended."""
        self._thread.join(JOIN_SECONDS)

    def _read(self) -> None:
        with os.fdopen(self._read_end, encoding="utf-8", errors="backslashreplace") as lines:
            while line := lines.readline(LONGEST_LINE):
                if _is_entry(line):
                    sys.stderr.write(line)
                    sys.stderr.flush()
                elif line.strip():
                    self._log.warning("%s", line.rstrip())


def _is_entry(line: str) -> bool:
    """Whether a line is of our log."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and {"time", "level", "logger", "message"} <= entry.keys()
