"""What a drafter is. See docs/add-a-drafter.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from decoding.batcher import Nodes
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence, SequenceId
from decoding.text import Tokenizer
from decoding.verify import Verdict
from models.batch import MAX_TREE, RaggedBatch
from models.graphs import Capture
from models.kv_cache import KVCache, KVSpec
from models.layers.linear import Packing
from models.layers.quantization import packing_of
from models.parallel.driver import Driver
from models.target import CausalModel, ForwardOutput
from models.tree import Trees


@dataclass(frozen=True)
class Needs:
    """What a drafter wants from the engine beside the tokens."""

    kv: KVSpec | None = None  # own K/V layers on the shared pages
    taps: tuple[int, ...] = ()  # target's hidden states, see ForwardOutput.taps
    top: int = 0  # the k likeliest tokens at each node of the steps in which it is asked, see ForwardOutput.top
    page_bytes: int = 0  # kept with each page beside K/V
    host: bool = False  # runs no model: proposes on the host, trees of the host, at next to no cost
    fixed_tree: bool = False  # all its nodes are wanted, however improbable; --max-nodes and --max-depth still hold
    draws: bool = False  # the token drawn at every verified node, in ``Verdict.drawn``
    pins: bool = False  # it pins nodes, see ``Trees``: these cost whatever they promise, and its gain comes later
    recalls: bool = False  # what it drafts can come from texts of other requests, those of the same cache_salt
    automatic: bool = False  # it is there without being asked for, for requests with a grammar


@runtime_checkable
class BoundedOptions(Protocol):
    """Options of a drafter that remembers past texts."""

    def memory_bound(self, vocab_size: int) -> int:
        """Bytes that this may take at most, beside what rows under way take."""
        ...


@dataclass(frozen=True)
class DrafterContext:
    """What a drafter is built from."""

    name: str
    bit: int  # the drafter's number: bit of Trees.source and of a page's valid flags
    target: CausalModel
    tokenizer: Tokenizer
    dtype: torch.dtype
    device: torch.device
    attention: str  # backend for models of the drafter's own
    max_model_len: int
    max_step_tokens: int  # query tokens that one forward pass may have
    target_folder: Path | None = None  # where the target was loaded from, for drafters that lie beside it
    capture: Capture | None = None  # records the passes of the drafter's own model; None: they run as they are
    quantization: str = "none"  # of the drafter's own weights, a key of models.layers.quantization.FORMATS
    driver: Driver | None = None  # of the ranks that share the drafter's own model; None: it is this process's alone

    @property
    def packing(self) -> Packing | None:
        """The same for ``Linear.pack``."""
        return packing_of(self.quantization, self.device, self.dtype)


class Drafter(Protocol):
    """Proposes trees. It never sees other drafters or how verdicts are made; whatever it does, the text is the same."""

    name: str
    needs: Needs
    max_depth: int  # of its trees

    def attach(self, num_pages: int, target_kv: KVCache) -> None:
        """Allocate own K/V for this many pages; called once, before anything else.

        Args:
            target_kv: the target's. A drafter that runs the target's own layers reads it, and writes its scratch slots.
        """
        ...

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        """A sequence joins the batch; the drafter's own K/V of its first ``cached_tokens`` tokens is in its pages."""
        ...

    def scratch_slots(self, depth: int) -> int:
        """Slots behind the chain that ``propose`` writes to when it drafts this deep."""
        ...

    def ready(self, sequence: Sequence) -> bool:
        """Whether it could draft for a deciding row of this sequence now."""
        ...

    def backlog(self, sequence: Sequence) -> int:
        """Tokens that its model has to run before it can draft for the sequence."""
        ...

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        """Trees of the plan's deciding rows, in their order (a bare root where there is nothing to propose).

        May be more than the quota; the planner cuts. Nothing is drafted where the quota's row does not name the
        drafter. A confidence of NaN says that the model behind it is broken, and counts for nothing. None: nothing for
        any row.
        """
        ...

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """The step's outcome: the accepted K/V is in place, the tokens are not yet appended."""
        ...

    def read_prompts(self) -> list[Sequence]:
        """Run what ``observe`` saw of prompts, if that takes a model: the tokens of that step are out by now.

        Called before the next step is planned, so that whoever joins it finds the K/V.

        Returns:
            the sequences whose ``valid_length`` may have grown by it.
        """
        ...

    def valid_length(self, sequence: Sequence) -> int:
        """Up to where the sequence's pages hold this drafter's K/V; 0 for drafters without."""
        ...

    def forget(self, sequence: SequenceId) -> None:
        """The sequence ended or lost its pages."""
        ...

    def close(self) -> None:
        """The engine is done, for now at least: keep what is to outlive it."""
        ...


@runtime_checkable
class ChoosingDrafter(Drafter, Protocol):
    """A drafter that settles something about itself when it is loaded."""

    choice: str  # what, and why, for reports


class TokenDrafter:
    """Base of drafters that need nothing but the tokens: no K/V, no state per sequence."""

    needs = Needs(host=True)
    max_depth = MAX_TREE - 1

    def attach(self, num_pages: int, target_kv: KVCache) -> None:
        """Nothing to allocate."""

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        """Nothing to remember."""

    def scratch_slots(self, depth: int) -> int:
        return 0

    def ready(self, sequence: Sequence) -> bool:
        return True

    def backlog(self, sequence: Sequence) -> int:
        return 0

    def observe(self, plan: Plan, batch: RaggedBatch, nodes: Nodes, out: ForwardOutput, verdict: Verdict) -> None:
        """Nothing to learn."""

    def read_prompts(self) -> list[Sequence]:
        return []

    def valid_length(self, sequence: Sequence) -> int:
        return 0

    def forget(self, sequence: SequenceId) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Nothing to keep."""
