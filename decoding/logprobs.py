"""Logprobs: raw log-softmax of the target, before bias, penalties and temperature, at the nodes that were accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.messages import TokenLogprobs
from decoding.plan import Plan
from decoding.verify import Verdict
from models.target import CausalModel

CHUNK = 256  # prompt positions whose logits exist at one time


def node_logprobs(
    plan: Plan, nodes: Nodes, verdict: Verdict, logits: Tensor, vocab_size: int
) -> dict[int, list[TokenLogprobs]]:
    """For each deciding row that asked: one entry per committed token, the bonus included.

    Args:
        logits: [W, V] raw logits of the nodes.
        vocab_size: ids beyond do not count.
    """
    wishes = {
        i: row.sequence.params.logprobs
        for i, row in enumerate(plan.deciding)
        if row.sequence.params.logprobs is not None
    }
    if not wishes:
        return {}
    asked = torch.tensor(list(wishes), device=logits.device)
    roots = verdict.path.new_zeros(len(wishes), 1)
    columns = torch.cat([roots, verdict.path[asked]], dim=1)  # [A, D + 1] the nodes where the tokens were drawn
    on_path = columns >= 0
    at = (nodes.first[asked, None] + columns)[on_path]
    entries = _entries(logits[at, :vocab_size], verdict.tokens[asked][on_path], max(wishes.values()))
    result: dict[int, list[TokenLogprobs]] = {}
    for (row, top), length in zip(wishes.items(), on_path.sum(dim=1).tolist(), strict=True):
        result[row] = [TokenLogprobs(e.token_id, e.logprob, e.top[:top]) for e in entries[:length]]
        del entries[:length]
    return result


def prompt_logprobs(
    target: CausalModel, hidden: Tensor, tokens: Tensor, top: int, vocab_size: int
) -> list[TokenLogprobs]:
    """Logprobs of prompt tokens [M] from the hidden states [M, H] before each of them."""
    entries: list[TokenLogprobs] = []
    for first in range(0, len(tokens), CHUNK):
        rows, chunk = hidden[first : first + CHUNK], tokens[first : first + CHUNK]
        entries.extend(_entries(target.logits(rows)[:, :vocab_size], chunk, top))
    return entries


def _entries(logits: Tensor, tokens: Tensor, top: int) -> list[TokenLogprobs]:
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=1)
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens.tolist(), chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
