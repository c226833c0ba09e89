"""From logits to tokens, by the request's parameters: ``process`` (what the logits become) and ``draw`` (the token).

    x = logits + bias, bans, penalties, grammar masks          token = argmax(x)                   T < 1e-5
    F = top-k, then top-p, then min-p of x / T                 token = argmax(F(x / T) + g)        else

Both serve the target and every drafter, so a drafter guesses under the same rules as the target draws. Nothing here
sorts a vocabulary: the few best of x / T + g are tried in turn, and only if the filters drop them all is F computed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.filtered_draw import TRIED
from decoding.filters import Filters, kept
from decoding.grammar.masks import GrammarMasks
from decoding.noise import NoiseBank
from decoding.rule_table import RuleTable, make_rule_table
from decoding.sampling_ops import SamplingOps
from decoding.sequence import Sequence
from decoding.word_bans import WordBans, forbid, make_word_bans, output_tails
from models.target import Top
from models.transfer import fetch, upload
from models.tree import Trees


@dataclass(frozen=True)
class SamplingTable:
    """The sampling parameters of S sequences as tensors, made once for a set of sequences and reused while it lasts."""

    temperature: Tensor  # [S] float32; 1 for greedy sequences
    first_noise: Tensor  # [S] int64, row of the noise bank where the sequence's ring begins; -1: greedy
    coupled: Tensor | None  # [S] bool, drafts are made with the noise of the draw; None: of all sampled sequences
    filters: Filters  # of S sequences
    all_greedy: bool  # host
    filtered: tuple[int, ...]  # host: sampled sequences with a filter
    bias: Tensor | None  # [S, V] float32, if any has a bias or allowed tokens; -inf for all others
    stops: Tensor | None  # [S, V] bool, ids banned before min_tokens, if any sequence has min_tokens
    words: WordBans | None  # if any sequence has bad words
    min_tokens: Tensor  # [S] int64
    repetition: Tensor  # [S, 1] float32
    presence: Tensor  # [S, 1]
    frequency: Tensor  # [S, 1]
    penalised: tuple[int, ...]  # host: sequences with a penalty
    prompt: Tensor | None  # [S, V] bool, ids that occur in the prompt of a penalised sequence, if there is any
    rules: RuleTable
    grammars: GrammarMasks | None = None  # if any sequence has one

    @property
    def is_counted(self) -> bool:
        """Whether a sequence has min_tokens, bad words or a penalty."""
        return self.stops is not None or self.words is not None or bool(self.penalised)


def make_table(
    sequences: list[Sequence], first_noise: list[int], vocab_size: int, eos_ids: tuple[int, ...], device: torch.device
) -> SamplingTable:
    """Gather the parameters of ``sequences``."""
    params = [s.params for s in sequences]
    greedy = [s.is_greedy for s in sequences]

    def column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return upload(device, torch.tensor(list(values), dtype=dtype).numpy())[0]

    # the argmax passes every filter, so greedy sequences have none
    filters = [
        (vocab_size, 1.0, 0.0) if g else (p.top_k if p.top_k > 0 else vocab_size, p.top_p, p.min_p)
        for p, g in zip(params, greedy, strict=True)
    ]
    filtered = tuple(i for i, (k, top_p, min_p) in enumerate(filters) if k < vocab_size or top_p < 1 or min_p > 0)
    penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
    penalised = tuple(i for i, each in enumerate(penalties) if each != (1.0, 0.0, 0.0))
    coupled = [g or s.is_coupled for s, g in zip(sequences, greedy, strict=True)]
    repetition, presence, frequency = column(penalties).view(-1, 3, 1).unbind(1)  # type: ignore[arg-type]
    return SamplingTable(
        temperature=column([1.0 if g else p.temperature for p, g in zip(params, greedy, strict=True)]),
        first_noise=column(first_noise, torch.int64),
        coupled=None if all(coupled) else column(coupled, torch.bool),
        filters=Filters(
            top_k=column([k for k, _, _ in filters], torch.int64),
            top_p=column([top_p for _, top_p, _ in filters], torch.float64),
            min_p=column([min_p for _, _, min_p in filters], torch.float64),
            widest=max((k for k, _, _ in filters if k < vocab_size), default=0),
        ),
        all_greedy=all(greedy),
        filtered=filtered,
        bias=_bias(sequences, vocab_size, device),
        stops=_stops(sequences, vocab_size, eos_ids, device),
        words=make_word_bans(sequences, device),
        min_tokens=column([p.min_tokens for p in params], torch.int64),
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        penalised=penalised,
        prompt=_prompt(sequences, penalised, vocab_size, device),
        rules=make_rule_table(sequences, device),
        grammars=_grammars(sequences, vocab_size, device),
    )


def _bias(sequences: list[Sequence], vocab_size: int, device: torch.device) -> Tensor | None:
    if not any(s.params.logit_bias or s.params.allowed_token_ids for s in sequences):
        return None
    bias = torch.zeros(len(sequences), vocab_size)
    for i, sequence in enumerate(sequences):
        if len(sequence.allowed):
            bias[i] = -torch.inf
            bias[i, torch.from_numpy(sequence.allowed)] = 0.0
        for token, value in sequence.params.logit_bias.items():
            bias[i, token] += value
    return upload(device, bias.numpy())[0]


def _stops(sequences: list[Sequence], vocab_size: int, eos: tuple[int, ...], device: torch.device) -> Tensor | None:
    if not any(s.params.min_tokens for s in sequences):
        return None
    stops = torch.zeros(len(sequences), vocab_size, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        if sequence.matcher is not None:  # its mask says where it may end, and knows when it must
            continue
        stops[i, [*eos, *sequence.params.stop_token_ids]] = True
    return upload(device, stops.numpy())[0]


def _grammars(sequences: list[Sequence], vocab_size: int, device: torch.device) -> GrammarMasks | None:
    matchers = [s.matcher for s in sequences]
    if not any(matcher is not None for matcher in matchers):
        return None
    contested = any(s.params.allowed_token_ids or s.params.bad_words for s in sequences)
    return GrammarMasks(matchers, vocab_size, device, contested=contested)


def _prompt(
    sequences: list[Sequence], penalised: tuple[int, ...], vocab_size: int, device: torch.device
) -> Tensor | None:
    if not penalised:
        return None
    prompt = torch.zeros(len(sequences), vocab_size, dtype=torch.bool)
    for i in penalised:
        prompt[i, torch.from_numpy(sequences[i].tokens[: sequences[i].prompt_len])] = True
    return upload(device, prompt.numpy())[0]


@dataclass(frozen=True)
class Counts:
    """What S sequences have written when they stand at the root of this step's tree, for penalties and bans."""

    generated: Tensor | None  # [S] int64, tokens generated so far; None if no sequence has min_tokens
    output: Tensor | None  # [S, V] float32, how often a penalised sequence has each id; None if there is none
    tails: Tensor | None = None  # [S, M] int64, ends of the outputs, for bad words; None if there are none


