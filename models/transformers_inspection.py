"""What a transformers model does with attention and positions, found out on a few tokens when it is loaded.

The decoder is run with an attention function that only takes notes. Masks are not built but observed: our mask function
hands the mask's *rule* to the layers, and the rule, evaluated up to the longest context, says whether a layer is
causal, has a sliding window, or does something that we do not compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import ModelOutput

from models.attention import AttentionSpec
from models.kv_cache import KVSpec

INSPECTION = "saccade_inspection"  # our name in transformers' tables of attention and mask functions
INSPECTED_TOKENS = 8
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds whose masks tell all about them


@dataclass(frozen=True)
class ObservedMask:
    """Stands for the mask that transformers would build."""

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) -> bool, broadcasting

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError("a layer reads or changes its attention mask")

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError("a layer reads or changes its attention mask")


@dataclass(frozen=True)
class Call:
    """One call of the attention hook."""

    module: nn.Module
    layer: int
    query: Tensor  # [1, Hq, T, D]
    key: Tensor  # [1, Hkv, T, D]
    value_dim: int
    mask: object
    scale: float
    soft_cap: float | None


@dataclass(frozen=True)
class Inspection:
    """What the hook saw."""

    specs: tuple[AttentionSpec, ...]  # one per layer
    kv_spec: KVSpec
    decoder_layers: tuple[nn.Module, ...]
    hidden_size: int
    output_type: type[ModelOutput]  # of the decoder


def observe_mask(*, mask_function: Callable[..., Tensor], **kwargs: Any) -> ObservedMask:
    """A mask function of transformers' mask interface."""
    return ObservedMask(mask_function)


def observe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    saccade_calls: list[Call] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' attention interface: notes the call and attends to nothing."""
    if saccade_calls is None:
        raise ValueError("its layers do not pass keyword arguments on to the attention interface")
    if kwargs.get("position_bias") is not None:
        raise ValueError("its attention adds a bias to the scores")
    if kwargs.get("is_causal") is False:
        raise ValueError("its attention is not causal")
    if key.shape[2] != query.shape[2]:
        raise ValueError("its attention has other keys than those of the tokens")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ValueError("its attention modules do not know their layer")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    saccade_calls.append(Call(module, layer, query, key, value.shape[-1], attention_mask, scale, softcap))
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch every attention layer to the registered function ``name``.

    Raises:
        ValueError: if the class does not support that.
    """
    if not model._can_set_attn_implementation():
        raise ValueError("its class does not use transformers' attention interface")
    model.set_attn_implementation(name)
    if decoder_of(model).config._attn_implementation != name:
        raise ValueError("transformers does not let its attention be replaced")


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM that turns tokens into final hidden states."""
    # the first is a guess by attribute names, the second goes by a prefix that is wrong in some classes
    for candidate in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(candidate, PreTrainedModel) and candidate is not model:
            return candidate
    raise ValueError("its decoder and its LM head are not separate modules")


@torch.no_grad()
def inspect_attention_layers(model: PreTrainedModel, max_model_len: int) -> Inspection:
    """Run the decoder on a few tokens with an attention that only takes notes.

    Raises:
        ValueError: if our attention cannot stand in for the model's.
    """
    AttentionInterface.register(INSPECTION, observe_attention)
    AttentionMaskInterface.register(INSPECTION, observe_mask)
    set_attention(model, INSPECTION)
    unknown = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise ValueError(f"it has layers of type {', '.join(sorted(unknown))}")
    tokens = random_tokens(model, INSPECTED_TOKENS)
    calls, output = _observe(model, tokens, torch.arange(INSPECTED_TOKENS, device=model.device))
    layers = _decoder_layers(decoder_of(model), calls)
    kv_spec = _uniform_kv_spec(calls)
    windows = {id(call.mask): window_of(call.mask, max_model_len, model.device) for call in calls}
    _check_positions(model, max_model_len)
    specs = tuple(
        AttentionSpec(
            num_heads=call.query.shape[1],
            num_kv_heads=call.key.shape[1],
            key_dim=call.key.shape[-1],
            value_dim=call.value_dim,
            scale=call.scale,
            window=windows[id(call.mask)],
            soft_cap=call.soft_cap,
        )
        for call in calls
    )
    return Inspection(specs, kv_spec, layers, output.last_hidden_state.shape[-1], type(output))


def _observe(model: PreTrainedModel, tokens: Tensor, positions: Tensor | None) -> tuple[list[Call], ModelOutput]:
    calls: list[Call] = []
    where = {} if positions is None else {"position_ids": positions[None]}
    output = decoder_of(model)(input_ids=tokens[None], use_cache=False, saccade_calls=calls, **where)
    return calls, output


