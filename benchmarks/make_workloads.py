"""Makes benchmarks/workloads from this repository's own sources and pages, as they were at one commit.

    python -m benchmarks.make_workloads [--out benchmarks/workloads] [--all]

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
    passages_of,
    retrieval_answers,
    source_chunks,
)
from decoding.errors import ConfigError
from server.flags import Parser

COMMIT = "8fedd58ed799c794dba19c5c1dd50336a4e4fdc5"
FROM = ("decoding", "docs", "models", "server", "training", "README.md")
# chosen among all that the functions of workload_texts.py make: the demo target goes on with these by copying
EDITS = (
    "decoding/chat.py:_to_json",
    "decoding/costs.py:DraftPrice",
    "decoding/drafters/static_tree.py:expected_tokens",
    "decoding/proposal_ops.py:_paths",
    "decoding/verify/__init__.py:verify",
    "decoding/verify/by_request.py:_where",
    "decoding/verify/exact.py:follow",
    "models/checkpoint.py:misfits",
    "models/kernels/triton/attention.py:reach_of",
    "models/layers/rope.py:_llama3",
    "models/loader.py:resolve_dtype",
    "models/transfer.py:layout",
    "server/engine_driver.py:load_engine",
    "server/middleware.py:AdmissionMiddleware",
    "training/modules/layers.py:MLP",
    "training/recipes/medusa.py:build_medusa",
)
SESSIONS = (
    "decoding/drafters/expansion.py:TreeOptions",
    "decoding/drafters/mtp.py:ParallelGrowth",
    "decoding/filters.py:Filters",
    "decoding/triton_sampling.py:TritonSamplingOps",
    "models/checkpoint.py:Checkpoint",
    "training/modules/rollout.py:Past",
)
QUESTIONS = (
    "decoding/drafters/feature_drafter.py: Its entry t pairs the target's feature o",
    "decoding/drafters/product_tree.py: So the heads of Medusa guess (2401.10774",
    "decoding/sampling.py: Both serve the target and every drafter,",
    "docs/acceptance-report.md: pruned. Serving leaves out nodes that ar",
    "docs/add-a-drafter.md: A model with several modules that run on",
    "docs/add-a-drafter.md: EAGLE, MTP and the like are a FeatureMod",
    "docs/add-a-drafter.md: If guesses are worse than they should be",
    "docs/benchmarks.md: Trees were static then, and nothing weig",
    "docs/eagle.md: Draft vocabulary. Most EAGLE-3 heads kno",
    "docs/eagle.md: Drafts reach as far as the target's cont",
    "docs/eagle.md: Files are safetensors or `pytorch_model.",
    "docs/eagle.md: Taps are the hidden states that *enter* ",
    "docs/gpu.md: Padding tokens belong to padding rows. T",
    "docs/medusa.md: Heads and blocks are counted in the weig",
    "models/heads/eagle3.py: Checkpoints differ in flags: ``norm_befo",
    "training/recipes/medusa.py: Head k, counted from 0, is trained at ev",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; returns the exit status."""
    description = "Make the workloads of the drafters' table."
    parser = Parser(prog="python -m benchmarks.make_workloads", description=description)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="(default: %(default)s)")
    help_text = "all that can be made, to choose from (default: what was chosen)"
    parser.add_argument("--all", action="store_true", default=False, help=help_text)
    args, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if extra:
        parser.refuse(extra)
    return carried_out("make-workloads", lambda: write(made_of(sources(ROOT, COMMIT), chosen=not args.all), args.out))


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


def made_of(texts: Mapping[str, str], *, chosen: bool) -> dict[str, list[Line]]:
    """All workloads by their names.

    Args:
        chosen: only the requests and sessions that are named here; otherwise all that can be made.
    """
    chunks = list(source_chunks({path: text for path, text in texts.items() if path.endswith(".py")}))
    worked_on = [each for each in chunks if not chosen or f"{each.path}:{each.name}" in SESSIONS]
    edits, questions = code_editing(chunks), retrieval_answers(list(passages_of(texts)))
    return {
        "code-editing": [line for line in edits if not chosen or line["id"] in EDITS],
        "agentic-repetition": list(agentic_repetition(worked_on)),
        "retrieval-answers": [line for line in questions if not chosen or line["id"] in QUESTIONS],
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
