"""Predicted outputs: follows the text that the client expects to come (OpenAI's ``prediction``), edits included.

As long as the output says what was predicted, the rest of the prediction is one deep chain. Where it departs, the place
is looked for again (alignment.py). Two places that may both be right become two branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decoding.drafters.alignment import AlignmentRules, load_alignments
from decoding.drafters.base import DrafterContext, TokenDrafter
from decoding.errors import ConfigError
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from models.batch import MAX_TREE
from models.tree import Trees

NOBODY = -1  # number of a row that is not followed


@dataclass(frozen=True)
class PredictionOptions:
    """Names as in prompt lookup's."""

    max_match: int = 32  # tokens before a place that are compared when it is looked for
    branches: int = 2  # places that are followed at once while none is certain


class PredictionDrafter(TokenDrafter):
    """Drafts for requests that bring a prediction; others cost nothing.

    Raises:
        ConfigError: options that cannot be.
    """

    def __init__(self, options: PredictionOptions, context: DrafterContext) -> None:
        if not 1 <= options.max_match <= MAX_TREE:
            raise ConfigError(f"prediction: max_match must be in 1 .. {MAX_TREE}, not {options.max_match}")
        if not 1 <= options.branches <= MAX_TREE:
            raise ConfigError(f"prediction: branches must be at least 1 and at most {MAX_TREE}, not {options.branches}")
        self.name = context.name
        self._bit = context.bit
        self._alignments = load_alignments(AlignmentRules(options.max_match, options.branches))
        self._followed: dict[SequenceId, int] = {}  # with their numbers among the alignments

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        if not any(row.sequence.request.prediction_ids for row in plan.deciding):
            return None
        rows = list(zip([row.sequence for row in plan.deciding], quota.rows, strict=True))
        nodes = [
            limit.nodes if self.name in limit.drafters and sequence.request.prediction_ids else 0
            for sequence, limit in rows
        ]
        if not any(nodes):
            return None
        numbers = [self._number(row[0]) if asked else NOBODY for row, asked in zip(rows, nodes, strict=True)]
        texts = [torch.from_numpy(sequence.tokens) for sequence, _ in rows]
        arrays = self._alignments.trees(numbers, texts, nodes, [limit.depth for _, limit in rows], self._bit)
        return Trees(*arrays) if arrays[0].shape[1] > 1 else None

    def forget(self, sequence: SequenceId) -> None:
        number = self._followed.pop(sequence, None)
        if number is not None:
            self._alignments.forget(number)

    def _number(self, sequence: Sequence) -> int:
        number = self._followed.get(sequence.id)
        if number is None:
            prediction = torch.tensor(sequence.request.prediction_ids, dtype=torch.int64)
            number = self._followed[sequence.id] = self._alignments.begin(prediction, sequence.prompt_len)
        return number
