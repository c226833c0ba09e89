"""``bad_words``: token sequences that an output must not have, at every node of every tree.

The last token of such a sequence is banned where the others stand before it, in the output or on the node's path.
Words count from the beginning of the output, as in vLLM: what the prompt ends in does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.sequence import Sequence
from models.transfer import upload

ANYTHING = -1  # stands before a word that is shorter than the longest one
NOTHING = -2  # what the output has before its first token, and where a path is not known: no word has it


@dataclass(frozen=True)
class WordBans:
    """The words of S sequences, at most B of each, of at most M + 1 tokens."""

    before: Tensor  # [S, B, M] int64, the tokens before the last one, on the right; ANYTHING to the left of them
    last: Tensor  # [S, B] int64
    there: Tensor  # [S, B] bool, false for padding

    @property
    def reach(self) -> int:
        """M: how many tokens before the drawn one matter."""
        return int(self.before.shape[2])


def make_word_bans(sequences: list[Sequence], device: torch.device) -> WordBans | None:
    """The words of these sequences; None if they have none."""
    words = [sequence.params.bad_words for sequence in sequences]
    most = max((len(each) for each in words), default=0)
    if not most:
        return None
    reach = max(len(word) for each in words for word in each) - 1
    before = np.full((len(words), most, reach), ANYTHING, dtype=np.int64)
    last, there = np.zeros((len(words), most), dtype=np.int64), np.zeros((len(words), most), dtype=np.bool_)
    for row, each in enumerate(words):
        for number, (*others, end) in enumerate(each):
            before[row, number, reach - len(others) :] = others
            last[row, number], there[row, number] = end, True
    return WordBans(*upload(device, before, last, there))


def output_tails(sequences: list[Sequence], reach: int, device: torch.device) -> Tensor:
    """[S, M] int64, the last M tokens of each output so far, on the right; NOTHING to the left of them."""
    tails = np.full((len(sequences), reach), NOTHING, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        count = min(sequence.generated, reach)
        tails[row, reach - count :] = sequence.tokens[sequence.length - count :]
    return upload(device, tails)[0]


def forbid(
    x: Tensor, bans: WordBans, tails: Tensor, row: Tensor, depth: Tensor, paths: Tensor, ids: Tensor | None
) -> Tensor:
    """The logits with -inf where a token would complete a word.

    Args:
        x: [W, V] logits of nodes.
        tails: [S, M] ``output_tails``.
        row, depth: [W] of the nodes.
        paths: [W, D] tokens below the root, padded with -1.
        ids: [V] the target's id of each column, rising; None: columns are ids.
    """
    words = bans.last[row]  # [W, B]
    complete = bans.there[row]
    recent = _recent(tails[row], depth, paths)  # [W, M]
    for place in range(bans.reach):
        wanted = bans.before[row, :, place]
        complete = complete & ((wanted == ANYTHING) | (wanted == recent[:, place, None]))
    if ids is not None:
        columns = torch.searchsorted(ids, words).clamp(max=len(ids) - 1)
        complete, words = complete & (ids[columns] == words), columns
    # by the smallest, because two words may end in one token
    ceiling = torch.full_like(words, torch.inf, dtype=x.dtype).masked_fill(complete, -torch.inf)
    return x.scatter_reduce(1, words, ceiling, "amin")


def _recent(tails: Tensor, depth: Tensor, paths: Tensor) -> Tensor:
    """[W, M] the last M tokens before what is drawn at each node."""
    text = torch.cat([tails, torch.where(paths < 0, NOTHING, paths)], dim=1)
    places = depth[:, None] + torch.arange(tails.shape[1], device=depth.device)
    return text.gather(1, places.clamp(max=text.shape[1] - 1))
