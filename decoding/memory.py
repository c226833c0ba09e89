"""What fits: whether weights and pool do, and how many pages the pool has.

The number of pages is as given, from a byte budget, or from what is left beside the weights.
"""

from __future__ import annotations

import logging

import torch

from decoding.cache import pages_for
from decoding.config import EngineConfig
from decoding.errors import ConfigError
from decoding.filtered_draw import SORTED
from decoding.machine import available_memory
from decoding.ranks import OtherRanks
from models.batch import PAGE_SIZE
from models.kv_cache import KVSpec
from models.target import CausalModel

logger = logging.getLogger("saccade.engine")

CPU_BUDGET = 2 * 2**30  # bytes, unless --kv-cache-memory says otherwise or the machine has less
CPU_SHARE = 0.8  # of the memory that is left beside the weights, for a pool of no given size
LOGITS_PEAK = 4  # float32 copies of a step's logits that may be alive at one time
SORT_BYTES = 40  # of each id of a vocabulary that is sorted for top-k or top-p on CUDA
GRAPHS = 2**30  # bytes that recorded passes are given on CUDA: an allowance, not a measurement


def pool_size(
    config: EngineConfig, target: CausalModel, specs: list[KVSpec], page_bytes: int, ranks: OtherRanks | None = None
) -> int:
    """Pages for the K/V of the target and the drafters together.

    On a CPU the budget is that of all ranks together, on CUDA that of each rank's device. There rank 0, which has the
    drafters, too, has most to hold.

    Args:
        specs: of the target and of the drafters that have K/V.
        page_bytes: what else is kept with a page.
        ranks: the other ranks, if there are any.

    Raises:
        ConfigError: too little memory for one request of the model's full length; the message names the flags.
    """
    on_cpu = target.device.type == "cpu"
    available = available_memory() if on_cpu else None
    # a page of each beside the pool's
    scratch = sum(spec.bytes_per_page(target.dtype) * (spec.ranks if on_cpu else 1) for spec in specs)
    page = scratch + page_bytes
    longest = pages_for(target.max_model_len)
    if config.num_pages is not None:
        if config.num_pages < 1:
            raise ConfigError(f"--num-pages must be at least 1, not {config.num_pages}")
        _check_pool(config.num_pages * page + scratch, available, "--num-pages")
        return config.num_pages
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
        _check_pool(budget, available, "--kv-cache-memory")
    elif target.device.type == "cuda":
        budget = _device_budget(config, target, ranks)
    else:
        budget = _cpu_budget(available)
    pages = max(0, budget - scratch) // page
    if pages < longest:
        least = -(-(longest * page + scratch) // 2**20)
        raise ConfigError(
            f"{budget / 2**20:.3g} MiB hold {pages * PAGE_SIZE} tokens of K/V, less than the context length "
            f"{target.max_model_len}; raise --kv-cache-memory to at least {least}MiB (on CUDA "
            "also --gpu-memory-utilization), or lower --max-model-len"
        )
    return int(pages)


def room_for_weights(config: EngineConfig, device: torch.device) -> int | None:
    """Bytes that weights may take on a CPU before the kernel would end the process; None: not known, or not a CPU.

    Raises:
        ConfigError: the pool alone is too large.
    """
    available, pool = available_memory() if device.type == "cpu" else None, config.kv_cache_memory or 0
    _check_pool(pool, available, "--kv-cache-memory")
    return None if available is None else available - pool


def _check_pool(pool: int, available: int | None, flag: str) -> None:
    if available is not None and pool > available:
        raise ConfigError(
            f"a K/V pool of {_gib(pool)} does not fit the {_gib(available)} of memory that are free (of the machine's "
            f"and the container's, beside what is loaded); lower {flag}, or raise the limit"
        )


def _cpu_budget(available: int | None) -> int:
    """The default, or less where there is less."""
    if available is None or available * CPU_SHARE >= CPU_BUDGET:
        return CPU_BUDGET
    budget = int(available * CPU_SHARE)
    logger.warning(
        "the K/V pool gets %s in place of %s: that is %.0f%% of the memory that is free beside the weights; "
        "--kv-cache-memory sets another size",
        _gib(budget),
        _gib(CPU_BUDGET),
        100 * CPU_SHARE,
    )
    return budget


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"


def _device_budget(config: EngineConfig, target: CausalModel, ranks: OtherRanks | None) -> int:
    """The share of the device's memory that is left beside weights, activations and logits; of the fullest device."""
    free, total = torch.cuda.mem_get_info(target.device)
    if ranks is not None:
        free = min(free, *ranks.driver.free_memory())
    # not profiled: an estimate of a step's activations (hidden states, MLP, fused QKV: about 16 H a token) and logits
    activations = config.max_num_batched_tokens * 16 * target.hidden_size * target.dtype.itemsize
    nodes = min(config.max_num_batched_tokens, config.max_num_seqs * (1 + config.max_nodes))
    logits = LOGITS_PEAK * nodes * target.vocab_size * 4
    sorting = SORTED * target.vocab_size * SORT_BYTES
    ring = config.max_depth + 2
    noise = 2 * config.max_num_seqs * ring * target.vocab_size * 4  # twice: when it grows, old and new are there
    graphs = 0 if config.enforce_eager else GRAPHS
    spent = activations + logits + sorting + noise + graphs
    return int(free - (1 - config.gpu_memory_utilization) * total - spent)
