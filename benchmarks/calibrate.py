"""``saccade calibrate``: how often each guess of Medusa heads is right, and the tree of fixed shape that follows.

The target continues the prompts, and at each place of these texts the heads are asked for what comes. a[k][r] is how
often the token that came was head k's guess of rank r. From these the tree is built greedily (2401.10774, section
2.3.3), taking the heads for independent. Sampled texts are scored as drafts are made: coupled to the draws, by the
noise of each position.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.provenance import provenance
from benchmarks.texts import Room, load_prompts, load_scripts
from decoding.assemble import LoadedModel, build_stepper, load_target
from decoding.batcher import Chain, build
from decoding.cache import pages_for
from decoding.config import Dtype, EngineConfig
from decoding.drafters import DrafterChoice
from decoding.drafters.medusa import MedusaOptions, heads_folder, load_heads
from decoding.drafters.product_tree import RankPath
from decoding.drafters.static_tree import CHOICES_FILE, calibrated_choices, expected_tokens
from decoding.engine import Engine
from decoding.errors import ConfigError
from decoding.noise import gumbel
from decoding.request import GREEDY_TEMPERATURE, GenerateRequest, SamplingParams
from models.batch import MAX_TREE
from models.heads.medusa import MedusaHeads
from models.kv_cache import KVCache
from models.loader import resolve
from models.target import CausalModel
from models.tree import roots_only

RANKS = 20  # guesses of a head that are told apart
AT_ONCE = 64  # places whose logits are computed together


@dataclass(frozen=True)
class Options:
    """The command line. Each default is written here once."""

    model: str
    speculate: str
    prompts: Path
    real_text: bool = False
    nodes: int = MAX_TREE - 1
    temperature: float = 0.0
    max_tokens: int = 128
    limit: int | None = None
    out: Path | None = None
    dtype: Dtype = EngineConfig.dtype
    device: str = EngineConfig.device
    threads: int | None = None


@dataclass(frozen=True)
class CalibrationText:
    """Tokens of which those from ``given`` on are to be guessed."""

    ids: tuple[int, ...]
    given: int
    seed: int
    temperature: float  # that they were drawn at; 0: not drawn


def calibrate(options: Options, command: Sequence[str]) -> str:
    """Measure, write the tree, and return the table to print.

    Raises:
        ConfigError: a model, heads, prompts or settings that cannot work; the message names the fix.
        RequestError: a temperature out of range.
    """
    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    choice = DrafterChoice.parse(options.speculate)
    if not isinstance(choice.options, MedusaOptions):
        raise ConfigError(f"--speculate {options.speculate}: only medusa has a tree to calibrate; give medusa=PATH")
    loaded = load_target(EngineConfig(options.model, dtype=options.dtype, device=options.device))
    folder = heads_folder(choice.options.path, resolve(options.model))
    heads = load_heads(folder, loaded.target, loaded.vocab_size)
    out = options.out or folder / CHOICES_FILE
    hits = torch.zeros(heads.config.num_heads, RANKS + 1)
    for text in texts_of(options, loaded, heads.config.num_heads):
        hits += score(text, loaded, heads)
    places = hits.sum(dim=1).int().tolist()
    if not min(places):
        raise ConfigError(f"{options.prompts}: no text is long enough to score every head; give more, or --max-tokens")
    accuracy = (hits[:, :RANKS] / hits.sum(dim=1, keepdim=True)).tolist()
    choices = calibrated_choices(accuracy, options.nodes)
    if not choices:
        raise ConfigError(f"the heads in {folder} were never right; are they of this target?")
    dtype = str(loaded.target.dtype).removeprefix("torch.")
    models = {"target": str(resolve(options.model)), "medusa": str(folder)}
    source = {**provenance(command, models, dict.fromkeys(models, dtype)), "places": places}
    write(out, accuracy, choices, source)
    return table(accuracy, choices, places) + f"\nwritten to {out}"


def check(options: Options) -> None:
    """Raise ConfigError for settings out of range, before anything is loaded."""
    if not 1 <= options.nodes < MAX_TREE:
        raise ConfigError(f"--nodes must be in 1 .. {MAX_TREE - 1}, not {options.nodes}")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.resolve().parent}; make it first")


def texts_of(options: Options, loaded: LoadedModel, heads: int) -> list[CalibrationText]:
    """The texts to score: real, or written by the target."""
    encode, context = loaded.tokenizer.encode, loaded.target.max_model_len
    room = Room(context, heads + 1)
    if options.real_text:
        scripts = load_scripts(options.prompts, encode, room, limit=options.limit)
        return [CalibrationText(script.ids, script.given, 0, 0.0) for script in scripts]
    prompts = load_prompts(options.prompts, encode, room, max_tokens=options.max_tokens, limit=options.limit)
    config = EngineConfig(options.model, dtype=options.dtype, device=options.device)
    engine = Engine(config, loaded, build_stepper(config, loaded, []))
    for prompt in prompts:
        params = SamplingParams(prompt.tokens, options.temperature, seed=prompt.seed)
        engine.submit(GenerateRequest(str(prompt.seed), prompt.ids, params))
    written: dict[str, list[int]] = {str(prompt.seed): list(prompt.ids) for prompt in prompts}
    while engine.has_work:
        for event in engine.step():
            written[event.request_id] += event.token_ids
    drawn_at = options.temperature if options.temperature >= GREEDY_TEMPERATURE else 0.0
    return [CalibrationText(tuple(written[str(p.seed)]), len(p.ids), p.seed, drawn_at) for p in prompts]


@torch.inference_mode()
def score(text: CalibrationText, loaded: LoadedModel, heads: MedusaHeads) -> Tensor:
    """[D, RANKS + 1] how often the token that came had each rank among a head's guesses; the last is "any other"."""
    depth, ids = heads.config.num_heads, torch.tensor(text.ids, device=loaded.target.device)
    hits = torch.zeros(depth, RANKS + 1)
    hidden = hidden_states(loaded.target, text.ids)
    # a root is the first new token or a later one; the heads look at the token before it
    for first in range(text.given - 1, len(ids) - 2, AT_ONCE):
        seen = hidden[first : min(first + AT_ONCE, len(ids) - 2)]
        logits = heads.logits(seen, depth)[..., : loaded.vocab_size]
        for head in range(depth):
            came = ids[first + head + 2 : first + head + 2 + len(seen)]
            z = logits[: len(came), head]
            if text.temperature:
                z = z + text.temperature * noise(text, range(first + head + 2, first + head + 2 + len(came)), z)
            rank = (z > z.gather(1, came[:, None])).sum(dim=1).clamp(max=RANKS)
            hits[head] += torch.bincount(rank.cpu(), minlength=RANKS + 1)
    return hits


