"""Files of EAGLE drafters, in the layouts that people have, give the logits of the papers' formulas."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.batch import RaggedBatch
from models.decoder import Decoder
from models.heads.eagle import EagleModel, load_eagle
from models.heads.eagle3 import Eagle3Model, default_taps
from models.heads.eagle3_files import load_eagle3
from models.kv_cache import KVCache
from models.layers.ops import TorchOps
from models.loader import load_model
from models.target import CausalModel
from models.transformers_model import load_transformers_model
from tests.engines import tiny_decoder
from tests.paged import PagedRun
from tests.parity.eagle_files import (
    HIDDEN,
    LLAMA,
    VOCAB,
    Eagle1Formula,
    Eagle3Formula,
    Weights,
    draw,
    layer_tensors,
    save,
)
from tests.parity.tiny import save_tiny

DRAFTED = 20  # tokens of the draft vocabulary
TARGET_LAYERS = 7
TOKENS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-9}


@cache
def target(dtype: torch.dtype = torch.float64) -> Decoder:
    return tiny_decoder(dtype, layers=TARGET_LAYERS)


@dataclass(frozen=True)
class Case:
    """An EAGLE-3 checkpoint: what differs from the reference's plain one."""

    form: str = "safetensors"
    speculators: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)  # of the layers' config
    flags: tuple[str, ...] = ()
    hidden: int = HIDDEN
    drafted: int = DRAFTED
    own_embedding: bool = False
    bias: bool = False
    layers: int = 1
    taps: tuple[int, ...] = default_taps(TARGET_LAYERS)


