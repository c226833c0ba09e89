"""What storing weights in fewer bits costs in quality: ``python -m benchmarks.quality``.

Real texts are read by the target in each setting. Nats per token say how well it predicts them; agreement says how
often its likeliest token is that of the first setting. Differences are paired: the same tokens in every setting.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.texts import Room, Script, load_scripts
from decoding.command_line import StrictParser, whole_from
from decoding.engine import Engine
from decoding.request import SamplingParams

SETTINGS = (("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int8"))


@dataclass(frozen=True)
class Reading:
    """What a model made of texts: one number for each token but each text's first."""

    logprobs: list[list[float]]  # of the token that stands there
    likeliest: list[list[int]]

    def nats(self) -> float:
        """Per token, over all texts."""
        return -statistics.fmean(value for text in self.logprobs for value in text)


def read(engine: Engine, scripts: list[Script]) -> Reading:
    """Have the engine's target read the texts, in chunks as the engine makes them."""
    logprobs, likeliest = [], []
    for script in scripts:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        entries = engine.generate(script.ids, params)[0].prompt_logprobs
        assert entries is not None
        known = [entry for entry in entries if entry is not None]
        logprobs.append([entry.logprob for entry in known])
        likeliest.append([entry.top[0][0] for entry in known])
    return Reading(logprobs, likeliest)


def differing(reading: Reading, reference: Reading) -> tuple[float, float, float]:
    """(nats per token more than the reference, its standard error over texts, share of likeliest tokens that agree)."""
    more = [
        statistics.fmean(theirs) - statistics.fmean(ours)
        for ours, theirs in zip(reading.logprobs, reference.logprobs, strict=True)
    ]
    pairs = [
        ours == theirs
        for mine, other in zip(reading.likeliest, reference.likeliest, strict=True)
        for ours, theirs in zip(mine, other, strict=True)
    ]
    error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0
    return reading.nats() - reference.nats(), error, statistics.fmean(pairs)


def main() -> None:
    """Print a line for each setting."""
    parser: argparse.ArgumentParser = StrictParser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("--model", default="demo/target")
    parser.add_argument("--texts", type=Path, default=Path("demo/prompts.jsonl"))
    parser.add_argument("--limit", type=whole_from(1), help="read only so many texts")
    args = parser.parse_args()
    reference: Reading | None = None
    for dtype, quantization in SETTINGS:
        engine = Engine.load(args.model, dtype=dtype, quantization=quantization)
        room = Room(engine.info.max_model_len - 1, least=1)
        scripts = load_scripts(args.texts, engine.tokenizer.encode, room, limit=args.limit)
        reading = read(engine, scripts)
        if reference is None:
            reference = reading
            tokens = sum(map(len, reading.logprobs))
            print(f"{args.model}, {len(scripts)} texts of {args.texts}, {tokens} tokens; differences to the first line")
            print("dtype     weights  nats/token   more  +- s.e.  same likeliest token")
        more, error, agree = differing(reading, reference)
        print(f"{dtype:9} {quantization:7} {reading.nats():11.4f} {more:+.4f}  {error:.4f}  {agree:.2%}", flush=True)


if __name__ == "__main__":
    main()
