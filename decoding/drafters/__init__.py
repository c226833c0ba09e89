"""The table of drafters. A drafter is one file and one line in ``DRAFTERS``.

On the command line a drafter is ``NAME``, ``NAME=PATH`` or either with options,
``NAME=PATH:option=value,option=value``; the options are the fields of the dataclass in the drafter's own file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decoding.drafters.base import Drafter, DrafterContext
from decoding.errors import ConfigError, nearest


@dataclass(frozen=True)
class DrafterKind:
    """One line of the table."""

    options: type  # frozen dataclass; a field ``path`` is the checkpoint, without default the drafter needs one
    build: Callable[[Any, DrafterContext], Drafter]

    @property
    def needs_path(self) -> bool:
        """Whether it is nothing without a checkpoint."""
        fields = dataclasses.fields(self.options)
        return any(field.name == "path" and field.default is dataclasses.MISSING for field in fields)


def _ngram() -> DrafterKind:
    from decoding.drafters.ngram import NgramDrafter, NgramOptions

    return DrafterKind(NgramOptions, NgramDrafter)


def _prediction() -> DrafterKind:
    from decoding.drafters.prediction import PredictionDrafter, PredictionOptions

    return DrafterKind(PredictionOptions, PredictionDrafter)


def _recycling() -> DrafterKind:
    from decoding.drafters.recycling import RecyclingDrafter, RecyclingOptions

    return DrafterKind(RecyclingOptions, RecyclingDrafter)


def _lookahead() -> DrafterKind:
    from decoding.drafters.lookahead import LookaheadDrafter, LookaheadOptions

    return DrafterKind(LookaheadOptions, LookaheadDrafter)


def _draft_model() -> DrafterKind:
    from decoding.drafters.draft_model import DraftModelOptions, load_draft_model

    return DrafterKind(DraftModelOptions, load_draft_model)


def _medusa() -> DrafterKind:
    from decoding.drafters.medusa import MedusaOptions, load_medusa_drafter

    return DrafterKind(MedusaOptions, load_medusa_drafter)


def _mtp() -> DrafterKind:
    from decoding.drafters.mtp import MTPOptions, load_mtp_drafter

    return DrafterKind(MTPOptions, load_mtp_drafter)


def _eagle() -> DrafterKind:
    from decoding.drafters.eagle import EagleOptions, load_eagle_drafter

    return DrafterKind(EagleOptions, load_eagle_drafter)


def _eagle3() -> DrafterKind:
    from decoding.drafters.eagle3 import Eagle3Options, load_eagle3_drafter

    return DrafterKind(Eagle3Options, load_eagle3_drafter)


def _suffix() -> DrafterKind:
    from decoding.drafters.suffix import SuffixDrafter, SuffixOptions

    return DrafterKind(SuffixOptions, SuffixDrafter)


def _retrieval() -> DrafterKind:
    from decoding.drafters.retrieval import RetrievalOptions, load_retrieval_drafter

    return DrafterKind(RetrievalOptions, load_retrieval_drafter)


def _early_exit() -> DrafterKind:
    from decoding.drafters.early_exit import EarlyExitOptions, load_early_exit

    return DrafterKind(EarlyExitOptions, load_early_exit)


DRAFTERS: dict[str, Callable[[], DrafterKind]] = {
    "ngram": _ngram,
    "prediction": _prediction,
    "recycling": _recycling,
    "lookahead": _lookahead,
    "draft": _draft_model,
    "medusa": _medusa,
    "mtp": _mtp,
    "eagle": _eagle,
    "eagle3": _eagle3,
    "suffix": _suffix,
    "retrieval": _retrieval,
    "early-exit": _early_exit,
}


@dataclass(frozen=True)
class DrafterChoice:
    """One ``--speculate`` argument, checked against the table."""

    name: str
    options: Any

    @classmethod
    def parse(cls, text: str) -> DrafterChoice:
        """Read NAME[=PATH][:option=value,...].

        Raises:
            ConfigError: for an unknown drafter or option, a missing or superfluous path, a value of the wrong type.
        """
        head, _, tail = text.rpartition(":") if "=" in text.rpartition(":")[2] and ":" in text else (text, "", "")
        name, _, path = head.partition("=")
        if name not in DRAFTERS:
            raise ConfigError(f"unknown drafter {name!r} in --speculate {text}: {nearest(name, DRAFTERS)}")
        kind = DRAFTERS[name]()
        fields = {field.name: field for field in dataclasses.fields(kind.options)}
        values: dict[str, Any] = {}
        if path and "path" in fields:
            values["path"] = path
        elif kind.needs_path:
            raise ConfigError(f"--speculate {name} needs a checkpoint: --speculate {name}=PATH")
        elif path:
            raise ConfigError(f"--speculate {name} takes no path; leave out {'=' + path!r}")
        for item in filter(None, tail.split(",")):
            key, _, value = item.partition("=")
            if key not in fields or key == "path":
                valid = [field for field in fields if field != "path"]
                raise ConfigError(f"drafter {name!r} has no option {key!r}: {nearest(key, valid)}")
            wanted: type = type(fields[key].default)
            try:
                values[key] = wanted(value)
            except ValueError:
                raise ConfigError(
                    f"option {key} of drafter {name!r} must be {wanted.__name__}, not {value!r}"
                ) from None
        return cls(name, kind.options(**values))

    def build(self, context: DrafterContext) -> Drafter:
        return DRAFTERS[self.name]().build(self.options, context)
