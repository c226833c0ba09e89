"""Acceptance rules as requests and flags name them. What they do is in decoding/verify."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from decoding.errors import ConfigError, RequestError, nearest

RULE_NAMES = ("exact", "typical")
LOSSY = frozenset({"typical"})  # rules whose text is not that of plain decoding
BONUSES = ("keyed", "argmax")


@dataclass(frozen=True)
class Acceptance:
    """A rule and its options. The exact rule has none; the defaults of ``typical`` are Medusa's."""

    rule: str = "exact"
    epsilon: float = 0.09  # typical: a token at least this probable is accepted ...
    delta: float = 0.3  # ... or one above delta * exp(-entropy)
    bonus: str = "keyed"  # typical: the last token of a step is the request's own draw, or the likeliest one

    @classmethod
    def parse(cls, text: str) -> Acceptance:
        """Read ``--acceptance`` RULE[:option=value,...].

        Raises:
            ConfigError: an unknown rule or option, or a value that cannot be.
        """
        rule, _, tail = text.partition(":")
        options = {"epsilon": float, "delta": float, "bonus": str}
        values: dict[str, Any] = {}
        for item in filter(None, tail.split(",")):
            name, _, value = item.partition("=")
            if name not in options:
                raise ConfigError(f"--acceptance {text}: there is no option {name!r}: {nearest(name, options)}")
            try:
                values[name] = options[name](value)
            except ValueError:
                raise ConfigError(f"--acceptance {text}: {name} must be a number, not {value!r}") from None
        made = cls(rule, **values)
        if wrong := made.problem():
            raise ConfigError(f"--acceptance {text}: {wrong[0]} {wrong[1]}")
        return made

    def validate(self) -> None:
        """Check names and ranges.

        Raises:
            RequestError: naming the field at fault.
        """
        if wrong := self.problem():
            param = f"speculation.acceptance.{wrong[0]}"
            raise RequestError(f"{param} {wrong[1]}.", param=param)

    def problem(self) -> tuple[str, str] | None:
        """The first field at fault and what is wrong with it, or None."""
        if self.rule not in RULE_NAMES:
            return "rule", f"cannot be {self.rule!r}: {nearest(self.rule, RULE_NAMES)}"
        if self.rule == "exact":
            given = [each.name for each in fields(self)[1:] if getattr(self, each.name) != each.default]
            return (given[0], "is an option of the rule 'typical'; the rule is 'exact'") if given else None
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not 0 < value <= 1:  # true for nan
                return name, f"must be in (0, 1], not {value:g}"
        if self.bonus not in BONUSES:
            return "bonus", f"cannot be {self.bonus!r}: {nearest(self.bonus, BONUSES)}"
        return None


EXACT = Acceptance()
