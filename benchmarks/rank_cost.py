"""What a step of plain decoding costs on one rank and on several: ``python -m benchmarks.rank_cost MODEL``.

Each rank has one thread. On CPUs that share their memory several threads of one rank do the same with less ado, so what
is to be seen here is the price of the ranks' sums.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch

from benchmarks.provenance import cpu_model
from decoding.engine import Engine
from decoding.request import GenerateRequest, SamplingParams

STEPS = 30  # of a round
ROUNDS = 4


def step_seconds(engine: Engine, rows: int) -> float:
    """Of the fastest round: other work of the machine only adds."""
    best = float("inf")
    for number in range(ROUNDS):
        params = SamplingParams(max_tokens=STEPS + 1, temperature=0.0, ignore_eos=True)
        for row in range(rows):
            engine.submit(GenerateRequest(f"{number}-{row}", (40, 41 + row), params))
        engine.step()
        before = engine.stats()
        while engine.has_work:
            engine.step()
        after = engine.stats()
        best = min(best, (after.step_seconds - before.step_seconds) / (after.steps - before.steps))
    return best


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each number of ranks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_cost")
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{cpu_model()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print("ranks  rows  ms a step")
    for ranks in args.ranks:
        engine = Engine.load(args.model, dtype=args.dtype, num_pages=400, tensor_parallel_size=ranks)
        for rows in args.rows:
            print(f"{ranks:5} {rows:5} {1e3 * step_seconds(engine, rows):10.2f}", flush=True)
        engine.close()


if __name__ == "__main__":
    main()
