"""Writes tasks/documents.jsonl, the documents of lm_eval's tasks, out of demo/prompts.jsonl.

    python -m tests.clients.make_documents

The prompts are cut from files that no demo model was trained on. Each document's context ends before one of a
prompt's lines; that line is the answer, and lines of other documents are the wrong ones. A few documents are what goes
wrong most easily: no context at all, text beyond ASCII, a context that ends in spaces.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.clients.judge import ROOT

OUT = Path(__file__).with_name("tasks") / "documents.jsonl"
WRONG = 3
MIN_LINE = 12  # characters of a line that is worth guessing
SHARE = 0.6  # of a prompt that is context, about
CONTEXT_CHARS = 1600  # so that no context is cut that is to be gone on with

CORNERS = [
    {"context": "", "target": "import os"},
    {"context": "", "target": '"""Tests."""'},
    {"context": "# Größe – 漢字 🙂\nname = ", "target": '"naïve — café 🙂"'},
    {"context": "def area(self):\n    ", "target": "return self.width * self.height"},
    {"context": "x = [1, 2,  ", "target": "3, 4]"},
]


def cut(text: str) -> dict[str, str] | None:
    """A context and the line behind it; None for a text that has no good one."""
    lines = text[:CONTEXT_CHARS].splitlines(keepends=True)[:-1]
    for place in range(int(len(lines) * SHARE), len(lines)):
        line = lines[place].rstrip("\n")
        if place and len(line.strip()) >= MIN_LINE:
            indent = len(line) - len(line.lstrip())
            return {"context": "".join(lines[:place]) + line[:indent], "target": line[indent:]}
    return None


def _lines() -> list[str]:
    return (ROOT / "demo/prompts.jsonl").read_text(encoding="utf-8").splitlines()[::2]


def documents() -> Iterator[dict[str, Any]]:
    prompts = [json.loads(line)["prompt"] for line in _lines()]
    found = [{**document, "text": prompt} for prompt in prompts if (document := cut(prompt)) is not None]
    found += [{**corner, "text": corner["context"] + corner["target"]} for corner in CORNERS]
    targets = list(dict.fromkeys(document["target"] for document in found))
    for number, document in enumerate(found):
        own = targets.index(document["target"])
        wrong = [targets[(own + 7 * step) % len(targets)] for step in range(1, WRONG + 1)]
        answer = number % (WRONG + 1)
        choices = [*wrong[:answer], document["target"], *wrong[answer:]]
        yield {**document, "choices": choices, "answer": answer}


def main() -> int:
    """Write the file anew."""
    made = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents())
    OUT.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
