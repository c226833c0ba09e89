"""Any causal LM of the transformers library over ragged batches and our paged cache.

``load_transformers_model`` loads a checkpoint with transformers' own classes and puts our attention in the place of
theirs through the library's attention interface: each layer hands over query, key and value, the hook stores key and
value in the page cache and asks an attention backend. Whether that is enough for a family to compute what it should is
not looked up in a list but checked when the model is loaded: models/transformers_inspection.py observes what it asks of
attention, models/transformers_comparison.py compares its logits. What fails is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import ModelOutput

from models.attention import AttentionBackend, AttentionSpec, load_backend
from models.batch import RaggedBatch
from models.checkpoint import CheckpointError
from models.kv_cache import KVCache, KVSpec
from models.target import ForwardOutput, Trunk, check_exit
from models.transformers_checkpoint import context_length, freeze_rope, load_checkpoint
from models.transformers_comparison import compare_exit, compare_with, reference_logits
from models.transformers_inspection import Inspection, decoder_of, inspect_attention_layers, set_attention

PAGED_ATTENTION = "saccade_paged"  # our name in transformers' table of attention functions
MODEL_FAILURES = (  # what foreign model code raises when it is run in a way that it does not support
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    LookupError,
    NotImplementedError,
)


@dataclass(frozen=True)
class PagedStep:
    """What the attention hook needs of one forward pass. It travels through the model's keyword arguments."""

    batch: RaggedBatch
    cache: KVCache
    attend: AttentionBackend
    specs: tuple[AttentionSpec, ...]  # one per layer


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: None,
    *,
    saccade_step: PagedStep,
    s_aux: Tensor | None = None,  # [Hq], attention sinks
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention in the form that transformers calls: store K/V, attend, return ([1, T, Hq, Dv], None)."""
    step, layer = saccade_step, int(module.layer_idx)  # type: ignore[arg-type]
    dtype = step.cache.keys.dtype
    step.cache.write(layer, step.batch.slots, key[0].transpose(0, 1).to(dtype), value[0].transpose(0, 1).to(dtype))
    keys, values = step.cache.layer(layer)
    packed = query[0].transpose(0, 1).to(dtype).contiguous()  # [T, Hq, D]
    out = step.attend(packed, keys, values, step.batch, step.specs[layer], s_aux)  # [T, Hq, Dv]
    return out[None].to(value.dtype), None


class _Replay(nn.Module):
    """Stands where the decoder stood and returns its input as the decoder's output."""

    def __init__(self, output_type: type[ModelOutput]) -> None:
        super().__init__()
        self.output_type = output_type

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> ModelOutput:
        return self.output_type(last_hidden_state=inputs_embeds)


def head_of(model: PreTrainedModel, output_type: type[ModelOutput]) -> nn.Module:
    """``model`` without its decoder: called with ``inputs_embeds`` = final hidden states, it returns their logits.

    It is the family's own forward (scaling, soft caps, projections), sharing the weights of ``model``, which stays as
    it is: only the modules on the way to the decoder are copied, shallowly.
    """
    return _with_part(model, decoder_of(model), _Replay(output_type))


def cut_decoder(decoder: nn.Module, layers: tuple[nn.Module, ...], count: int) -> nn.Module:
    """``decoder`` with the first ``count`` of its ``layers``, in the same way: a copy of modules, not of weights."""
    stack = next(m for m in decoder.modules() if isinstance(m, nn.ModuleList) and tuple(m) == layers)
    return _with_part(decoder, stack, nn.ModuleList(layers[:count]))