NOT_COUNTED = Counts(None, None)


def count(sequences: list[Sequence], table: SamplingTable, vocab_size: int, device: torch.device) -> Counts:
    """The counts of ``sequences`` now."""
    if not table.is_counted:
        return NOT_COUNTED
    generated = None
    if table.stops is not None:
        [generated] = upload(device, np.array([s.generated for s in sequences]))
    tails = None if table.words is None else output_tails(sequences, table.words.reach, device)
    if not table.penalised:
        return Counts(generated, None, tails)
    output = torch.zeros(len(sequences), vocab_size)
    for i in table.penalised:
        written = torch.from_numpy(sequences[i].tokens[sequences[i].prompt_len :])
        output[i] = torch.bincount(written, minlength=vocab_size)
    return Counts(generated, upload(device, output.numpy())[0], tails)


@dataclass(frozen=True)
class Sampling:
    """Everything that ``process`` and ``draw`` need for one step: parameters, counts at the roots, noise."""

    table: SamplingTable
    counts: Counts
    noise: NoiseBank
    next_position: Tensor  # [S] int64, position of the token drawn at the root; not read if all are greedy
    vocab_size: int  # ids of the tokenizer; logits beyond are padding
    ops: SamplingOps

    def needs_paths(self, *, masked: bool = False) -> bool:
        """Whether ``process`` must know what stands between the root and a node.

        Args:
            masked: it is given the grammars' masks.
        """
        table = self.table
        return bool(table.penalised) or table.words is not None or (table.grammars is not None and not masked)

    def process(
        self,
        logits: Tensor,
        row: Tensor,
        depth: Tensor,
        paths: Tensor | None,
        ids: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """What the logits become: bias, bans, penalties, grammars, each for the node's own path.

        Args:
            logits: [W, V'] raw logits of W nodes; not changed.
            row: [W] int64, the sequence of each node.
            depth: [W] int64, tokens on the path from the root (excluded) to the node.
            paths: [W, D] int64, those tokens, padded with -1; needed only if ``needs_paths()``.
            ids: [V'] int64, the target's id of each column; rising. None: columns are ids.
            masks: what grammars allow at these nodes, see ``GrammarMasks.fill``; None: it is filled here.
        Returns:
            [W, V] with V = vocab_size; with ``ids`` [W, V'], where ids of padding have -inf.
        """
        table, x = self.table, logits
        if ids is None:
            x = x if x.shape[1] == self.vocab_size else x[:, : self.vocab_size]
        else:
            x, ids = x.masked_fill(ids >= self.vocab_size, -torch.inf), ids.clamp(max=self.vocab_size - 1)
        if table.bias is not None:
            x = x + _at(table.bias, row, ids)
        if table.stops is not None and self.counts.generated is not None:
            too_early = self.counts.generated[row] + depth < table.min_tokens[row]
            x = x.masked_fill(_at(table.stops, row, ids) & too_early[:, None], -torch.inf)
        if table.words is not None and self.counts.tails is not None:
            assert paths is not None  # needs_paths() said so
            x = forbid(x, table.words, self.counts.tails, row, depth, paths, ids)
        if table.penalised:
            x = self._penalise(x, row, paths, ids)
        if table.grammars is not None:
            if masks is None:
                assert paths is not None  # needs_paths() said so
                masks = table.grammars.fill(*fetch(row, depth, paths)())
            x = table.grammars.apply(x, masks, ids, logits)
        return x

    def permitted(self, trees: Trees) -> Trees:
        """A drafter's trees of the step's rows without the nodes that their grammars refuse."""
        return trees if self.table.grammars is None else self.table.grammars.permitted(trees)

    def draw(self, x: Tensor, row: Tensor, depth: Tensor) -> Tensor:
        """The token of each node, [W] int64, from processed logits [W, V]."""
        if self.table.all_greedy:
            return self.ops.best(x)
        temperature, noise_row = self._of_nodes(row, depth)
        if not self.table.filtered:
            return self.ops.draw(x, temperature, self.noise.vectors, noise_row)
        return self.ops.draw_filtered(x, temperature, self.noise.vectors, noise_row, self._filters(row))

    def top(self, logits: Tensor, k: int) -> Top:
        """The k likeliest of the tokenizer's ids (all of them if there are fewer) by raw logits [W, V']."""
        x = logits if logits.shape[1] == self.vocab_size else logits[:, : self.vocab_size]
        values, ids = self.ops.top(x, min(k, x.shape[1]))
        return Top(ids, values.float())

    def guess(
        self, x: Tensor, row: Tensor, depth: Tensor, k: int, tau: float, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A drafter's guesses under the request's rules, coupled to the target's draw by the same noise g.

        Args:
            x: [W, V] from ``process``.
            ids: [V] the target's id of each column of x, as given to ``process``; its noise is gathered by them, and
                the filters see the draft vocabulary only.
        Returns:
            the k largest entries of z that the filters keep: ids [W, k], best first; and their confidence
            softmax(z / tau) [W, k] float32, 0 for ids that fill up, and where nothing is possible. z = x + T * g, x at
            T = 0, x / T if not coupled.
        """
        temperature, noise_row = self._of_nodes(row, depth)
        y, k = x, min(k, x.shape[1])
        if self.table.coupled is not None:
            coupled = self.table.coupled[row]
            noise_row = torch.where(coupled, noise_row, -1)
            y = torch.where(coupled[:, None], x, x / temperature[:, None])
        tried = min(max(k, TRIED), x.shape[1]) if self.table.filtered else k
        noise = self.noise.vectors
        if ids is not None:
            noise, noise_row = self._gather_noise(noise_row, ids)
        best, confidence = self.ops.guess(y, temperature, noise, noise_row, tried, tau)
        if self.table.filtered:
            best, confidence = self._keep_guesses(x / temperature[:, None], row, best, confidence)
            best, confidence = best[:, :k].contiguous(), confidence[:, :k].contiguous()
        if self.table.bias is not None:
            confidence = confidence.nan_to_num(0.0)  # a draft vocabulary may have none of the tokens that are allowed
        return (best if ids is None else ids[best]), confidence

    def noise_row(self, row: Tensor, depth: Tensor) -> Tensor:
        """[W] the row of the noise bank for the token drawn at each node; -1 for greedy sequences."""
        return self._of_nodes(row, depth)[1]

    def _of_nodes(self, row: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """(temperature [W], row of the noise bank [W]) of nodes."""
        table = self.table
        if table.all_greedy:
            return _greedy_nodes(row.shape[0], row.device)
        return self.ops.of_nodes(table.temperature, table.first_noise, self.next_position, row, depth, self.noise.ring)

    def _gather_noise(self, noise_row: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of a draft vocabulary [W, V'], one vector a node, and which nodes have any [W]."""
        if self.table.all_greedy:
            return self.noise.vectors.new_empty(0, len(ids)), noise_row
        ids = ids.clamp(max=self.vocab_size - 1)
        gathered = self.noise.vectors[noise_row.clamp(min=0)[:, None], ids]
        own = torch.arange(len(noise_row), device=noise_row.device)
        return gathered, torch.where(noise_row < 0, noise_row, own)

    def _penalise(self, x: Tensor, row: Tensor, paths: Tensor | None, ids: Tensor | None) -> Tensor:
        table, counts = self.table, self.counts
        assert paths is not None  # needs_paths() said so
        assert counts.output is not None
        assert table.prompt is not None
        output = counts.output[row]  # [W, V], a copy
        on_path = paths >= 0
        output.scatter_add_(1, paths.clamp(min=0), on_path.to(output.dtype))
        if ids is not None:
            output = output[:, ids]
        generated = output > 0
        factor = table.repetition[row]
        repeated = torch.where(x > 0, x / factor, x * factor)
        x = torch.where(generated | _at(table.prompt, row, ids), repeated, x)
        return x - table.frequency[row] * output - table.presence[row] * generated

    def _keep_guesses(self, scaled: Tensor, row: Tensor, ids: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses that the filters keep to the front, the others' probability shared out."""
        keep = kept(scaled, self._filters(row), ids)
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
        possible = confidence * keep
        lost = (confidence - possible).sum(dim=1, keepdim=True)
        possible = (possible / (1 - lost).clamp(min=1e-6)).clamp(max=1)
        return ids.gather(1, order), possible.gather(1, order)

    def _filters(self, row: Tensor) -> Filters:
        return self.table.filters.at(row)


@functools.lru_cache(maxsize=256)  # a drafter asks for the same ones in every pass
def _greedy_nodes(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Temperature and row of the noise bank of greedy nodes; never written to."""
    return torch.ones(count, device=device), torch.full((count,), -1, device=device)


def _at(table: Tensor, row: Tensor, ids: Tensor | None) -> Tensor:
    """The rows of a table [S, V], all their columns or those of ``ids``."""
    return table[row] if ids is None else table[row[:, None], ids]
