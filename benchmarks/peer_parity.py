"""Whether the others compute the same model: greedy tokens of llama.cpp and transformers against ours.

    python -m benchmarks.peer_parity [MODEL_FOLDER] [--dtype float32] [--prompts 20] [--tokens 64] [--llama-build PATH]

In float32 nearly all should agree. In bfloat16 each rounds in its own way, and after the first other token texts go
their own ways, so that what counts is how many agree before it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.llama_cpp import BUILD, LlamaFiles, LlamaServer
from benchmarks.llama_settings import LlamaSetting
from benchmarks.measure import Case, Task
from benchmarks.peers import load_peer_model
from benchmarks.quick import load_cases
from decoding.engine import Engine
from decoding.errors import SaccadeError
from decoding.request import GenerateRequest, SamplingParams
from models.checkpoint import CheckpointError

Tokens = list[list[int]]


@dataclass(frozen=True)
class Agreement:
    """Of some texts with others."""

    texts: int
    equal_texts: int
    tokens: int
    equal_before: int  # tokens before each text's first difference

    @classmethod
    def of(cls, ours: Tokens, theirs: Tokens) -> Agreement:
        before = [_common(mine, other) for mine, other in zip(ours, theirs, strict=True)]
        equal = [mine == other for mine, other in zip(ours, theirs, strict=True)]
        return cls(len(ours), sum(equal), sum(len(mine) for mine in ours), sum(before))

    def __str__(self) -> str:
        texts = f"{self.equal_texts} of {self.texts} texts equal"
        return f"{texts}, {self.equal_before} of {self.tokens} tokens before the first difference"


def _common(mine: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(mine, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))


def our_tokens(folder: str, dtype: str, cases: Sequence[Case], tokens: int) -> Tokens:
    """Of our engine, plain."""
    engine = Engine.load(folder, dtype=dtype, device="cpu", prefix_caching=False)
    made: dict[str, list[int]] = {str(case.index): [] for case in cases}
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for case in cases:
        engine.submit(GenerateRequest(str(case.index), case.ids, params))
    while engine.has_work:
        for event in engine.step():
            made[event.request_id].extend(event.token_ids)
    return list(made.values())


def llama_tokens(folder: str, dtype: str, cases: Sequence[Case], tokens: int, build: Path) -> Tokens:
    """Of llama.cpp, plain, one prompt at a time."""
    server = LlamaServer("llama", LlamaFiles.prepare(folder, None, dtype, build), LlamaSetting(torch.get_num_threads()))
    try:
        return [server.complete(Task(0, 0.0, (case,), tokens))[0] for case in cases]
    finally:
        server.close()


def transformers_tokens(folder: str, dtype: str, cases: Sequence[Case], tokens: int) -> Tokens:
    """Of transformers, plain, one prompt at a time."""
    model = load_peer_model(folder, dtype)
    made = []
    for case in cases:
        ids = torch.tensor([case.ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        made.append(out[0, ids.shape[1] :].tolist())
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print.

    Returns:
        0, or 1 when a model or llama.cpp's server is not there.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_parity", description="Compare greedy tokens.")
    parser.add_argument("model", nargs="?", default="demo/target", metavar="MODEL_FOLDER")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=20, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N")
    parser.add_argument("--llama-build", type=Path, default=BUILD, metavar="PATH")
    args = parser.parse_args(argv)
    try:
        cases = load_cases(args.model, args.prompts)
        ours = our_tokens(args.model, args.dtype, cases, args.tokens)
        llama = llama_tokens(args.model, args.dtype, cases, args.tokens, args.llama_build)
        theirs = transformers_tokens(args.model, args.dtype, cases, args.tokens)
    except (SaccadeError, CheckpointError) as error:
        print(f"peer_parity: {error}", file=sys.stderr)
        return 1
    print(f"{args.model} in {args.dtype}")
    print(f"  llama.cpp and ours:         {Agreement.of(ours, llama)}")
    print(f"  transformers and ours:      {Agreement.of(ours, theirs)}")
    print(f"  llama.cpp and transformers: {Agreement.of(theirs, llama)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
