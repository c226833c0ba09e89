"""The named ways to decode that are compared: plain, three fixed trees, and the planner's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.family import Family
from decoding.config import EngineConfig

if TYPE_CHECKING:  # it imports torch, which must not be there before the environment is
    from decoding.engine import Engine

PLAIN = "plain"
AUTO = "auto"
LEAST_PAGES = 320  # of a pool: eight texts of 512 tokens fit, on which the planner measures its costs


@dataclass(frozen=True)
class FixedTree:
    """The same drafters and the same limits in every step, as a server without a planner is set up by hand."""

    drafters: tuple[str, ...]
    nodes: int
    depth: int
    min_probability: float

    @property
    def names(self) -> tuple[str, ...]:
        """The drafters, without their options."""
        return tuple(drafter.partition(":")[0] for drafter in self.drafters)

    @property
    def plan(self) -> str:
        return f"fixed:nodes={self.nodes},depth={self.depth},min_probability={self.min_probability:g}"


# one that costs nothing to draft, the chain that most servers run, and a tree as published ones are
FIXED: dict[str, FixedTree] = {
    "ngram-8": FixedTree(("ngram",), nodes=8, depth=8, min_probability=0.08),
    "draft-chain-4": FixedTree(("draft:depth=4,beam=1,top_k=1",), nodes=4, depth=4, min_probability=0.0),
    "tree-24": FixedTree(("draft", "ngram"), nodes=24, depth=8, min_probability=0.08),
}
SETTINGS = (PLAIN, *FIXED, AUTO)


def config_of(name: str, family: Family, base: EngineConfig, drafters: Sequence[str] = ()) -> EngineConfig:
    """The engine's settings that a name stands for.

    Args:
        base: everything but the drafters and the plan; its pool is made larger if it is small.
        drafters: of ``auto``, with options; default: all of the family, and n-grams.

    Raises:
        ConfigError: the family lacks a drafter.
    """
    base = replace(base, num_pages=max(base.num_pages or 0, LEAST_PAGES))
    if name == PLAIN:
        return replace(base, speculate=())
    if name == AUTO:
        return replace(base, speculate=family.speculate(drafters or (*family.drafters, "ngram")))
    return replace(base, speculate=family.speculate(FIXED[name].drafters), plan=FIXED[name].plan)


def load_engines(ways: Mapping[str, tuple[str, Sequence[str]]], family: Family, base: EngineConfig) -> Engines:
    """An engine for each way, all around one loaded target: the same weights at the same place in memory.

    Args:
        ways: what an engine is to be called -> a name of ``SETTINGS``, and the drafters if that is ``auto``.

    Raises:
        ConfigError: a model that cannot be loaded, settings that cannot work.
    """
    from decoding.assemble import build_drafters, build_stepper, load_target
    from decoding.cost_file import learn_costs
    from decoding.engine import Engine
    from models.graphed_model import GraphedModel

    loaded = load_target(base)
    engines = {}
    for name, (setting, drafters) in ways.items():
        config = config_of(setting, family, base, drafters)
        stepper = build_stepper(config, loaded, build_drafters(config, loaded))
        learn_costs(stepper, config, loaded.vocab_size, loaded.folder)
        engines[name] = Engine(config, loaded, stepper)
    target = loaded.target if loaded.capture is None else GraphedModel(loaded.target, loaded.capture)
    return Engines(engines, target)


@dataclass(frozen=True)
class Engines:
    """Engines by the name of their setting, and the target that they share, its passes recorded as theirs are."""

    by_name: dict[str, Engine]
    target: Any  # models.target.CausalModel

    @property
    def dtype(self) -> str:
        return str(self.target.dtype).removeprefix("torch.")
