"""Results on disk: a JSON document that is written again after every piece, whole or not at all.

    {"kind": "matrix", "sessions": [provenance, ...], "cells": [{"session": 0, ...}, ...]}

A session is one run of a command; a document may hold several (``--resume``), and every piece says which made it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoding.errors import ConfigError

RESULTS = Path("benchmarks/results")


@dataclass
class Document:
    """What one or several sessions of a command measured. ``pieces`` are its cells, or whatever its kind calls them."""

    kind: str
    sessions: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Replace the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"kind": self.kind, "sessions": self.sessions, "pieces": self.pieces}
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, path)


def load(path: Path) -> Document:
    """Read one.

    Raises:
        ConfigError: no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Document(content["kind"], content["sessions"], content["pieces"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a result that a benchmark wrote") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} holds no result of these benchmarks; give a file that one of them wrote") from None


def merge(documents: Sequence[Document]) -> dict[str, Document]:
    """By kind; sessions are numbered anew, pieces keep pointing to theirs."""
    merged: dict[str, Document] = {}
    for document in documents:
        whole = merged.setdefault(document.kind, Document(document.kind))
        offset = len(whole.sessions)
        whole.sessions += document.sessions
        whole.pieces += [{**piece, "session": piece["session"] + offset} for piece in document.pieces]
    return merged
