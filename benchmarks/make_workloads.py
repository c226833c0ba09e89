"""Makes benchmarks/workloads from this repository's own sources and pages, as they were at one commit.

    python -m benchmarks.make_workloads [--out benchmarks/workloads]

No model of the demo family has seen them: it was trained on installed packages, and this is none of them. Files are
read from git, so that what is made does not change when they do; the same commit gives the same bytes.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.command import carried_out
from benchmarks.provenance import ROOT
from benchmarks.workload_files import FOLDER
from benchmarks.workload_texts import (
    Line,
    agentic_repetition,
    code_editing,
    page_passages,
    retrieval_answers,
    source_chunks,
)
from decoding.errors import ConfigError
from server.flags import Parser

COMMIT = "8fedd58ed799c794dba19c5c1dd50336a4e4fdc5"
FROM = ("decoding", "docs", "models", "server", "training", "README.md")
EDITS, SESSIONS, QUESTIONS = 16, 5, 16


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; returns the exit status."""
    description = "Make the workloads of the drafters' table."
    parser = Parser(prog="python -m benchmarks.make_workloads", description=description)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="(default: %(default)s)")
    args, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if extra:
        parser.refuse(extra)
    return carried_out("make-workloads", lambda: write(made_of(sources(ROOT, COMMIT)), args.out))


def sources(root: Path, commit: str) -> dict[str, str]:
    """path -> text of the Python files and pages of a commit.

    Raises:
        ConfigError: no git, or the checkout does not have the commit.
    """
    command = ["git", "-C", str(root), "archive", "--format=tar", commit, "--", *FROM]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        raise ConfigError("the workloads are made of files in git, and there is no git; install it") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise ConfigError(
            f"{root} has no commit {commit} to make workloads of ({said}); fetch it: git fetch --unshallow"
        ) from None
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith((".py", ".md")) else None
            if file is not None:
                texts[member.name] = file.read().decode()
    return texts


def made_of(texts: Mapping[str, str]) -> dict[str, list[Line]]:
    """All workloads by their names."""
    chunks = list(source_chunks({path: text for path, text in texts.items() if path.endswith(".py")}))
    passages = list(page_passages({path: text for path, text in texts.items() if path.endswith(".md")}))
    return {
        "code-editing": code_editing(chunks, EDITS),
        "agentic-repetition": agentic_repetition(chunks, SESSIONS),
        "retrieval-answers": retrieval_answers(passages, QUESTIONS),
    }


def write(workloads: Mapping[str, Sequence[Line]], folder: Path) -> None:
    """A JSONL file for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in workloads.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} requests, {len(text.encode())} bytes")


if __name__ == "__main__":
    sys.exit(main())
