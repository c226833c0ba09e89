"""Run a ``CausalModel`` over a page cache without an engine: ragged batches built by hand, not by the batcher.

run = PagedRun(model, rows=2)
run.extend([[5, 6, 7], [8]])         # chains of two rows; logits of every token, K/V committed
run.tree(0, tokens=[9, 1, 2, 3], parents=[-1, 0, 0, 1])  # node 0 is the chain's last token; nothing is committed
greedy(model, prompt, 200)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from models.batch import PAGE_SIZE, RaggedBatch
from models.kv_cache import KVCache
from models.target import CausalModel, ForwardOutput


class PagedRun:
    """Rows of one model on their own cache. Pages are handed out in shuffled order, so that page tables matter."""

    def __init__(self, model: CausalModel, rows: int = 1, capacity: int = 1024) -> None:
        self.model = model
        per_row = -(-capacity // PAGE_SIZE)
        self.cache = KVCache(model.kv_spec, rows * per_row + 1, model.dtype, model.device)  # page 0 stays unused
        pages = list(range(1, rows * per_row + 1))
        random.Random(0).shuffle(pages)
        self.pages = [pages[row * per_row : (row + 1) * per_row] for row in range(rows)]
        self.lengths = [0] * rows  # committed tokens of each row

    def extend(self, chains: Sequence[Sequence[int]], chunk: int | None = None) -> list[Tensor]:
        """Append a chain to every row (empty: the row sits out), at most ``chunk`` tokens of each row a forward.

        Returns: per row the logits [len(chain), V] of all its tokens.
        """
        parts: list[list[Tensor]] = [[] for _ in chains]
        longest = max(len(chain) for chain in chains)
        for start in range(0, longest, chunk or longest):
            pieces = {row: list(chain[start : start + (chunk or longest)]) for row, chain in enumerate(chains)}
            pieces = {row: piece for row, piece in pieces.items() if piece}
            out = self.forward(self.batch(pieces))
            logits = self.model.logits(out.hidden).split([len(piece) for piece in pieces.values()])
            for (row, piece), piece_logits in zip(pieces.items(), logits, strict=True):
                parts[row].append(piece_logits)
                self.lengths[row] += len(piece)
        return [torch.cat(part) if part else torch.empty(0, self.model.vocab_size) for part in parts]

    def tree(self, row: int, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits [N, V] of a tree's nodes; node 0, the root, is the row's next committed token. Commits nothing."""
        batch = self.batch({row: list(tokens)}, {row: list(parents)})
        return self.model.logits(self.forward(batch).hidden)

    def forward(self, batch: RaggedBatch, taps: tuple[int, ...] = ()) -> ForwardOutput:
        batch.validate()
        with torch.inference_mode():
            return self.model.forward(batch, self.cache, taps)

    def batch(self, queries: dict[int, list[int]], trees: dict[int, list[int]] | None = None) -> RaggedBatch:
        """The batch of ``queries`` (row -> its query tokens), each a chain unless ``trees`` has its nodes' parents."""
        positions, slots, visible, masks, row_of, starts, bases = [], [], [], [], [], [0], []
        for index, (row, tokens) in enumerate(queries.items()):
            context, count = self.lengths[row], len(tokens)
            parents = (trees or {}).get(row)
            base = context if parents else context + count - 1
            depth, mask = [0] * count, [0] * count
            for query in range(count):
                if parents:
                    above = parents[query]
                    depth[query] = depth[above] + 1 if query else 0
                    mask[query] = (mask[above] if query else 0) | 1 << query
                else:
                    depth[query], mask[query] = query, int(query == count - 1)
            positions += [context + d for d in depth]
            visible += [context] * count if parents else [context + query + 1 for query in range(count - 1)] + [base]
            masks += [m - (1 << 64) if m >> 63 else m for m in mask]
            keys = range(context, context + count)
            slots += [self.pages[row][key // PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE for key in keys]
            row_of += [index] * count
            starts.append(starts[-1] + count)
            bases.append(base)

        def index_tensor(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.model.device)

        max_keys = max(self.lengths[row] + len(tokens) for row, tokens in queries.items())
        table = [self.pages[row][: -(-max_keys // PAGE_SIZE)] for row in queries]
        return RaggedBatch(
            token_ids=index_tensor([token for tokens in queries.values() for token in tokens], torch.int64),
            positions=index_tensor(positions, torch.int64),
            slots=index_tensor(slots, torch.int64),
            visible=index_tensor(visible),
            tree_mask=index_tensor(masks, torch.int64),
            row_of=index_tensor(row_of),
            row_starts=index_tensor(starts),
            tree_base=index_tensor(bases),
            page_table=index_tensor(table),
            wanted=torch.arange(starts[-1], device=self.model.device),
            max_query=max(len(tokens) for tokens in queries.values()),
            max_keys=max_keys,
        )


def greedy(model: CausalModel, prompt: Sequence[int], count: int, chunk: int | None = None) -> list[int]:
    """``count`` tokens of plain greedy decoding, one forward each; ends at no token early."""
    return greedy_rows(model, [prompt], count, chunk)[0]


def greedy_rows(
    model: CausalModel, prompts: Sequence[Sequence[int]], count: int, chunk: int | None = None
) -> list[list[int]]:
    """``greedy`` of several prompts in one ragged batch."""
    run = PagedRun(model, rows=len(prompts), capacity=max(len(prompt) for prompt in prompts) + count)
    with torch.inference_mode():
        logits = run.extend(prompts, chunk)
        texts = [[int(row[-1].argmax())] for row in logits]
        while len(texts[0]) < count:
            logits = run.extend([[text[-1]] for text in texts])
            for text, row in zip(texts, logits, strict=True):
                text.append(int(row[-1].argmax()))
    return texts