def _with_part(whole: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """A copy of ``whole`` with another part in place of ``old``; only the modules on the way there are copied."""
    path = next(name for name, module in whole.named_modules() if module is old).split(".")
    clone = part = _shallow(whole)
    for name in path[:-1]:
        part._modules[name] = _shallow(part.get_submodule(name))
        part = part.get_submodule(name)
    part._modules[path[-1]] = new
    return clone


def _shallow(module: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone.__dict__["_modules"] = dict(module._modules)
    return clone


class TransformersModel:
    """A ``CausalModel`` (models/target.py) made of a transformers model whose attention is ``paged_attention``."""

    def __init__(
        self, model: PreTrainedModel, inspection: Inspection, max_model_len: int, attend: AttentionBackend
    ) -> None:
        self.decoder = decoder_of(model)
        self.head = head_of(model, inspection.output_type)
        self.layers = inspection.decoder_layers
        self.specs = inspection.specs
        self.attend = attend
        self.kv_spec: KVSpec = inspection.kv_spec
        self.hidden_size = inspection.hidden_size
        self.num_layers = len(inspection.specs)
        self.max_model_len = max_model_len
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.vocab_size = int(
            self.logits(torch.zeros(1, self.hidden_size, dtype=self.dtype, device=self.device)).shape[1]
        )

    @torch.no_grad()
    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        with _tapped(self.layers, taps) as taken:
            out = self._run(self.decoder, batch, cache)
        return ForwardOutput(out.last_hidden_state[0], taken)

    @property
    def layer_size(self) -> int:
        """See ``ExitingModel``; of a mixture of experts all of them count."""
        return sum(weight.numel() for weight in self.layers[0].parameters())

    def exit_after(self, layers: int) -> Trunk:
        """See ``ExitingModel.exit_after``; it is tried on a few tokens, as families may do anything between layers."""
        check_exit(layers, self.num_layers)
        decoder = cut_decoder(self.decoder, self.layers, layers)

        @torch.no_grad()
        def run(batch: RaggedBatch, cache: KVCache) -> Tensor:
            hidden: Tensor = self._run(decoder, batch, cache).last_hidden_state[0]
            return hidden

        try:
            compare_exit(self, run, layers)
        except MODEL_FAILURES as error:
            raise ValueError(f"it does not stop after layer {layers}: {error}") from error
        return run

    def _run(self, decoder: nn.Module, batch: RaggedBatch, cache: KVCache) -> Any:
        return decoder(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            saccade_step=PagedStep(batch, cache, self.attend, self.specs),
        )

    def new_cache(self, num_pages: int) -> KVCache:
        """See ``CausalModel.new_cache``."""
        return KVCache(self.kv_spec, num_pages, self.dtype, self.device)

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """See ``CausalModel.embed``; without the factor that some families put on it."""
        weight: Tensor = self.decoder.get_input_embeddings().weight  # [V, H]
        return torch.embedding(weight, token_ids)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _tapped(layers: tuple[nn.Module, ...], taps: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Collect what enters the decoder layers ``taps`` during the ``with`` block; hooks exist only inside it."""
    taken: dict[int, Tensor] = {}

    def take(tap: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]  # [1, T, H]
        taken[tap] = hidden[0].clone()  # a layer may add to it in place

    handles = [
        layers[tap].register_forward_pre_hook(
            lambda _, args, kwargs, tap=tap: take(tap, args, kwargs),
            with_kwargs=True,
        )
        for tap in taps
    ]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def load_transformers_model(
    path: Path, *, dtype: str, device: torch.device, attention: str, max_model_len: int | None
) -> TransformersModel:
    """Load the checkpoint in folder ``path`` as a target, or refuse it.

    Args:
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or "float64".
        attention: a backend of models/attention, or "auto".
        max_model_len: longest context to be served; None takes the model's own. RoPE scaling that transformers makes
            depend on the length of the text (dynamic, longrope) is fixed to what this length needs.

    Raises:
        CheckpointError: naming the model type and why it cannot be served: unknown or not a causal LM, weights that
            are missing, left over or misshapen, attention that does not go through the interface in every layer, or
            logits that differ from those of transformers.
        ValueError: for an unknown attention backend.
    """
    model = load_checkpoint(path, dtype).to(device).eval().requires_grad_(False)
    kind = model.config.model_type
    length = context_length(model.config, max_model_len)
    backend = load_backend(attention, device, model.dtype)
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)
    try:
        freeze_rope(model, length)
        inspection = inspect_attention_layers(model, length)
        reference = reference_logits(model)
        set_attention(model, PAGED_ATTENTION)
        target = TransformersModel(model, inspection, length, backend)
        compare_with(target, reference)
    except MODEL_FAILURES as error:
        raise CheckpointError(f"{path}: model type {kind!r} cannot be served: {error}") from error
    return target
