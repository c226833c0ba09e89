"""The page that tells what was measured under JSON schemas.

    python -m benchmarks.structured_page benchmarks/results/structured-demo.json ... [--out PAGE]

Takes the results of ``benchmarks.structured`` and replaces what stands between two marks of the page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import documents, structured
from benchmarks.command import carried_out
from benchmarks.pages import Marks, indented, sources
from benchmarks.structured_tables import structured_text
from decoding.errors import ConfigError
from server.flags import Parser

PAGE = Path("docs/structured-output-measured.md")
MARKS = Marks("<!-- measured: written by make bench-structured -->", "<!-- measured: end -->")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.structured_page", description="Write measurements into their page.")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what benchmarks.structured wrote")
    parser.add_argument("--out", type=Path, default=PAGE, help="(default: %(default)s)")
    args, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if extra:
        parser.refuse(extra)
    return carried_out("structured-page", lambda: write(args.results, args.out))


def write(results: Sequence[Path], page: Path) -> None:
    """Read results and page, and write the page.

    Raises:
        ConfigError: a file that holds no such result, a page without the marks.
    """
    merged = documents.merge([documents.load(path) for path in results])
    if set(merged) != {structured.KIND}:
        raise ConfigError(f"these are no results for this page ({', '.join(merged)}); give those of {structured.KIND}")
    document = merged[structured.KIND]
    text = "\n\n".join(
        [indented(structured_text(document.pieces)), "Where the numbers come from:", *sources([document])]
    )
    MARKS.write(page, text)


if __name__ == "__main__":
    sys.exit(main())
