"""What was measured of drafters without training, written into their page.

    python -m benchmarks.drafters_page benchmarks/results/drafters-demo.json ... [--out PAGE]

Takes the results of ``drafters``, ``idle_cost`` and ``store_bounds``, and replaces what stands between two marks of the
page; people write the rest of it. What is not among the results is named as not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import documents, drafters, idle_cost, store_bounds
from benchmarks.command import carried_out
from benchmarks.documents import Document
from benchmarks.drafters_tables import drafters_text, idle_text, stores_text
from benchmarks.pages import Marks, indented, sources
from decoding.errors import ConfigError
from server.flags import Parser

PAGE = Path("docs/drafters-without-training.md")
MARKS = Marks("<!-- measured: written by make bench-drafters -->", "<!-- measured: end -->")


@dataclass(frozen=True)
class Part:
    """A kind of result: its heading, its command, its tables."""

    heading: str
    command: str
    text: Callable[[Sequence[dict[str, Any]]], str]


PARTS: Mapping[str, Part] = {
    drafters.KIND: Part("On texts that repeat", "python -m benchmarks.drafters", drafters_text),
    idle_cost.KIND: Part("On texts that never repeat", "python -m benchmarks.idle_cost", idle_text),
    store_bounds.KIND: Part("Memory, and time to update and match", "python -m benchmarks.store_bounds", stores_text),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.drafters_page", description="Write measurements into a page.")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what the benchmarks wrote")
    parser.add_argument("--out", type=Path, default=PAGE, help="(default: %(default)s)")
    args, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if extra:
        parser.refuse(extra)
    return carried_out("drafters-page", lambda: write(args.results, args.out))


def write(results: Sequence[Path], page: Path) -> None:
    """Read results and page, and write the page.

    Raises:
        ConfigError: a file that holds no such result, a page without the marks.
    """
    merged = documents.merge([documents.load(path) for path in results])
    if strange := sorted(set(merged) - set(PARTS)):
        raise ConfigError(f"{strange[0]} is no result for this page; give those of: {', '.join(PARTS)}")
    MARKS.write(page, measured(merged))


def measured(merged: Mapping[str, Document]) -> str:
    """All tables, and where they come from."""
    parts = []
    for kind, part in PARTS.items():
        document = merged.get(kind)
        found = indented(part.text(document.pieces)) if document and document.pieces else None
        parts.append(f"### {part.heading}\n\n{found or f'Not measured (`{part.command}`).'}")
    return "\n\n".join([*parts, "### Where the numbers come from", *sources(merged.values())])


if __name__ == "__main__":
    sys.exit(main())