CASES = {
    "reference": Case(),
    "pickled": Case(form="bin"),
    "sharded": Case(form="sharded"),
    "whole vocabulary": Case(drafted=VOCAB),
    "theta of the draft": Case(layer={"rope_theta": 500_000.0}),
    "own embedding": Case(own_embedding=True),
    "another width": Case(hidden=64, own_embedding=True, config={"target_hidden_size": HIDDEN}),
    "biased": Case(bias=True),
    "sglang's taps": Case(config={"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]}}, taps=(1, 4, 6)),
    "speculators": Case(speculators=True),
    "speculators, sharded": Case(speculators=True, form="sharded"),
    "other taps": Case(speculators=True, config={"eagle_aux_hidden_state_layer_ids": [6, 0, 3]}, taps=(6, 0, 3)),
    "norm_before_residual": Case(speculators=True, flags=("norm_before_residual",)),
    "norm_before_fc": Case(speculators=True, flags=("norm_before_fc",)),
    "fc_norm": Case(speculators=True, flags=("fc_norm",)),
    "norm_output": Case(speculators=True, flags=("norm_output",)),
    "every flag": Case(
        speculators=True, flags=("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), layers=3
    ),
    "several layers": Case(speculators=True, layers=3, layer={"num_hidden_layers": 3}),
    "qwen3": Case(speculators=True, layer={"model_type": "qwen3", "head_dim": HIDDEN // 4}),
    "speculators, biased": Case(speculators=True, bias=True, layer={"attention_bias": True}),
    "sliding window": Case(
        speculators=True, layer={"layer_types": ["sliding_attention"], "sliding_window": 5, "use_sliding_window": True}
    ),
}


def eagle3_tensors(case: Case) -> Weights:
    first, hidden = "layers.0." if case.speculators else "midlayer.", case.hidden
    qk_norm = case.layer.get("model_type") == "qwen3"
    tensors = layer_tensors(first, 2 * hidden, hidden, bias=case.bias, qk_norm=qk_norm)
    for name in ("input_layernorm", "hidden_norm"):
        tensors[f"{first}{name}.weight"] = draw("norm", (hidden,))
    for index in range(1, case.layers):
        tensors |= layer_tensors(f"layers.{index}.", hidden, hidden, bias=case.bias, qk_norm=qk_norm)
        tensors[f"layers.{index}.input_layernorm.weight"] = draw("norm", (hidden,))
    tensors["fc.weight"] = draw("fc", (hidden, 3 * HIDDEN))
    tensors["norm.weight"] = draw("norm", (hidden,))
    tensors["lm_head.weight"] = draw("lm_head", (case.drafted, hidden))
    if "norm_before_fc" in case.flags:
        tensors["input_norm.weight"] = draw("norm", (3 * HIDDEN,))
    if "fc_norm" in case.flags:
        tensors |= {f"fc_norm.{i}.weight": draw("norm", (HIDDEN,)) for i in range(3)}
    if case.own_embedding:
        tensors["embed_tokens.weight"] = draw("embed", (VOCAB, hidden))
    if case.drafted < VOCAB:
        tensors["d2t"] = drafted_ids() - torch.arange(case.drafted)
        tensors["t2d"] = torch.isin(torch.arange(VOCAB), drafted_ids())
    return tensors


def drafted_ids() -> Tensor:
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))[:DRAFTED].sort().values


def eagle3_config(case: Case) -> dict[str, Any]:
    layer = LLAMA | {"hidden_size": case.hidden, "num_hidden_layers": case.layers} | case.layer
    flags = dict.fromkeys(case.flags, True)
    if case.speculators:
        kind = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}
        return kind | {"transformer_layer_config": layer, "draft_vocab_size": case.drafted} | flags | case.config
    return {**layer, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": case.drafted, **case.config}


def written(name: str, folder: Path) -> tuple[Path, Eagle3Formula]:
    """A case on disk, and the formula with its weights."""
    case = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    tensors = eagle3_tensors(case)
    embedding = tensors.get("embed_tokens.weight", target().embedding)
    formula = Eagle3Formula(
        tensors, embedding, case.layer.get("rope_theta", 10_000.0), case.layer.get("sliding_window"), set(case.flags),
        case.layers,
    )  # fmt: skip
    return save(folder, eagle3_config(case), tensors, case.form), formula


def features_of(model: EagleModel | Eagle3Model, tokens: list[int], of: CausalModel | None = None) -> Tensor:
    """[S, F] what the target makes of a text, as the drafter wants it."""
    run = PagedRun(of or target())
    out = run.forward(run.batch({0: tokens}), model.source.taps)
    parts = [out.taps[tap] for tap in model.source.taps] or [out.hidden]
    return torch.cat(parts, dim=1)


class DraftRun:
    """A drafter's passes over one text by ragged batches, as an engine would ask for them."""

    def __init__(self, model: EagleModel | Eagle3Model) -> None:
        self.model = model
        self.run = PagedRun(target())
        self.run.cache = KVCache(model.kv_spec, 80, model.dtype, model.device)
        for slots in (self.run.cache.keys, self.run.cache.values):
            slots[:, self.run.pages[0][0] * 16] = torch.nan  # entry 0 does not exist
        self.run.lengths = [1]

    @torch.inference_mode()
    def catch_up(self, tokens: list[int], features: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, carry) of the next committed tokens, from the features of the tokens before each."""
        batch = self.run.batch({0: tokens})
        self.run.lengths[0] += len(tokens)
        drafted = self.model.catch_up(self.behind(batch), features, None, self.run.cache)
        return self.model.logits(drafted.hidden), drafted.carry

    @torch.inference_mode()
    def extend(self, nodes: list[int], parents: list[int], carry: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """(logits, carry) of the last ``len(carry)`` nodes of a tree below the last token; node 0 is its root."""
        self.run.lengths[0] -= 1
        batch = self.run.batch({0: nodes}, {0: parents})
        self.run.lengths[0] += 1
        first = len(nodes) - len(carry)
        per_token = ("token_ids", "positions", "slots", "visible", "tree_mask", "row_of")
        cut: dict[str, Any] = {name: getattr(batch, name)[first:] for name in per_token}
        starts = torch.tensor([0, len(carry)], dtype=torch.int32)
        batch = replace(batch, **cut, row_starts=starts, wanted=torch.arange(len(carry)), max_query=len(carry))
        before = carry.clone()
        drafted = self.model.extend(self.behind(batch), carry, depth, self.run.cache)
        assert torch.equal(carry, before), "the caller's carry is the caller's"
        return self.model.logits(drafted.hidden), drafted.carry

    def behind(self, batch: RaggedBatch) -> RaggedBatch:
        """Entries have the position of the token before."""
        return replace(batch, positions=batch.positions - 1)


Formulas = Eagle1Formula | Eagle3Formula


def check_passes(model: EagleModel | Eagle3Model, formula: Formulas, head: Tensor) -> None:
    """Over a sequence in three pieces, then three levels of a tree of drafts."""
    features = features_of(model, TOKENS)
    entered = formula.enter(features[:-1])
    hidden, carry = formula.run(TOKENS[1:], entered)
    run = DraftRun(model)
    parts = [run.catch_up(TOKENS[1 + a : 1 + b], features[a:b]) for a, b in ((0, 17), (17, 18), (18, 39))]
    assert (hidden @ head.T).std() > 0.5  # the comparison below is about something
    torch.testing.assert_close(torch.cat([logits for logits, _ in parts]), hidden @ head.T, **EXACT)
    torch.testing.assert_close(torch.cat([own for _, own in parts]), carry, **EXACT)

    # two nodes below the root, then a child of each, then two children of the first of these
    nodes, parents = [TOKENS[-1], 4, 9, 30, 31, 7, 8], [-1, 0, 0, 1, 2, 3, 3]
    levels, own, before = [(1, 3), (3, 5), (5, 7)], {0: carry[-1:]}, {0: entered}
    drafted = {0: parts[-1][1][-1:]}
    for depth, (first, end) in enumerate(levels, start=1):
        given = torch.cat([drafted[parents[node]] for node in range(first, end)])
        logits, made = run.extend(nodes[:end], parents[:end], given, depth)
        for row, node in enumerate(range(first, end)):
            path = [node]
            while parents[path[0]]:
                path.insert(0, parents[path[0]])
            before[node] = torch.cat([before[parents[node]], own[parents[node]]])
            want, carries = formula.run([*TOKENS[1:], *(nodes[at] for at in path)], before[node])
            torch.testing.assert_close(logits[row], want[-1] @ head.T, **EXACT)
            torch.testing.assert_close(made[row], carries[-1], **EXACT)
            own[node], drafted[node] = carries[-1:], made[row : row + 1]


@pytest.mark.parametrize("name", CASES)
def test_eagle3_files_give_the_logits_of_the_formula(name: str, tmp_path: Path) -> None:
    folder, formula = written(name, tmp_path)
    model = load_eagle3(folder, target())
    assert model.source.taps == CASES[name].taps
    assert model.feature_size == 3 * HIDDEN
    if CASES[name].drafted == VOCAB:
        assert model.token_ids is None
    else:
        assert model.token_ids is not None
        assert torch.equal(model.token_ids, drafted_ids())
    check_passes(model, formula, formula.weights["lm_head.weight"])


def eagle1(folder: Path, form: str, *, bias: bool, qkv_bias: bool, embedding: bool) -> tuple[Path, Eagle1Formula]:
    torch.manual_seed(8)
    tensors = layer_tensors("layers.0.", HIDDEN, bias=qkv_bias)
    tensors.pop("layers.0.self_attn.o_proj.bias", None)  # as with Qwen2's layers
    tensors["fc.weight"] = draw("fc", (HIDDEN, 2 * HIDDEN))
    tensors |= {"fc.bias": draw("fc", (HIDDEN,))} if bias else {}
    own = draw("embed", (VOCAB, HIDDEN)) if embedding else target().embedding.clone()
    config = LLAMA | {"architectures": ["LlamaForCausalLM"]} | ({} if bias else {"bias": False})
    return save(folder, config, {**tensors, "embed_tokens.weight": own}, form), Eagle1Formula(tensors, own)


@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("qkv_bias", "embedding"), [(False, False), (True, True)])
def test_eagle1_files_give_the_logits_of_the_formula(
    form: str, bias: bool, qkv_bias: bool, embedding: bool, tmp_path: Path
) -> None:
    folder, formula = eagle1(tmp_path, form, bias=bias, qkv_bias=qkv_bias, embedding=embedding)
    model = load_eagle(folder, target())
    assert model.source.taps == ()
    assert model.token_ids is None
    head = target().head.weight
    assert head is not None
    check_passes(model, formula, head)


def test_the_targets_embedding_is_not_held_twice(tmp_path: Path) -> None:
    folder, _ = eagle1(tmp_path / "same", "bin", bias=True, qkv_bias=False, embedding=False)
    assert load_eagle(folder, target())._embedding is None
    folder, _ = eagle1(tmp_path / "own", "bin", bias=True, qkv_bias=False, embedding=True)
    assert load_eagle(folder, target())._embedding is not None


@pytest.mark.parametrize("name", ["reference", "every flag"])
def test_plain_operations_and_attention_agree(name: str, tmp_path: Path) -> None:
    folder, formula = written(name, tmp_path)
    model = load_eagle3(folder, target(), attention="reference", ops=TorchOps())
    check_passes(model, formula, formula.weights["lm_head.weight"])


def test_packed_weights_agree(tmp_path: Path) -> None:
    folder, _ = written("speculators", tmp_path / "three")
    exact = load_eagle3(folder, target())
    packed = load_eagle3(folder, target(torch.float32))
    features = features_of(exact, TOKENS)
    want, _ = DraftRun(exact).catch_up(TOKENS[1:], features[:-1])
    got, _ = DraftRun(packed).catch_up(TOKENS[1:], features[:-1].float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)


def test_a_transformers_target_serves_as_well(tmp_path: Path) -> None:
    """Taps and embedding mean the same whoever runs the target."""
    model = save_tiny(
        "llama", tmp_path / "target", num_hidden_layers=TARGET_LAYERS, vocab_size=VOCAB, hidden_size=HIDDEN
    )
    native = load_model(model, dtype="float64")
    other = load_transformers_model(
        model, dtype="float64", device=torch.device("cpu"), attention="auto", max_model_len=None
    )
    folder, _ = written("reference", tmp_path / "drafter")
    logits = []
    for each in (native, other):
        drafter = load_eagle3(folder, each)
        drafted, _ = DraftRun(drafter).catch_up(TOKENS[1:], features_of(drafter, TOKENS, each)[:-1])
        logits.append(drafted)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)  # transformers' norms are in float32
    assert torch.equal(native.embed(torch.tensor(TOKENS)), other.embed(torch.tensor(TOKENS)))
