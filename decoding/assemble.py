"""From settings to the parts of an engine: model, drafters, memory, and the collaborators of a step."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decoding.auto_planner import AutoPlanner
from decoding.cache import SequenceCache, pages_for
from decoding.commit import Committer
from decoding.config import EngineConfig
from decoding.costs import CostModel, guessed_table
from decoding.drafters import DrafterChoice
from decoding.drafters.base import Drafter, DrafterContext
from decoding.drafters.forced import ForcedDrafter
from decoding.drafters.team import DrafterTeam
from decoding.errors import ConfigError, ModelError, nearest
from decoding.memory import pool_size, room_for_weights
from decoding.noise import NoiseBank
from decoding.plan_choice import FixedPlan, parse_plan
from decoding.planner import Planner, StaticPlanner
from decoding.prefix_cache import PrefixCache
from decoding.proposal_ops import load_proposal_ops
from decoding.ranks import OtherRanks, start_ranks
from decoding.sampler import Sampler
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from decoding.step import Stepper
from decoding.step_ops import StepOps, load_step_ops
from decoding.text import Tokenizer
from decoding.verify import Rule, rule_by_request
from models.attention import BACKENDS
from models.batch import MAX_TREE, PAGE_SIZE
from models.graphed_model import GraphedModel
from models.graphs import Capture, CudaCapture
from models.layers.quantization import FORMATS
from models.loader import CheckpointError, check_ranks, generation_config, load_model, read_config, resolve
from models.target import CausalModel
from models.tree_ops import TreeOps

logger = logging.getLogger("saccade.engine")

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class LoadedModel:
    """A target with what its folder says about using it."""

    target: CausalModel
    tokenizer: Tokenizer
    vocab_size: int  # ids that can be drawn
    eos_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    folder: Path | None = None  # None: not loaded but made
    capture: Capture | None = None  # records the passes of target and drafters; None: they run as they are
    ranks: OtherRanks | None = None  # that share the target with this process

    def close(self) -> None:
        """End the other ranks; the target cannot be used any more, where there are any."""
        if self.ranks is not None:
            self.ranks.close()


def load_target(config: EngineConfig, ranks: OtherRanks | None = None) -> LoadedModel:
    """Load the target and its tokenizer.

    Args:
        ranks: the other ranks; default: they are started where the configuration asks for them.

    Raises:
        ModelError: a checkpoint that cannot be loaded; the message names cause and fix.
        ConfigError: an unknown device, attention backend or quantization, or one that does not work here; too little
            memory; more ranks than there are devices.
    """
    if config.attention not in (*BACKENDS, "auto"):
        raise ConfigError(f"unknown --attention {config.attention!r}: {nearest(config.attention, (*BACKENDS, 'auto'))}")
    if config.quantization not in FORMATS:
        raise ConfigError(f"unknown --quantization {config.quantization!r}: {nearest(config.quantization, FORMATS)}")
    try:
        folder, device = resolve(config.model), resolve_device(config.device)
        check_ranks(folder, config.tensor_parallel_size)
        ranks = ranks or start_ranks(config, device)
        return _load(config, folder, device, ranks)
    except BaseException as error:
        if ranks is not None:
            ranks.close()
        if isinstance(error, CheckpointError):
            raise ModelError(str(error)) from error
        if isinstance(error, RuntimeError):  # a named backend without its kernels, a device out of memory
            raise ConfigError(f"{config.model} cannot be loaded on {config.device}: {error}") from error
        raise


def _load(config: EngineConfig, folder: Path, device: torch.device, ranks: OtherRanks | None) -> LoadedModel:
    load = load_model if ranks is None else ranks.driver.load
    target = load(
        folder,
        dtype=config.dtype,
        device=device if ranks is None else ranks.driver.device,
        attention=config.attention,
        max_model_len=config.max_model_len,
        quantization=config.quantization,
        room=room_for_weights(config, device),
    )
    generation = generation_config(folder)
    defaults = _sampling_defaults(config.generation_config, generation)
    tokenizer = Tokenizer.load(resolve(config.tokenizer) if config.tokenizer else folder)
    eos = generation.get("eos_token_id", read_config(folder).get("eos_token_id"))
    if eos is None:
        eos = tokenizer.eos_token_id
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    vocab_size = min(tokenizer.vocab_size, target.vocab_size)
    eos_ids = tuple(int(token) for token in listed if 0 <= token < vocab_size)  # others cannot be drawn
    # not under tensor parallelism: no pass with sums over ranks was ever recorded
    records = target.device.type == "cuda" and not config.enforce_eager and ranks is None
    capture = CudaCapture(target.device) if records else None
    return LoadedModel(target, tokenizer, vocab_size, eos_ids, defaults, folder, capture, ranks)


def _sampling_defaults(chosen: str, models_own: dict[str, Any]) -> dict[str, float]:
    """The defaults that ``--generation-config`` asks for: of the model, of another folder, or none."""
    if chosen == "vllm":
        return {}
    if chosen != "auto" and not (Path(chosen) / "generation_config.json").is_file():
        raise ConfigError(f"--generation-config {chosen} has no generation_config.json; give its folder, auto or vllm")
    source = models_own if chosen == "auto" else generation_config(Path(chosen))
    return {name: float(source[name]) for name in SAMPLING_DEFAULTS if source.get(name) is not None}


def resolve_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one. A numbered CUDA device becomes the current one of this process.

    Raises:
        ConfigError: unknown device, or CUDA asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available to this torch; use --device cpu, or install a CUDA build")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current device, whatever its tensors say
    return device


def build_drafters(config: EngineConfig, loaded: LoadedModel) -> list[Drafter]:
    """The drafters of ``--speculate``, in its order.

    Raises:
        ConfigError: unknown names or options, the same drafter twice.
    """
    choices = [DrafterChoice.parse(text) for text in config.speculate]
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--speculate {name} is given twice; leave one out")
    return [
        choice.build(
            DrafterContext(
                name=choice.name,
                bit=bit,
                target=loaded.target,
                tokenizer=loaded.tokenizer,
                dtype=loaded.target.dtype,
                device=loaded.target.device,
                attention=config.attention,
                max_model_len=loaded.target.max_model_len,
                max_step_tokens=config.max_num_batched_tokens,
                target_folder=loaded.folder,
                quantization=config.quantization,
                capture=loaded.capture,
                driver=loaded.ranks.driver if loaded.ranks and config.draft_tensor_parallel_size > 1 else None,
            )
        )
        for bit, choice in enumerate(choices)
    ]


def build_stepper(
    config: EngineConfig,
    loaded: LoadedModel,
    drafters: list[Drafter],
    rule: Rule | None = None,
    ops: StepOps | None = None,
) -> Stepper:
    """Size the pool, allocate K/V, and put the collaborators together.

    Args:
        ops: default: the best for the target's device.
        rule: judges all requests alike, in place of the rule that each asks for.

    Raises:
        ConfigError: settings that cannot work together, or too little memory.
    """
    check_limits(config)
    target, device = loaded.target, loaded.target.device
    ops = ops or load_step_ops(device)
    drafters = [*drafters, ForcedDrafter(len(drafters))]
    team = DrafterTeam(drafters)
    specs = [target.kv_spec, *(d.needs.kv for d in drafters if d.needs.kv is not None)]
    num_pages = pool_size(config, target, specs, sum(d.needs.page_bytes for d in drafters), loaded.ranks)
    kv = target.new_cache(num_pages)
    for drafter in drafters:
        drafter.attach(num_pages, kv)
    prefixes = PrefixCache(num_pages, enabled=config.prefix_caching)
    cache = SequenceCache(kv, prefixes, team.valid_length, team.kv_bits, ops.moves)

    def admit(sequence: Sequence, page_flags: list[int]) -> None:
        if not sequence.admitted:
            sequence.admitted, sequence.cached_prompt_tokens = True, sequence.cached
            committer.totals.prompt_tokens += sequence.prompt_len
            committer.totals.cached_prompt_tokens += sequence.cached
            sequence.queued_seconds = time.perf_counter() - sequence.made_at
            committer.totals.counts.left_queue(sequence.queued_seconds)
        team.admit(sequence, page_flags)

    def preempted(sequence: Sequence) -> None:
        team.forget(sequence.id)
        planner.forget(sequence)

    scheduler = Scheduler(
        cache,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_num_batched_tokens,
        num_pages=num_pages,
        on_admit=admit,
        on_preempt=preempted,
    )
    noise = NoiseBank(loaded.vocab_size, deepest_tree(config) + 2, device, ops.sampling.fill_noise)
    sampler = Sampler(noise, ops.sampling, loaded.vocab_size, loaded.eos_ids, device)
    planner = build_planner(config, cache, drafters, ops.tree, device)
    committer = Committer(target, cache, scheduler, sampler, team, planner, loaded.vocab_size, loaded.eos_ids)
    longest = pages_for(target.max_model_len)
    logger.info(
        "K/V pool: %d pages of %d tokens (%d tokens; the longest request needs %d pages)",
        num_pages,
        PAGE_SIZE,
        num_pages * PAGE_SIZE,
        longest,
    )
    model = target if loaded.capture is None else GraphedModel(target, loaded.capture)
    return Stepper(model, cache, scheduler, planner, sampler, team, rule or rule_by_request(ops.tree), committer)


def deepest_tree(config: EngineConfig) -> int:
    """The depth that no tree exceeds."""
    fixed = parse_plan(config.plan)
    return config.max_depth if fixed is None or fixed.depth is None else fixed.depth


def build_planner(
    config: EngineConfig, cache: SequenceCache, drafters: list[Drafter], tree_ops: TreeOps, device: torch.device
) -> Planner:
    """The planner of ``--plan``.

    Raises:
        ConfigError: an unknown plan, or options that it does not have.
    """
    fixed = parse_plan(config.plan)
    chosen = tuple(drafter.name for drafter in drafters if not drafter.needs.automatic)
    if fixed is None and not chosen:
        fixed = FixedPlan()  # nothing to weigh, nor to learn
    if fixed is None:
        return AutoPlanner(
            cache,
            drafters,
            tree_ops,
            load_proposal_ops(device),
            CostModel(guessed_table(chosen), config.max_num_batched_tokens + MAX_TREE),
            max_nodes=config.max_nodes,
            max_depth=config.max_depth,
            max_step_tokens=config.max_num_batched_tokens,
            device=device,
        )
    return StaticPlanner(
        cache,
        drafters,
        tree_ops,
        max_nodes=config.max_nodes if fixed.nodes is None else fixed.nodes,
        max_depth=config.max_depth if fixed.depth is None else fixed.depth,
        max_step_tokens=config.max_num_batched_tokens,
        min_probability=fixed.min_probability,
    )


def check_limits(config: EngineConfig) -> None:
    """Ranges of the settings that belong to no part of their own.

    Raises:
        ConfigError: naming the flag.
    """
    if not 0 <= config.max_nodes <= 63:
        raise ConfigError(
            f"--max-nodes must be in 0 .. 63 (a tree has 64 nodes, root included), not {config.max_nodes}"
        )
    if not 0 <= config.max_depth <= 63:
        raise ConfigError(f"--max-depth must be in 0 .. 63, not {config.max_depth}")
    if config.max_num_seqs < 1:
        raise ConfigError(f"--max-num-seqs must be at least 1, not {config.max_num_seqs}")
    if config.max_num_batched_tokens < 1:
        raise ConfigError(f"--max-num-batched-tokens must be at least 1, not {config.max_num_batched_tokens}")