def _decoder_layers(decoder: nn.Module, calls: list[Call]) -> tuple[nn.Module, ...]:
    """The decoder layers, each of which must have called the hook once, in order."""
    if not calls:
        raise ValueError("no layer of it calls the attention interface")
    names = {module: name for name, module in decoder.named_modules()}
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    first = names[calls[0].module]
    stacks = [name for name in lists if first.startswith(f"{name}.")]
    if not stacks:
        raise ValueError("its decoder layers are not a list of modules")
    stack = min(stacks, key=len)
    called = [(names[call.module].removeprefix(f"{stack}.").split(".")[0], call.layer) for call in calls]
    expected = [(str(layer), layer) for layer in range(len(lists[stack]))]
    if called != expected:
        without = sorted({layer for layer, _ in expected} - {layer for layer, _ in called}, key=int)
        reason = f"layers without it: {', '.join(without)}" if without else f"it was called as {called}"
        raise ValueError(f"not every layer calls the attention interface once, in order ({reason})")
    return tuple(lists[stack])


def _uniform_kv_spec(calls: list[Call]) -> KVSpec:
    shapes = {(call.key.shape[1], call.key.shape[-1], call.value_dim) for call in calls}
    if len(shapes) > 1:
        raise ValueError(f"its layers have different K/V shapes (heads, key dim, value dim): {sorted(shapes)}")
    kv_heads, key_dim, value_dim = shapes.pop()
    for call in calls:
        if call.query.shape[1] % kv_heads or call.query.shape[-1] != key_dim:
            raise ValueError(f"query heads {list(call.query.shape)} do not group over keys {list(call.key.shape)}")
    return KVSpec(len(calls), kv_heads, key_dim, value_dim)


def window_of(mask: object, max_model_len: int, device: torch.device) -> int | None:
    """The sliding window of a layer within ``max_model_len``; None if it sees everything before a query.

    Raises:
        ValueError: if the rule is anything but causal attention, with a window or without.
    """
    if not isinstance(mask, ObservedMask):
        raise ValueError(
            f"a layer's attention mask is not made by transformers' mask interface ({type(mask).__name__})"
        )
    last = max_model_len - 1
    chosen = {0, min(1, last), last // 4, last // 3, last // 2, max(last - 1, 0), last}
    query = torch.tensor(sorted(chosen), device=device)[:, None]  # [Q, 1]
    key = torch.arange(max_model_len, device=device)[None]  # [1, K]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    seen = mask.sees(zero, zero, query, key).expand(len(chosen), max_model_len)
    window = int(seen[-1].sum())
    if not torch.equal(seen, (key <= query) & (query - key < window)):
        raise ValueError("a layer's attention mask is neither causal nor a sliding window")
    return window if window < max_model_len else None


def _check_positions(model: PreTrainedModel, max_model_len: int) -> None:
    """Attention apart, a token's states may depend on itself and its entry of ``position_ids``, on nothing else.

    Raises:
        ValueError: if they depend on neighbours (convolutions, recurrences), on the place in the batch (positions that
            the model counts itself), or on the largest position (length-dependent RoPE).
    """
    tokens = random_tokens(model, INSPECTED_TOKENS)
    half = INSPECTED_TOKENS // 2
    near = torch.arange(INSPECTED_TOKENS, device=model.device)
    far = torch.cat([near[:-1], near.new_tensor([max_model_len - 1])])
    states = _states(model, tokens, near)
    if not _equal(states, _states(model, tokens, None)):
        raise ValueError("it does not number positions from 0")
    if not _equal(states[:-1], _states(model, tokens, far)[:-1]):
        raise ValueError("the states of its tokens depend on the largest position in the batch")
    twice = _states(model, tokens[:half].repeat(2), near[:half].repeat(2))
    if not (_equal(twice[:half], twice[half:]) and _equal(twice[:half], states[:half])):
        raise ValueError("the states of its tokens depend on more than the token and its position")


def _states(model: PreTrainedModel, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """[T, X] queries and keys of every layer and the final hidden states, when attention returns zeros."""
    calls, output = _observe(model, tokens, positions)
    parts = [part[0].transpose(0, 1).flatten(1) for call in calls for part in (call.query, call.key)]
    return torch.cat([*parts, output.last_hidden_state[0]], dim=1)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of matrix products among other rows (most often it is none)."""
    tolerance = 0.01 if one.dtype.itemsize == 2 else 1e-4
    return bool(((one - other).norm(dim=1) <= tolerance * one.norm(dim=1)).all())


def random_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """[count] int64, the same ones every time; drawn on the CPU, so also on every device."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(20)
    return torch.randint(vocab_size, (count,), generator=generator).to(model.device)
