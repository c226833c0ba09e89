"""One choice of a request as the engine sees it: its tokens, its pages, how far its K/V reaches, its accounting."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from decoding.acceptance import EXACT, Acceptance
from decoding.grammar.matcher import Matcher
from decoding.messages import DrafterStats, SpeculationStats, TokenLogprobs
from decoding.request import GREEDY_TEMPERATURE, GenerateRequest, SamplingParams, SpeculationParams

SequenceId = tuple[str, int]  # request id, choice


@dataclass
class SpeculationCounter:
    """Running totals behind SpeculationStats."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by: Counter[str] = field(default_factory=Counter)
    accepted_by: Counter[str] = field(default_factory=Counter)

    def stats(self, names: tuple[str, ...], acceptance: str = "exact") -> SpeculationStats:
        """What was counted, of each of these drafters and of others that drafted anything."""
        drafted = dict.fromkeys((*names, *self.drafted_by))
        by_drafter = {name: DrafterStats(self.drafted_by[name], self.accepted_by[name]) for name in drafted}
        return SpeculationStats(self.steps, self.drafted, self.accepted, by_drafter, acceptance)


@dataclass
class Traced:
    """How much of a sequence's steps was told."""

    steps: int = 0
    nodes: int = 0


class Sequence:
    """Tokens 0 .. length - 1 are committed; K/V of tokens 0 .. cached - 1 lies in ``pages``.

    After its first step a running sequence has cached == length - 1: the last token is the root of the next tree.
    """

    def __init__(self, request: GenerateRequest, choice: int, seed: int) -> None:
        self.request = request
        self.params: SamplingParams = request.params
        self.speculation: SpeculationParams = request.speculation
        self.is_greedy = request.params.temperature < GREEDY_TEMPERATURE
        self.allowed = np.array(request.params.allowed_token_ids, dtype=np.int64)  # [A]; none: everything is
        # drafts for texts of one kind are worth about the same
        self.kind = (self.is_greedy, bool(request.prediction_ids))
        self.choice = choice
        self.id: SequenceId = (request.request_id, choice)
        self.seed = seed
        self.prompt_len = len(request.prompt_ids)
        self.limit = self.prompt_len + request.params.max_tokens
        self._tokens = np.empty(self.limit, dtype=np.int64)
        self._tokens[: self.prompt_len] = request.prompt_ids
        self.length = self.prompt_len
        self.cached = 0
        self.pages: list[int] = []
        self.page_keys: list[bytes] = []  # prefix-cache keys of the first len(page_keys) pages
        self.marked_pages: dict[int, int] = {}  # drafter bit -> pages whose drafter K/V is flagged valid
        self.cached_prompt_tokens = 0  # of the first admission, for usage
        self.made_at = time.perf_counter()
        self.queued_seconds = 0.0  # until its first admission
        self.started = False  # its first event went out
        self.admitted = False  # it was in the batch before (a preempted sequence was)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.matcher: Matcher | None = None  # where its text stands in its grammar; None: it has none, or not yet
        self.set_back_at = -(10**9)  # length at which its matcher was last replaced; long ago: never
        self.counter = SpeculationCounter()
        self.traced = Traced()
        self.unfollowed: set[str] = set()  # drafters that the planner lets sleep through this sequence
        self.made_up = False  # by a probe and not by a client: nobody is to learn from its text

    @property
    def acceptance(self) -> Acceptance:
        """The rule that judges its drafts. Without drafts, or at temperature 0, nothing is lost."""
        wanted = self.speculation.acceptance
        return EXACT if wanted is None or self.is_greedy or not self.speculation.enabled else wanted

    @property
    def is_coupled(self) -> bool:
        """Its drafts are made with the noise that the target will draw with."""
        if self.is_greedy:
            return False
        wish = self.speculation.coupling
        return self.acceptance.rule == "exact" if wish is None else wish

    @property
    def is_ready(self) -> bool:
        """Nothing but room is missing for it to run: its grammar is compiled."""
        return self.request.grammar is None or self.matcher is not None

    @property
    def generated(self) -> int:
        return self.length - self.prompt_len

    @property
    def tokens(self) -> np.ndarray:
        """[length] int64, a view."""
        return self._tokens[: self.length]

    def append(self, token: int) -> None:
        self._tokens[self.length] = token
        self.length += 1

    def wants_prompt_logprobs(self) -> bool:
        """Prompt logprobs are asked for and not all computed yet (only choice 0 computes them)."""
        if self.params.prompt_logprobs is None or self.choice != 0:
            return False
        return self.prompt_logprobs is None or len(self.prompt_logprobs) < self.prompt_len
