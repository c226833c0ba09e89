"""How often rounding changes a token: ``python -m benchmarks.flips``.

A text is a function of the request, up to rounding: another number of rows in a product may add numbers in another
order, and two tokens that are equal to within that change places. On CPUs every kernel gives a row the same bits
whatever its neighbours, so the rate is to be 0; on CUDA it is measured here. Systems are compared with plain decoding
one by one, in the same dtype; the last lines compare dtypes, which are different functions, for the scale of it.

After its first other token a text is another text, so what is counted is the first one: flips per 1000 tokens =
texts that differ / tokens up to there, times 1000.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.texts import Prompt, Room, load_prompts
from decoding.command_line import StrictParser, whole_from
from decoding.engine import Engine
from decoding.errors import ConfigError
from decoding.request import GenerateRequest, SamplingParams

DRAFTERS = {
    "plain": (),
    "draft+ngram": ("draft=demo/draft", "ngram"),
    "eagle3": ("eagle3=demo/eagle3",),
}
ROWS = (1, 8)  # requests at once
TEMPERATURES = (0.0, 1.0)

Texts = dict[str, tuple[int, ...]]  # a prompt's name -> the tokens made for it


@dataclass(frozen=True)
class Flips:
    """Two sets of texts, compared."""

    texts: int
    differing: int
    tokens: int  # up to the first other token of each text, that one included

    @property
    def per_thousand(self) -> float:
        return 1000 * self.differing / self.tokens if self.tokens else 0.0


def compare(made: Texts, reference: Texts) -> Flips:
    """Texts of the same prompts.

    Raises:
        ValueError: not the same prompts.
    """
    if made.keys() != reference.keys():
        raise ValueError("the texts are of different prompts")
    differing = tokens = 0
    for name, ids in made.items():
        same = _common(ids, reference[name])
        apart = ids != reference[name]
        differing += apart
        tokens += same + apart
    return Flips(len(made), differing, tokens)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(left), len(right)))


def texts(engine: Engine, prompts: Sequence[Prompt], temperature: float, rows: int) -> Texts:
    """Continue the prompts, ``rows`` of them at once."""
    made: dict[str, list[int]] = defaultdict(list)
    for first in range(0, len(prompts), rows):
        for prompt in prompts[first : first + rows]:
            params = SamplingParams(
                max_tokens=prompt.tokens, temperature=temperature, seed=prompt.seed, ignore_eos=True
            )
            engine.submit(GenerateRequest(prompt.name, prompt.ids, params))
        while engine.has_work:
            for event in engine.step():
                made[event.request_id].extend(event.token_ids)
    return {name: tuple(ids) for name, ids in made.items()}


def systems(options: argparse.Namespace, dtype: str) -> Iterator[tuple[str, float, Texts]]:
    """(name, temperature, texts) of each system in one dtype, plain decoding one by one first."""
    for drafters, speculate in DRAFTERS.items():
        engine = Engine.load(
            options.model, dtype=dtype, device=options.device, quantization=options.quantization, speculate=speculate
        )
        room = Room(engine.info.max_model_len, least=1)
        prompts = load_prompts(
            options.prompts, engine.tokenizer.encode, room, max_tokens=options.tokens, limit=options.limit
        )
        for rows in ROWS:
            for temperature in TEMPERATURES:
                yield f"{drafters}-x{rows}", temperature, texts(engine, prompts, temperature, rows)
        if speculate and not engine.stats().drafted:
            raise ConfigError(f"{drafters} drafted nothing, so nothing was compared")


def line(dtype: str, system: str, temperature: float, flips: Flips) -> str:
    rate = f"{flips.differing:5} of {flips.texts:<5} {flips.tokens:8} {flips.per_thousand:12.3f}"
    return f"{dtype:22} {temperature:3g}  {system:15} {rate}"


def main() -> None:
    """Print the table."""
    parser: argparse.ArgumentParser = StrictParser(prog="benchmarks.flips", description=__doc__)
    parser.add_argument("--model", default="demo/target")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=Path, default=Path("demo/prompts.jsonl"))
    parser.add_argument("--limit", type=whole_from(1), help="use only so many prompts")
    parser.add_argument("--tokens", type=whole_from(1), default=128, help="made for each (default: %(default)s)")
    options = parser.parse_args()
    print(f"{options.model} on {options.device}, torch {torch.__version__}, {options.tokens} tokens a prompt")
    print(f"{'dtype':22} {'T':>3}  {'system':15} {'texts differ':>14} {'tokens':>8} {'flips/1000':>12}")
    plain: dict[tuple[str, float], Texts] = {}
    for dtype in options.dtypes:
        for system, temperature, made in systems(options, dtype):
            reference = plain.setdefault((dtype, temperature), made)
            if made is not reference:
                print(line(dtype, system, temperature, compare(made, reference)), flush=True)
    first = options.dtypes[0]
    for dtype in options.dtypes[1:]:
        for temperature in TEMPERATURES:
            flips = compare(plain[dtype, temperature], plain[first, temperature])
            print(line(f"{dtype} for {first}", "plain-x1", temperature, flips))


if __name__ == "__main__":
    main()
