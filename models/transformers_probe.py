"""What a transformers model does with attention, found out by running it on a few tokens when it is loaded.

Two questions are answered, and a "no" to either refuses the model:

- ``inspect_attention_layers``: does every decoder layer call the attention hook once, and what does it ask for? Masks
  are not built but observed: our mask function hands the mask's *rule* to the layers, and the rule, evaluated up to the
  longest context, says whether a layer is causal, has a sliding window, or does something that we do not compute.
- ``compare_with``: are the logits over the page cache (two rows in one batch, a prompt in two chunks, a token tree)
  those of the model's own eager attention? This catches all that does not pass through the hook: biases, recurrences,
  mixing of neighbouring tokens, positions that are not taken from ``position_ids``.
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
from models.batch import PAGE_SIZE, RaggedBatch
from models.kv_cache import KVCache, KVSpec
from models.target import CausalModel

INSPECTION = "saccade_inspection"  # our name in transformers' tables of attention and mask functions
INSPECTED_TOKENS = 8
MODEL_FAILURES = (  # what foreign model code raises when it is run in a way that it does not support
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    LookupError,
    NotImplementedError,
)

ROW_A = 17  # tokens of the first probe row, committed in two chunks
CHUNK_A = 11
ROW_B = 6  # tokens of the second, committed at once; a tree follows
TREE_PARENTS = (-1, 0, 0, 1, 3)
PATHS = ((0, 1, 3, 4), (0, 2))  # the tree's nodes along its two paths


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
    """Run the decoder with an attention that only takes notes.

    Raises:
        ValueError: if our attention cannot stand in for the model's.
    """
    AttentionInterface.register(INSPECTION, observe_attention)
    AttentionMaskInterface.register(INSPECTION, observe_mask)
    set_attention(model, INSPECTION)
    near = torch.arange(INSPECTED_TOKENS, device=model.device)
    calls, output = _observe(model, near)
    layers = _decoder_layers(decoder_of(model), calls)
    kv_spec = _uniform_kv_spec(calls)
    windows = {id(call.mask): window_of(call.mask, max_model_len, model.device) for call in calls}
    _check_positions(model, calls, near, max_model_len)
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


def _observe(model: PreTrainedModel, positions: Tensor) -> tuple[list[Call], ModelOutput]:
    calls: list[Call] = []
    tokens = _random_tokens(model.config.get_text_config(decoder=True).vocab_size, INSPECTED_TOKENS, model.device)
    output = decoder_of(model)(
        input_ids=tokens[None], position_ids=positions[None], use_cache=False, saccade_calls=calls
    )
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


def _check_positions(model: PreTrainedModel, calls: list[Call], near: Tensor, max_model_len: int) -> None:
    """A far position in the batch must not change the keys and queries of other tokens, nor may order matter."""
    far = near.clone()
    far[-1] = max_model_len - 1
    for call, again in zip(calls, _observe(model, far)[0], strict=True):
        for before, after in ((call.query, again.query), (call.key, again.key)):
            if not torch.equal(before[:, :, :-1], after[:, :, :-1]):
                raise ValueError("its positions depend on the whole batch")


def _random_tokens(vocab_size: int, count: int, device: torch.device) -> Tensor:
    """[count] int64, the same ones every time; drawn on the CPU, so also on every device."""
    generator = torch.Generator().manual_seed(20)
    return torch.randint(vocab_size, (count,), generator=generator).to(device)


@dataclass(frozen=True)
class Reference:
    """The probe's tokens and the logits that the model's eager attention gives them."""

    tokens: Tensor  # [ROW_A + ROW_B + nodes]
    row_a: Tensor  # [ROW_A, V]
    row_b: Tensor  # [ROW_B, V]
    tree: Tensor  # [nodes, V]


@torch.no_grad()
def reference_logits(model: PreTrainedModel) -> Reference:
    """Logits of the probe's rows and of every path of its tree, by the model's own eager attention, one text each."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    tokens = _random_tokens(vocab_size, ROW_A + ROW_B + len(TREE_PARENTS), model.device)
    a, b, nodes = torch.split(tokens, [ROW_A, ROW_B, len(TREE_PARENTS)])
    set_attention(model, "eager")

    def run(text: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=text[None], use_cache=False).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    row_b = run(b)
    tree = row_b.new_empty(len(nodes), row_b.shape[1])
    for path in PATHS:
        index = torch.tensor(path, device=model.device)
        tree[index] = run(torch.cat([b, nodes[index]]))[ROW_B:]
    return Reference(tokens, run(a), row_b, tree)


