"""How many pages the pool has: as given, from a byte budget, or from what a CUDA device has left."""

from __future__ import annotations

import torch

from decoding.cache import pages_for
from decoding.config import EngineConfig
from decoding.errors import ConfigError
from models.batch import PAGE_SIZE
from models.kv_cache import KVSpec
from models.target import CausalModel

CPU_BUDGET = 2 * 2**30  # bytes, unless --kv-cache-memory says otherwise
LOGITS_PEAK = 4  # float32 copies of a step's logits that may be alive at one time


def pool_size(config: EngineConfig, target: CausalModel, specs: list[KVSpec], page_bytes: int) -> int:
    """Pages for the K/V of the target and the drafters together.

    Args:
        specs: of the target and of the drafters that have K/V.
        page_bytes: what else is kept with a page.

    Raises:
        ConfigError: too little memory for one request of the model's full length; the message names the flags.
    """
    scratch = sum(spec.bytes_per_page(target.dtype) for spec in specs)  # a page of each beside the pool's
    page = scratch + page_bytes
    longest = pages_for(target.max_model_len)
    if config.num_pages is not None:
        if config.num_pages < 1:
            raise ConfigError(f"--num-pages must be at least 1, not {config.num_pages}")
        return config.num_pages
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
    elif target.device.type == "cuda":
        budget = _device_budget(config, target)
    else:
        budget = CPU_BUDGET
    pages = max(0, budget - scratch) // page
    if pages < longest:
        least = -(-(longest * page + scratch) // 2**20)
        raise ConfigError(
            f"{budget / 2**20:.3g} MiB hold {pages * PAGE_SIZE} tokens of K/V, less than the context length "
            f"{target.max_model_len}; raise --kv-cache-memory to at least {least}MiB (on CUDA "
            "also --gpu-memory-utilization), or lower --max-model-len"
        )
    return int(pages)


def _device_budget(config: EngineConfig, target: CausalModel) -> int:
    """The share of the device's memory that is left beside weights, activations and logits."""
    free, total = torch.cuda.mem_get_info(target.device)
    # not profiled: an estimate of a step's activations (hidden states, MLP, fused QKV: about 16 H a token) and logits
    activations = config.max_num_batched_tokens * 16 * target.hidden_size * target.dtype.itemsize
    nodes = min(config.max_num_batched_tokens, config.max_num_seqs * (1 + config.max_nodes))
    logits = LOGITS_PEAK * nodes * target.vocab_size * 4
    return int(free - (1 - config.gpu_memory_utilization) * total - activations - logits)
