"""Which acceptance rule judges each sequence of a step, and with which parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.sequence import Sequence
from models.transfer import upload


@dataclass(frozen=True)
class RuleTable:
    """Of S sequences, made once for a set of sequences like the sampling parameters beside it."""

    names: tuple[str, ...]  # host: the rules in use, at least one
    rule: Tensor  # [S] int64, index into names
    epsilon: Tensor  # [S] float32, of the typical rule; anything for other sequences
    delta: Tensor  # [S] float32, likewise
    likeliest: Tensor | None  # [S] bool, the bonus is the likeliest token; None: of no sequence


def make_rule_table(sequences: list[Sequence], device: torch.device) -> RuleTable:
    """Gather the rules of ``sequences``."""
    wanted = [s.acceptance for s in sequences]
    names = tuple(dict.fromkeys(each.rule for each in wanted)) or ("exact",)
    likeliest = [each.bonus == "argmax" for each in wanted]
    rule, epsilon, delta, argmax = upload(
        device,
        np.array([names.index(each.rule) for each in wanted], dtype=np.int64),
        np.array([each.epsilon for each in wanted], dtype=np.float32),
        np.array([each.delta for each in wanted], dtype=np.float32),
        np.array(likeliest, dtype=bool),
    )
    return RuleTable(names, rule, epsilon, delta, argmax if any(likeliest) else None)
