"""The target's first layers draft for the whole of it (LayerSkip, 2404.16710, section 4.3).

A draft pass is the first E layers, final norm and LM head, with an adapter in between if one was trained. It runs over
the target's own K/V: that of the committed tokens is there, so only the root has to be run, and then the tree grows by
one pass per depth, see expansion.py. What the passes write for these layers lies at the root's slot and at scratch
slots behind the chain, in pages that no other sequence shares; the verification computes all layers of all nodes and
writes over it. (The paper's own loop keeps the drafted K/V and verifies with the other layers only; here, nodes of
other drafters go through the same forward.)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from decoding.batcher import Chain, build
from decoding.drafters.base import DrafterContext, Needs, TokenDrafter
from decoding.drafters.exit_choice import measure_exits
from decoding.drafters.expansion import Expansion, TreeOptions
from decoding.drafters.rows import spread
from decoding.errors import ConfigError, ModelError
from decoding.plan import Plan, Quota
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from models.batch import RaggedBatch
from models.early_exit import ExitModel
from models.graphed_model import GraphedModel
from models.heads.early_exit import ExitAdapter, load_adapter
from models.kv_cache import KVCache
from models.loader import CheckpointError, resolve
from models.target import CausalModel, ExitingModel
from models.transfer import upload
from models.tree import Trees, root_masks, roots_only

logger = logging.getLogger("saccade.engine")

WORTHWHILE = 1.05  # times plain speed; an exit that promises less is not likely to be used


@dataclass(frozen=True)
class EarlyExitOptions(TreeOptions):
    """``depth`` is by default the number of speculations in the paper's code."""

    path: str = ""  # of a trained adapter; default: none
    depth: int = 6  # passes through the first layers a step
    exit_layer: int = 0  # layers that draft; 0: the adapter's, or without one chosen by measurement


def load_early_exit(options: EarlyExitOptions, context: DrafterContext) -> EarlyExitDrafter:
    """Load the adapter, if there is one, and choose the exit.

    Raises:
        ModelError: an adapter that is broken or was trained for another target.
        ConfigError: an option out of range, a target that cannot stop after some of its layers.
    """
    options.check(context.name)
    target = context.target
    if not isinstance(target, ExitingModel):
        raise ConfigError(
            f"early-exit: a {type(target).__name__} cannot stop after some of its layers; use another drafter"
        )
    adapter = _adapter(options, context)
    try:
        layer, choice = _exit_of(options, context, target, adapter)
        return EarlyExitDrafter(options, context, ExitModel(target, layer, adapter), choice)
    except ValueError as error:
        raise ConfigError(f"early-exit: {error}. Give exit_layer another value, or use another drafter") from error


def _adapter(options: EarlyExitOptions, context: DrafterContext) -> ExitAdapter | None:
    if not options.path:
        return None
    try:
        adapter = load_adapter(resolve(options.path), context.target, context.packing)
    except CheckpointError as error:
        raise ModelError(f"early-exit: {error}") from error
    if options.exit_layer not in (0, adapter.config.exit_layer):
        raise ConfigError(
            f"early-exit: the adapter {options.path} was trained for the exit after layer {adapter.config.exit_layer}, "
            f"not {options.exit_layer}; leave exit_layer out"
        )
    return adapter


def _exit_of(
    options: EarlyExitOptions, context: DrafterContext, target: ExitingModel, adapter: ExitAdapter | None
) -> tuple[int, str]:
    """The exit, and what is to be said about it."""
    if adapter is not None:
        return (
            adapter.config.exit_layer,
            f"exit after layer {adapter.config.exit_layer} of {target.num_layers}, adapted",
        )
    if options.exit_layer:
        return options.exit_layer, f"exit after layer {options.exit_layer} of {target.num_layers}, as asked for"
    vocab_size = min(context.tokenizer.vocab_size, target.vocab_size)
    choice = measure_exits(target, vocab_size, context.tokenizer.bos_token_id, options.depth)
    logger.info("early-exit %s", choice.summary())
    if choice.best.speed < WORTHWHILE:
        logger.warning(
            "early-exit promises next to nothing on this model, so its drafts will seldom be used: it is for models "
            "trained with layer dropout and early-exit loss ('saccade train layerskip', or published LayerSkip "
            "checkpoints), or with an adapter ('saccade train early-exit')"
        )
    return choice.best.layer, choice.table()


class EarlyExitDrafter(TokenDrafter):
    """One exit for all rows. It has no state of any sequence: everything is in the target's cache.

    Args:
        choice: why the model leaves where it does, for reports.
    """

    needs = Needs()  # it runs layers, if not its own

    def __init__(self, options: EarlyExitOptions, context: DrafterContext, model: ExitModel, choice: str = "") -> None:
        self.name = context.name
        self.max_depth = options.depth
        self.choice = choice
        self._options = options
        self._model: CausalModel = model if context.capture is None else GraphedModel(model, context.capture)
        self._expansion = Expansion(options, 1 << context.bit, model.max_model_len - 1, self._forward, model.logits)
        self._kv: KVCache

    def attach(self, num_pages: int, target_kv: KVCache) -> None:
        self._kv = target_kv

    def scratch_slots(self, depth: int) -> int:
        return self._options.scratch_slots(depth)

    def ready(self, sequence: Sequence) -> bool:
        return sequence.cached == sequence.length - 1

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        drafting = [
            number
            for number, (row, limit) in enumerate(zip(plan.deciding, quota.rows, strict=True))
            # the K/V of a prompt that ends in this step is yet to be written
            if limit.nodes and self.name in limit.drafters and row.length == 1
        ]
        if not drafting:
            return None
        rows = [plan.deciding[number] for number in drafting]
        chains = [Chain(row.sequence.tokens[row.start : row.end], row.start, row.sequence.pages) for row in rows]
        last = [int(row.sequence.tokens[-1]) for row in rows]
        roots, row = upload(self._model.device, np.array([last, drafting]))[0]
        trees = roots_only(roots)
        batch, _ = build(chains, trees, root_masks(len(rows), roots.device), [1] * len(rows))
        hidden = self._model.forward(batch, self._kv).hidden
        guide = quota.guide(self.name)
        limits = [self._options.depth, max(quota.rows[number].depth for number in drafting)]
        depth = min(limits if guide.depth is None else [*limits, guide.depth])
        drafted = self._expansion.grow(trees, batch, batch.at_wanted(hidden), None, row, depth, sampling, guide)
        return spread(drafted, row, plan)

    def _forward(self, batch: RaggedBatch, carry: Tensor | None, depth: int) -> tuple[Tensor, None]:
        return self._model.forward(batch, self._kv).hidden, None