@torch.no_grad()
def compare_with(model: CausalModel, reference: Reference) -> None:
    """Compare the model's logits over a page cache with the reference.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    a, b, nodes = torch.split(reference.tokens, [ROW_A, ROW_B, len(TREE_PARENTS)])
    cache = KVCache(model.kv_spec, 5, model.dtype, model.device)
    pages = ([3, 1], [4, 2])  # page 0 stays unused
    first = _probe_batch([a[:CHUNK_A], b], (0, 0), (None, None), pages)
    second = _probe_batch([a[CHUNK_A:], nodes], (CHUNK_A, ROW_B), (None, TREE_PARENTS), pages)
    prompts = model.logits(model.forward(first, cache).hidden)
    rest_a, tree = model.logits(model.forward(second, cache).hidden).tensor_split([ROW_A - CHUNK_A])
    for what, ours, theirs in (
        ("prompts", prompts, torch.cat([reference.row_a[:CHUNK_A], reference.row_b])),
        ("the second chunk of a prompt", rest_a, reference.row_a[CHUNK_A:]),
        ("a token tree", tree, reference.tree),
    ):
        error = relative_error(ours, theirs, model.dtype)
        if not error <= TOLERANCE[model.dtype]:
            raise ValueError(f"on our cache its logits for {what} differ from transformers' by {error:.2g}, relatively")


# Random models of seven families, 2 and 12 layers, err by at most 5e-7 (float64: eager softmax is float32), 5e-6, 0.04
# and 0.09 (routers of experts amplify rounding); families that do not work err by 0.4 and more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}


def relative_error(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """Error norm over the norm of the centred logits [W, V], per token; the worst token's.

    In 16 bits the median token's: rounding may send a token to another expert, which changes all of its logits.
    """
    centred = theirs - theirs.mean(dim=-1, keepdim=True)
    errors = (ours - theirs).norm(dim=-1) / centred.norm(dim=-1).clamp(min=torch.finfo(theirs.dtype).tiny)
    return float(errors.median() if dtype.itemsize == 2 else errors.max())


def _probe_batch(
    queries: list[Tensor],
    contexts: tuple[int, ...],
    trees: tuple[tuple[int, ...] | None, ...],
    pages: tuple[list[int], ...],
) -> RaggedBatch:
    """Rows of ``queries`` after ``contexts`` committed tokens; a row is a chain, or a tree with these parents."""
    device = queries[0].device
    positions: list[int] = []
    slots: list[int] = []
    visible: list[int] = []
    masks: list[int] = []
    bases: list[int] = []
    for query, context, parents, row_pages in zip(queries, contexts, trees, pages, strict=True):
        count = len(query)
        keys = range(context, context + count)
        slots += [row_pages[key // PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE for key in keys]
        if parents is None:
            positions += keys
            visible += [key + 1 for key in keys]
            masks += [0] * (count - 1) + [1]
            bases.append(context + count - 1)
        else:
            mask = [1]
            for node in range(1, count):
                mask.append(mask[parents[node]] | 1 << node)
            positions += [context + bits.bit_count() - 1 for bits in mask]
            visible += [context] * count
            masks += mask
            bases.append(context)
    lengths = [len(query) for query in queries]

    def index(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return RaggedBatch(
        token_ids=torch.cat(queries),
        positions=index(positions, torch.int64),
        slots=index(slots, torch.int64),
        visible=index(visible),
        tree_mask=index(masks, torch.int64),
        row_of=index([row for row, length in enumerate(lengths) for _ in range(length)]),
        row_starts=index([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        tree_base=index(bases),
        page_table=torch.tensor(pages, dtype=torch.int32, device=device),
        wanted=torch.arange(sum(lengths), device=device),
        max_query=max(lengths),
        max_keys=max(context + length for context, length in zip(contexts, lengths)),
    )
