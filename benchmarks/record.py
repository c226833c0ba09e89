"""Records what drafters propose at every position of the target's own texts, for the simulator (simulator.py).

    python -m benchmarks.record demo/target --speculate draft=demo/draft --speculate ngram --out FILE.npz

Trees are recorded as deep as the drafters can; a shallower one is the upper part of it.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.replay import Dictation
from benchmarks.texts import Room, load_prompts
from decoding.assemble import build_drafters, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters.base import Drafter
from decoding.drafters.team import DrafterTeam
from decoding.engine import Engine
from decoding.plan import Plan, Quota
from decoding.request import GenerateRequest, SamplingParams
from decoding.sampling import Sampling
from decoding.step import Stepper
from models.tree import NO_PARENT, Trees, depths
from server.flags import Parser, positive

DEPTH = 8
PLAN = f"fixed:nodes=63,depth={DEPTH},min_probability=0"


@dataclass(frozen=True)
class Recording:
    """Proposals at P positions of texts; N nodes of the largest tree, root excluded."""

    names: tuple[str, ...]  # of the M drafters
    tokens: NDArray[np.int32]  # [M, P, N], -1 where there is no node
    parents: NDArray[np.int16]  # [M, P, N] column of the parent, the root being 0 and the first node 1
    confidence: NDArray[np.float16]  # [M, P, N]
    text: NDArray[np.int32]  # [P] the token that comes at the position
    starts: NDArray[np.int64]  # [texts + 1] first position of each text
    temperatures: NDArray[np.float64]  # [texts]

    def save(self, path: Path) -> None:
        np.savez_compressed(path, names=np.array(self.names), **{k: v for k, v in vars(self).items() if k != "names"})

    @staticmethod
    def load(path: Path) -> Recording:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name != "names"}
            return Recording(tuple(stored["names"].tolist()), **arrays)


class RecordingTeam(Dictation):
    """Keeps every drafter's tree at each position, by request, and proposes nothing."""

    def __init__(self, members: list[Drafter], texts: Mapping[str, Tensor], depth: int) -> None:
        super().__init__(members, texts, depth)
        self.kept: dict[str, list[dict[int, Trees]]] = defaultdict(list)

    def listen(self, plan: Plan, quota: Quota, sampling: Sampling, future: Tensor, scored: list[bool]) -> None:
        """See ``Dictation``."""
        proposals = self.guesses + DrafterTeam.propose(self, plan, quota, sampling)
        for number, (row, counts) in enumerate(zip(plan.deciding, scored, strict=True)):
            if counts:
                here = {p.bit: _row(p.trees, number) for p in proposals}
                self.kept[row.sequence.id[0]].append(here)


def record(model: str, speculate: Sequence[str], prompts: Path, limit: int, tokens: int) -> Recording:
    """Let the target write at temperatures 0 and 1, and the drafters propose at every position of it.

    Raises:
        ConfigError: a model, drafters or prompts that cannot be used.
    """
    config = EngineConfig(model, speculate=tuple(speculate), plan=PLAN, num_pages=4000, prefix_caching=False)
    loaded = load_target(config)
    room = Room(loaded.target.max_model_len, DEPTH)
    asked = load_prompts(prompts, loaded.tokenizer.encode, room, max_tokens=tokens, limit=limit)
    parts: list[tuple[list[dict[int, Trees]], list[int], float]] = []
    for temperature in (0.0, 1.0):
        requests = [
            GenerateRequest(str(p.seed), p.ids, SamplingParams(p.tokens, temperature, seed=p.seed, ignore_eos=True))
            for p in asked
        ]
        plain = Engine(config, loaded, build_stepper(config, loaded, []))
        texts = {key: torch.tensor(ids) for key, ids in _run(plain, requests).items()}
        drafters = build_drafters(config, loaded)
        step = build_stepper(config, loaded, drafters)
        team = RecordingTeam(drafters, texts, DEPTH)
        parts_of = (step.target, step.cache, step.scheduler, step.planner, step.sampler)
        _run(Engine(config, loaded, Stepper(*parts_of, team, team.dictate, step.committer)), requests)
        for request in requests:
            kept = team.kept[request.request_id]
            first = len(request.prompt_ids) + 1  # the prompt's own step is not scored
            came = texts[request.request_id][first : first + len(kept)].tolist()
            parts.append((kept, came, temperature))
    return pack(tuple(d.name for d in drafters), parts)


def pack(names: tuple[str, ...], parts: list[tuple[list[dict[int, Trees]], list[int], float]]) -> Recording:
    """One text after the other."""
    places = [place for kept, _, _ in parts for place in kept]
    widest = max((trees.width - 1 for place in places for trees in place.values()), default=0)
    size = (len(names), len(places), widest)
    tokens, parents = np.full(size, -1, dtype=np.int32), np.full(size, NO_PARENT, dtype=np.int16)
    confidence = np.zeros(size, dtype=np.float16)
    for number, place in enumerate(places):
        for bit, trees in place.items():
            used = slice(0, trees.width - 1)
            tokens[bit, number, used] = trees.tokens[0, 1:]
            parents[bit, number, used] = trees.parents[0, 1:]
            confidence[bit, number, used] = trees.confidence[0, 1:]
    text = np.array([token for _, came, _ in parts for token in came], dtype=np.int32)
    starts = np.cumsum([0, *(len(kept) for kept, _, _ in parts)])
    return Recording(names, tokens, parents, confidence, text, starts, np.array([t for _, _, t in parts]))


def _row(trees: Trees, row: int) -> Trees:
    """One row's tree, as deep as is recorded."""
    part = Trees(
        *(each[row : row + 1].clone() for each in (trees.tokens, trees.parents, trees.confidence, trees.source))
    )
    deep = depths(part.parents) > DEPTH
    part.parents[deep] = NO_PARENT
    part.tokens[deep] = -1
    return part


def _run(engine: Engine, requests: Sequence[GenerateRequest]) -> dict[str, list[int]]:
    texts = {request.request_id: list(request.prompt_ids) for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += event.token_ids
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.record", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--speculate", action="append", required=True, metavar="DRAFTER")
    parser.add_argument("--prompts", type=Path, default=Path("demo/prompts.jsonl"), metavar="FILE")
    parser.add_argument("--limit", type=positive, default=10, metavar="N", help="the first N prompts (default: 10)")
    parser.add_argument("--tokens", type=positive, default=96, metavar="N", help="of each text (default: 96)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    record(args.model, args.speculate, args.prompts, args.limit, args.tokens).save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
