"""The engine's settings. Each default is written here once; the CLI and the HTTP side read them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine is built from. Strings as on the command line; ``Engine.load`` resolves "auto"."""

    model: str  # local folder or hub id
    tokenizer: str | None = None  # default: the model's
    speculate: tuple[str, ...] = ()  # "ngram", "draft=PATH", with options "ngram:max_match=5"; () is plain decoding
    dtype: Dtype = "auto"  # auto: the checkpoint's
    quantization: str = "none"  # of the linear layers' weights, the drafters' too: none, int8
    device: str = "auto"  # cpu, cuda, cuda:1; auto: cuda if there is one
    max_model_len: int | None = None  # default: the model's
    max_num_seqs: int = 64  # choices in one batch
    max_num_batched_tokens: int = 2048  # query tokens of one step, tree nodes included
    max_nodes: int = 24  # drafted nodes of one row in a step, at most 63
    max_depth: int = 16  # depth of a tree
    plan: str = "auto"  # who decides how much is speculated: see plan_choice.py
    acceptance: str = "exact"  # of requests that name no rule; "typical:epsilon=0.09,delta=0.3,bonus=argmax" is lossy
    kv_cache_memory: int | None = None  # bytes; default: see memory_fraction on CUDA, 2 GiB on CPU
    gpu_memory_utilization: float = 0.9  # of the device's memory, weights included
    num_pages: int | None = None  # overrides the byte budgets; for tests
    prefix_caching: bool = True
    seed: int | None = None  # seed of requests that bring none (default: a random one each)
    generation_config: str = "auto"  # "auto": the model's generation_config.json; "vllm": neutral defaults
    attention: str = "auto"  # a backend of models/attention
    tensor_parallel_size: int = 1  # processes that share the target's layers, a GPU each
    draft_tensor_parallel_size: int = 1  # and a draft model's: 1, or as many
    enforce_eager: bool = False  # no CUDA graphs: every kernel of a pass is launched by itself
    threads: int | None = None  # CPU threads of the engine process; default: decoding.machine.Cores
