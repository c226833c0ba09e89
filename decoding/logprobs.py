"""Logprobs: raw log-softmax of the target, before bias, penalties and temperature, at the nodes that were accepted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.messages import TokenLogprobs
from decoding.plan import Plan
from decoding.verify import Verdict
from models.target import CausalModel
from models.transfer import fetch, upload

CHUNK = 256  # prompt positions whose logits exist at one time


@dataclass(frozen=True)
class Logprobs:
    """Of M tokens, on the device."""

    tokens: Tensor  # [M] int64; -1 where there is none
    chosen: Tensor  # [M] the tokens' own
    rank: Tensor  # [M] int64, 1 and how many tokens are more probable
    top_ids: Tensor  # [M, K] int64, the most probable tokens
    top: Tensor  # [M, K] theirs

    @staticmethod
    def of(logits: Tensor, tokens: Tensor, top: int) -> Logprobs:
        """From logits [M, V] before the tokens [M]."""
        logprobs = logits.log_softmax(dim=-1)
        best = logprobs.topk(min(top, logprobs.shape[1]), dim=1)
        chosen = logprobs.gather(1, tokens[:, None])
        rank = 1 + (logprobs > chosen).sum(dim=1)
        return Logprobs(tokens, chosen.squeeze(1), rank, best.indices, best.values)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is to be fetched for ``entries``."""
        return self.tokens, self.chosen, self.rank, self.top_ids, self.top


def entries(fetched: list[np.ndarray]) -> list[TokenLogprobs]:
    """One for each token, from ``Logprobs.tensors`` on the host."""
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)), rank)
        for token, logprob, rank, ids, values in zip(*(each.tolist() for each in fetched), strict=True)
    ]


def wishes_of(plan: Plan) -> dict[int, int]:
    """The deciding rows that asked for logprobs, and for how many of the most probable tokens."""
    wishes = {i: row.sequence.params.logprobs for i, row in enumerate(plan.deciding)}
    return {row: top for row, top in wishes.items() if top is not None}


def node_logprobs(wishes: dict[int, int], nodes: Nodes, verdict: Verdict, logits: Tensor, vocab_size: int) -> Logprobs:
    """Of the rows that asked, D + 1 entries each: the accepted tokens, the bonus, then what is not to be looked at.

    Args:
        wishes: of at least one row.
        logits: [W, V] raw logits of the nodes.
        vocab_size: ids beyond are padding and do not count.
    """
    [asked] = upload(logits.device, np.array(list(wishes)))
    roots = verdict.path.new_zeros(len(wishes), 1)
    columns = torch.cat([roots, verdict.path[asked]], dim=1).clamp(min=0)  # the nodes where the tokens were drawn
    at = (nodes.first[asked, None] + columns).flatten()
    tokens = verdict.tokens[asked].flatten()
    made = Logprobs.of(logits[at, :vocab_size], tokens.clamp(min=0), max(wishes.values()))
    return replace(made, tokens=tokens)


def by_row(wishes: dict[int, int], fetched: list[np.ndarray]) -> dict[int, list[TokenLogprobs]]:
    """For each row that asked: one entry per committed token, the bonus included, from ``node_logprobs`` fetched."""
    known = entries(fetched)
    size = len(known) // len(wishes)
    return {
        row: [_cut(entry, top) for entry in known[i * size :][:size] if entry.token_id >= 0]
        for i, (row, top) in enumerate(wishes.items())
    }


def _cut(entry: TokenLogprobs, top: int) -> TokenLogprobs:
    return TokenLogprobs(entry.token_id, entry.logprob, entry.top[:top], entry.rank)


def prompt_logprobs(
    target: CausalModel, hidden: Tensor, tokens: Tensor, top: int, vocab_size: int
) -> list[TokenLogprobs]:
    """Logprobs of prompt tokens [M] from the hidden states [M, H] before each of them."""
    known: list[TokenLogprobs] = []
    for first in range(0, len(tokens), CHUNK):
        rows, chunk = hidden[first : first + CHUNK], tokens[first : first + CHUNK]
        known += entries(fetch(*Logprobs.of(target.logits(rows)[:, :vocab_size], chunk, top).tensors)())
    return known
