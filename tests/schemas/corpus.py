"""The corpus: 300 schemas in one file, which the families write.

python -m tests.schemas.corpus      # writes tests/schemas/schemas.jsonl anew
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tests.schemas import combinations, containers, documents, references, scalars
from tests.schemas.case import Case

FILE = Path(__file__).with_name("schemas.jsonl")
SIZE = 300


def written() -> Iterator[Case]:
    """What the families say, in growing difficulty."""
    for family in (scalars, containers, references, combinations, documents):
        yield from family.cases()


def lines() -> list[str]:
    return [json.dumps(asdict(case)) for case in written()]


def load() -> list[Case]:
    """The corpus as the file has it."""
    return [Case(**json.loads(line)) for line in FILE.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
