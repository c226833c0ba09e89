"""Meta's parallel heads: the model in Meta's layout, and its heads, against the formulas over whole sequences."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding.config import EngineConfig
from decoding.drafters.base import DrafterContext
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.drafters.mtp import MTPOptions, parallel_drafter
from decoding.engine import Engine
from decoding.plan import Plan, Quota
from decoding.request import GenerateRequest, SamplingParams
from decoding.sampling import Sampling
from models.attention.reference import attend
from models.checkpoint import CheckpointError
from models.decoder import Decoder
from models.heads.parallel_heads import ParallelHeads, load_parallel_heads
from models.layers.ops import TorchOps
from models.loader import load_model
from models.tree import Trees, depths
from tests.engines import ALL_NODES, ROOT, make_engine, run
from tests.paged import PagedRun
from tests.unit.test_mtp import Served

PARAMS = {"dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "norm_eps": 1e-5}
PARAMS |= {"multiple_of": 16, "n_future_tokens": 3, "rope_theta": 5000.0}
VOCAB, MLP, TRUNK, EXTRA = 48, 40, 3, 2  # n_layers counts the layers of the trunk and the extra heads


def meta_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator)
        return 1 + 0.2 * made if len(shape) == 1 else 0.3 * made

    tensors = {"tok_embeddings.weight": drawn(VOCAB, 32), "norm.weight": drawn(32), "output.weight": drawn(VOCAB, 32)}
    for layer in [*(f"layers.{i}" for i in range(TRUNK)), *(f"extra_heads.{i}" for i in range(EXTRA))]:
        for name, rows in (("wq", 32), ("wk", 16), ("wv", 16), ("wo", 32)):
            tensors[f"{layer}.attention.{name}.weight"] = drawn(rows, 32)
        for name, shape in (("w1", (MLP, 32)), ("w2", (32, MLP)), ("w3", (MLP, 32))):
            tensors[f"{layer}.feed_forward.{name}.weight"] = drawn(*shape)
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"{layer}.{name}.weight"] = drawn(32)
    return tensors | {"rope.freqs": drawn(4)}


def save(folder: Path, tensors: dict[str, Tensor], params: dict[str, Any] = PARAMS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(tensors, folder / "consolidated.pth")
    return folder


class Dense:
    """The model of 2404.19737 as published: pairs of neighbouring dims turn, as complex numbers."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def logits(self, tokens: list[int]) -> list[Tensor]:
        """[T, V] of the model itself and of each extra head."""
        w = self.tensors
        z = w["tok_embeddings.weight"][tokens]
        for layer in range(TRUNK - 1):
            z = self.block(z, f"layers.{layer}")
        ends = [f"layers.{TRUNK - 1}", *(f"extra_heads.{head}" for head in range(EXTRA))]
        return [self.norm(self.block(z, end), w["norm.weight"]) @ w["output.weight"].T for end in ends]

    def block(self, x: Tensor, name: str) -> Tensor:
        w = {part.removeprefix(f"{name}."): t for part, t in self.tensors.items() if part.startswith(f"{name}.")}
        u, count = self.norm(x, w["attention_norm.weight"]), len(x)
        q, k, v = ((u @ w[f"attention.w{part}.weight"].T).view(count, -1, 8) for part in "qkv")
        q, k = self.turn(q), self.turn(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(8)
        scores += torch.full((count, count), -torch.inf, dtype=torch.float64).triu(1)
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["attention.wo.weight"].T
        u = self.norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(u @ w["feed_forward.w1.weight"].T)
        return x + (gate * (u @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turn(self, x: Tensor) -> Tensor:
        inverse = (1 / PARAMS["rope_theta"] ** (torch.arange(0, 8, 2).float() / 8)).double()
        turns = torch.polar(torch.ones(len(x), 4).double(), torch.arange(len(x)).double()[:, None] * inverse)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "meta", meta_tensors())


def load(folder: Path, of: Path | None = None) -> tuple[Decoder, ParallelHeads]:
    target = load_model(of or folder, dtype="float64")
    assert isinstance(target, Decoder)
    return target, load_parallel_heads(folder, target, TorchOps(), attend)


def test_the_trunk_is_a_llama_model(folder: Path) -> None:
    tokens = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    target = load_model(folder, dtype="float64")
    (logits,) = PagedRun(target).extend([tokens])
    torch.testing.assert_close(logits, Dense(meta_tensors()).logits(tokens)[0], rtol=0, atol=1e-9)


def test_heads_predict_what_the_paper_has_them_predict(folder: Path) -> None:
    tokens = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    target, heads = load(folder)
    run = PagedRun(target)
    features = run.forward(run.batch({0: tokens}), heads.source.taps).taps[TRUNK - 1]
    expected = Dense(meta_tensors()).logits(tokens)
    served = Served(heads)
    for start, end in ((1, 2), (2, 17), (17, 30)):
        logits, carry = served.catch_up([tokens[start:end]], [features[start - 1 : end - 1]])
        root = end - 1  # its token is not known to the target yet: the heads stand on the one before
        torch.testing.assert_close(logits[0], expected[1][root - 1], rtol=0, atol=1e-9)
        deeper, _ = served.level(0, 1, 0, [3, 4], [0b11, 0b101], carry.expand(2, -1))
        torch.testing.assert_close(deeper[0], expected[2][root - 1], rtol=0, atol=1e-9)
        assert torch.equal(deeper[0], deeper[1])  # whatever the drafted token


class Compared:
    """A drafter whose every tree at temperature 0 is held against the paper's formulas."""

    def __init__(self, inner: FeatureDrafter) -> None:
        self.inner = inner
        self.dense, self.compared = Dense(meta_tensors()), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def propose(self, plan: Plan, quota: Quota, sampling: Sampling) -> Trees | None:
        trees = self.inner.propose(plan, quota, sampling)
        for number, row in enumerate(plan.deciding if trees is not None else ()):
            assert trees is not None
            depth = depths(trees.parents[number : number + 1])[0]
            expected = self.dense.logits(row.sequence.tokens.tolist()[:-1])
            for level in range(1, 1 + EXTRA):
                drafted = set(trees.tokens[number][depth == level].tolist())
                ranked = expected[level][-1].topk(3).indices.tolist()
                assert drafted == set(ranked[: len(drafted)])
                self.compared += len(drafted)
            assert int(depth.max()) <= EXTRA
        return trees


@pytest.mark.parametrize("step_tokens", [6, 2048])
def test_the_engine_drafts_what_the_heads_say(folder: Path, step_tokens: int) -> None:
    target, heads = load(folder)
    built: list[Compared] = []

    def build(context: DrafterContext) -> Compared:
        built.append(Compared(parallel_drafter(MTPOptions(depth=7, top_k=3), context, heads)))
        return built[0]

    settings: dict[str, Any] = {"max_num_batched_tokens": step_tokens, "plan": ALL_NODES}
    requests = [
        GenerateRequest(f"r{length}", tuple(range(length)), SamplingParams(30, 0.0, ignore_eos=True))
        for length in (1, 2, 40)
    ]
    drafted = run(make_engine(target, {"mtp": build}, **settings), requests)
    plain = run(make_engine(target, **settings), requests)
    assert {key: outcome.tokens for key, outcome in drafted.items()} == {k: o.tokens for k, o in plain.items()}
    assert built[0].compared > 100


def test_a_folder_of_metas_serves_and_drafts(folder: Path) -> None:
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(20, 0.8, seed=3, ignore_eos=True))
    outcomes = []
    for speculate in ((), ("mtp:tau=0.5",)):
        config = EngineConfig(
            str(folder), tokenizer=f"{ROOT}/demo/target", dtype="float32", speculate=speculate, num_pages=16
        )
        outcomes.append(run(Engine.load(replace(config, plan=ALL_NODES)), [request])["r", 0])
    assert outcomes[0].tokens == outcomes[1].tokens
    assert outcomes[1].last.speculation is not None
    assert outcomes[1].last.speculation.drafted > 0


def without_heads(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        if name.startswith("extra_heads"):
            del tensors[name]


def incomplete(tensors: dict[str, Tensor]) -> None:
    del tensors["extra_heads.1.attention.wq.weight"]


def misshapen(tensors: dict[str, Tensor]) -> None:
    tensors["extra_heads.0.feed_forward.w1.weight"] = torch.zeros(MLP - 1, 32)


def of_another_depth(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        if name.startswith("layers.2."):
            del tensors[name]


def of_another_width(tensors: dict[str, Tensor]) -> None:
    tensors["tok_embeddings.weight"] = torch.zeros(VOCAB, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_heads, r"no weights called extra_heads"),
        (incomplete, r"missing: extra_heads.1.self_attn.q_proj.weight"),
        (misshapen, r"extra_heads.0.mlp.gate_proj.weight has shape \[39, 32\], not \[40, 32\]"),
        (of_another_depth, "a model of 2 layers, and this target has 3"),
        (of_another_width, "a model of 64 hidden states, and this target has 32"),
    ],
)
def test_heads_that_do_not_fit_say_why(
    change: Callable[[dict[str, Tensor]], None], message: str, folder: Path, tmp_path: Path
) -> None:
    tensors = meta_tensors()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load(save(tmp_path / "changed", tensors), of=folder)


def test_damaged_divided_and_pickled_files(folder: Path) -> None:
    whole = (folder / "consolidated.pth").read_bytes()
    (folder / "consolidated.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(folder)
    (folder / "consolidated.pth").write_bytes(pickle.dumps({"run": print}, protocol=2))
    with pytest.raises(CheckpointError, match="could run code"):
        load(folder)
    (folder / "consolidated.01.pth").write_bytes(whole)
    with pytest.raises(CheckpointError, match="weights in 2 parts"):
        load(folder)
    for part in folder.glob("*.pth"):
        part.unlink()
    with pytest.raises(CheckpointError, match=r"no consolidated\.pth"):
        load(folder)
