"""Feature drafters in training against the same drafters as served, on tiny targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decoding.drafters.base import DrafterContext
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.engine import Engine
from decoding.request import GenerateRequest, SamplingParams
from models.decoder import Decoder
from models.heads.feature_model import Drafted, FeatureModel
from models.loader import load_model
from tests.engines import VOCAB, Outcome, demo_tokenizer, make_engine, run
from tests.paged import PagedRun
from tests.parity.tiny import random_prompt, save_tiny
from training.capture import FrozenTarget
from training.modules.rollout import Pass
from training.recipe import Losses, Recipe, TrainContext, Windows

WINDOW = 14
TAPS = "1,2,3"  # of the targets of 4 layers


def context(target: Path, corpus: np.ndarray | None = None, *, window: int = WINDOW, **changed: Any) -> TrainContext:
    return TrainContext(
        target=target,
        tokenizer=demo_tokenizer(),
        tokenizer_folder=target,
        device=torch.device("cpu"),
        autocast=None,
        window=window,
        seed=0,
        corpus=np.arange(VOCAB) if corpus is None else corpus,
        **{"checkpointing": False, **changed},
    )


def save_target(folder: Path, variant: str = "llama") -> Path:
    return save_tiny(variant, folder, num_hidden_layers=4, vocab_size=VOCAB)


def save_sure_target(folder: Path) -> Path:
    """One that knows what it wants: what it says can be learnt, without near ties."""
    path = save_target(folder) / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": 20 * weights["lm_head.weight"]}, path, metadata={"format": "pt"})
    return folder


def windows(rows: int = 2, length: int = WINDOW) -> Windows:
    tokens = torch.tensor([random_prompt(length, seed=row, vocab=VOCAB) for row in range(rows)])
    return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool))


def shake(module: nn.Module) -> None:
    """Weights that differ from where training starts: norms of one and the like hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.15 * torch.randn(weight.shape, generator=generator)


def served_logits(model: FeatureModel, tokens: list[int], features: Tensor, anchor: int, depth: int) -> list[Tensor]:
    """What the served drafter gives along the true tokens, ``depth`` + 1 times [Vd].

    Entries 1 .. anchor are committed; token anchor + 1, + 2, .. are then drafted.

    Args:
        features: [S, F] of the target.
    """
    served = PagedRun(model, capacity=64)  # type: ignore[arg-type]
    served.lengths[0] = 1  # slot 0 has no entry
    batch = served.batch({0: tokens[1 : anchor + 1]})
    with torch.inference_mode():
        drafted = model.catch_up(replace(batch, positions=batch.positions - 1), features[:anchor], None, served.cache)
        logits = [_last(model, drafted)]
        for step in range(1, depth + 1):
            served.lengths[0] = anchor + step
            batch = served.batch({0: [tokens[anchor + step]]})
            moved = replace(batch, positions=batch.positions - 1)
            drafted = model.extend(moved, drafted.carry[-1:], step, served.cache)
            logits.append(_last(model, drafted))
    return logits


def _last(model: FeatureModel, drafted: Drafted) -> Tensor:
    return model.logits(drafted.hidden[-1:])[0]


def check_alignment(
    passes: list[Pass], head: Tensor, model: FeatureModel, target: FrozenTarget, batch: Windows, taps: tuple[int, ...]
) -> None:
    """Every logit of every unrolled step is that of the served model."""
    captured = target.capture(batch.tokens, taps)
    features = torch.cat([captured.taps[tap] for tap in taps], dim=-1) if taps else captured.hidden
    depth = len(passes) - 1
    for row, tokens in enumerate(batch.tokens.tolist()):
        for anchor in range(1, len(tokens) - 1 - depth):
            served = served_logits(model, tokens, features[row], anchor, depth)
            for step, (each, wanted) in enumerate(zip(passes, served, strict=True)):
                entry = anchor - 1  # entries are counted from the window's second token
                assert int(each.anchors[entry]) == entry
                ours = each.hidden[row, entry] @ head.T
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, msg=f"anchor {anchor}, step {step}")


def serve(target: Path) -> Decoder:
    model = load_model(target, dtype="float32")
    assert isinstance(model, Decoder)
    return model


def greedy_text(target: Path, prompt: list[int], count: int) -> list[int]:
    """The prompt and its plain greedy continuation."""
    return prompt + _continue(make_engine(serve(target)), prompt, count).tokens


def overfit(recipe: Recipe, text: list[int], prompt: int, steps: int) -> Losses:
    """Learn one text by heart; the losses after that, as validation sees them."""
    tokens = torch.tensor([text])
    counts = torch.arange(len(text))[None] >= prompt
    optimizer = torch.optim.AdamW(recipe.module.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        recipe.loss(Windows(tokens, counts)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    recipe.module.eval()
    with torch.no_grad():
        return recipe.loss(Windows(tokens, counts))


def tokens_per_step(
    target: Path, load: Callable[[Decoder], FeatureModel], text: list[int], prompt: int, depth: int
) -> float:
    """Of an engine that writes ``text`` on from its prompt with chains of ``depth`` drafted tokens."""
    options = TreeOptions("", depth=depth, top_k=1, beam=1, min_confidence=0.0)
    model = serve(target)

    def build(context: DrafterContext) -> FeatureDrafter:
        return FeatureDrafter(options, context, load(model))

    engine = make_engine(model, {"learnt": build}, max_nodes=depth, max_depth=depth)
    outcome = _continue(engine, text[:prompt], len(text) - prompt)
    assert outcome.tokens == text[prompt:]
    return len(outcome.tokens) / len(outcome.events)


def _continue(engine: Engine, prompt: list[int], count: int) -> Outcome:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    return run(engine, [GenerateRequest("r", tuple(prompt), params)])["r", 0]
