"""Engines for tests: tiny random models, any drafters, and plain decoding as the judge."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from decoding.assemble import LoadedModel, build_stepper
from decoding.cache import all_moves
from decoding.config import EngineConfig
from decoding.drafters.base import Drafter, DrafterContext
from decoding.engine import Engine
from decoding.messages import TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest
from decoding.sampling_ops import DeviceSamplingOps
from decoding.sequence import SequenceId
from decoding.step_ops import StepOps
from decoding.text import Tokenizer
from models.attention import load_backend
from models.config import ModelConfig
from models.decoder import Decoder
from models.graphs import Capture
from models.layers.ops import load_ops
from models.layers.rope import RopeConfig
from models.tree_ops import DeviceTreeOps

ROOT = Path(__file__).parents[1]
VOCAB = 48
ALL_NODES = "fixed:min_probability=0"  # a plan: whatever drafters propose is verified
EOS = 5
BuildDrafter = Callable[[DrafterContext], Drafter]


def tiny_decoder(
    dtype: torch.dtype, *, layers: int = 2, seed: int = 0, blur: float = 0.0, attention: str = "auto"
) -> Decoder:
    """A random decoder whose text is lively: peaked enough to be drafted, not so much that it loops.

    Args:
        blur: size of random changes to the weights of the same seed; a blurred copy is a realistic draft model.
    """
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=48,
        rope=RopeConfig(dim=8),
        max_len=512,
    )
    cpu = torch.device("cpu")
    model = Decoder(config, load_ops(cpu, dtype), load_backend(attention, cpu, dtype), cpu, dtype)
    generator, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    for weight in model.weights().values():
        drawn = torch.randn(weight.shape, generator=generator)
        drawn = 1 + 0.2 * drawn if weight.dim() == 1 else 0.35 * drawn
        weight.copy_(drawn + blur * torch.randn(weight.shape, generator=noise))
    model.pack()
    return model


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "demo/target")


def device_ops() -> StepOps:
    """What CUDA gets: nothing waits but for a step's results, sizes are bounds."""
    return StepOps(DeviceTreeOps(), DeviceSamplingOps(), all_moves)


def make_engine(
    target: Decoder,
    drafters: dict[str, BuildDrafter] | None = None,
    *,
    ops: StepOps | None = None,
    capture: Capture | None = None,
    **settings: object,
) -> Engine:
    """An engine around a model object; drafters by name, in the order of their bits. Trees are fixed by default."""
    # (a pool of the default size would have a page for every 16 KiB of 2 GiB, and checking it takes a while)
    config = EngineConfig("tiny", **{"num_pages": 512, "plan": "fixed", **settings})  # type: ignore[arg-type]
    loaded = LoadedModel(target, demo_tokenizer(), min(VOCAB, target.vocab_size), (EOS,), {}, capture=capture)
    built = [
        build(
            DrafterContext(
                name=name,
                bit=bit,
                target=target,
                tokenizer=loaded.tokenizer,
                dtype=target.dtype,
                device=target.device,
                attention="auto",
                max_model_len=target.max_model_len,
                max_step_tokens=config.max_num_batched_tokens,
                capture=capture,
            )
        )
        for bit, (name, build) in enumerate((drafters or {}).items())
    ]
    return Engine(config, loaded, build_stepper(config, loaded, built, ops=ops))


class Outcome:
    """Everything that came out for one choice."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.events: list[TokenEvent] = []

    @property
    def last(self) -> TokenEvent:
        return self.events[-1]


def run(engine: Engine, requests: list[GenerateRequest], max_steps: int = 5000) -> dict[SequenceId, Outcome]:
    """Submit all, step to the end, check the pool after every step, and that every choice ends exactly once."""
    for request in requests:
        engine.submit(request)
    outcomes: dict[SequenceId, Outcome] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for event in engine.step():
            outcome = outcomes.setdefault((event.request_id, event.choice), Outcome())
            assert not outcome.events or outcome.last.finish_reason is None, "an event after the end"
            outcome.tokens.extend(event.token_ids)
            outcome.logprobs.extend(event.logprobs or ())
            outcome.events.append(event)
        engine.check()
    assert not engine.has_work, "the engine did not finish"
    assert all(outcome.last.finish_reason is not None for outcome in outcomes.values())
    assert len(outcomes) == sum(request.params.n for request in requests)
    return outcomes


def whole(engine: Engine) -> bool:
    """Every page is free or cached, and nothing is left to do."""
    engine.check()
    stats = engine.stats()
    return stats.pages_free + stats.pages_cached == stats.pages_total and not engine.has_work
