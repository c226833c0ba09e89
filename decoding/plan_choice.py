"""``--plan``: who decides how much is speculated.

``auto`` weighs drafts against their cost, in every step. ``fixed`` gives every row the same, for comparison:
``fixed:nodes=24,depth=8,min_probability=0.08``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from decoding.errors import ConfigError, nearest

AUTO, FIXED = "auto", "fixed"


@dataclass(frozen=True)
class FixedPlan:
    """Every row's limits. None: ``--max-nodes`` and ``--max-depth``."""

    nodes: int | None = None
    depth: int | None = None
    min_probability: float = 0.08  # drafted nodes whose path is less probable, by their drafters, are not verified


def parse_plan(text: str) -> FixedPlan | None:
    """What ``--plan`` says; None is the plan that weighs.

    Raises:
        ConfigError: an unknown plan or option, a value out of range.
    """
    kind, _, tail = text.partition(":")
    if kind not in (AUTO, FIXED):
        raise ConfigError(f"unknown --plan {text!r}: {nearest(kind, (AUTO, FIXED))}")
    if kind == AUTO:
        if tail:
            raise ConfigError("--plan auto has no options; the limits are --max-nodes and --max-depth")
        return None
    values: dict[str, float] = {}
    names = [field.name for field in dataclasses.fields(FixedPlan)]
    for item in filter(None, tail.split(",")):
        key, _, value = item.partition("=")
        if key not in names:
            raise ConfigError(f"--plan fixed has no option {key!r}: {nearest(key, names)}")
        try:
            values[key] = float(value) if key == "min_probability" else int(value)
        except ValueError:
            raise ConfigError(f"--plan fixed: {key} must be a number, not {value!r}") from None
    plan = FixedPlan(**values)  # type: ignore[arg-type]
    for name, limit in (("nodes", plan.nodes), ("depth", plan.depth)):
        if limit is not None and not 0 <= limit <= 63:
            raise ConfigError(f"--plan fixed: {name} must be in 0 .. 63, not {limit}")
    if not 0 <= plan.min_probability <= 1:
        raise ConfigError(f"--plan fixed: min_probability must be in 0 .. 1, not {plan.min_probability}")
    return plan