def noise(text: CalibrationText, positions: range, like: Tensor) -> Tensor:
    """[n, V] what the tokens of these positions were drawn with."""
    drawn = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    where = torch.tensor(list(positions), device=like.device)
    gumbel(drawn, torch.full_like(where, text.seed), where, torch.zeros_like(where))
    return drawn


def hidden_states(target: CausalModel, ids: Sequence[int]) -> Tensor:
    """[T, H] of one text, in one pass."""
    pages = list(range(pages_for(len(ids))))
    roots = roots_only(torch.tensor(ids[-1:], device=target.device))
    chain = Chain(np.array(ids, dtype=np.int64), 0, pages)
    batch, _ = build([chain], roots, torch.ones_like(roots.parents), [1])
    cache = KVCache(target.kv_spec, len(pages), target.dtype, target.device)
    return target.forward(batch, cache).hidden


def write(path: Path, accuracy: list[list[float]], choices: list[RankPath], source: dict[str, Any]) -> None:
    """The tree with what it was made of, as ``medusa_choices``; a file that was there is replaced at once.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {
        "medusa_choices": [list(choice) for choice in choices],
        "accuracy": [[round(share, 5) for share in head] for head in accuracy],
        "expected_tokens": round(expected_tokens(accuracy, choices), 4),
        "provenance": source,
    }
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --out") from error
    finally:
        part.unlink(missing_ok=True)


def table(accuracy: list[list[float]], choices: list[RankPath], places: list[int]) -> str:
    """What was measured, a line a depth (head k guesses depth k + 1), and the tree."""
    shown = (1, 2, 3, 5, 10, 20)
    lines = ["depth   places" + "".join(f"   top {count:<2}" for count in shown) + "   nodes"]
    for head, (shares, scored) in enumerate(zip(accuracy, places, strict=True)):
        columns = "".join(f"   {sum(shares[:count]):6.3f}" for count in shown)
        nodes = sum(1 for choice in choices if len(choice) == head + 1)
        lines.append(f"{head + 1:5}   {scored:6}{columns}   {nodes:5}")
    expected = expected_tokens(accuracy, choices)
    lines.append(f"a tree of {len(choices)} nodes; {expected:.2f} tokens a step if the heads are independent")
    return "\n".join(lines)
