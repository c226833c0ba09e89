"""Modules for multi-token prediction compute what a straightforward dense implementation of the paper computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.attention import load_backend
from models.attention.reference import attend
from models.batch import PAGE_SIZE, RaggedBatch
from models.decoder import Decoder
from models.heads.mtp import MTPConfig, MTPModel
from models.layers.ops import TorchOps, load_ops
from tests.engines import VOCAB, tiny_decoder
from tests.paged import PagedRun

CPU = torch.device("cpu")


class Dense:
    """Formulas 21 to 23 of 2412.19437 over whole sequences, in float64, with as little code as possible."""

    def __init__(self, config: MTPConfig, target: Decoder, weights: dict[str, Tensor]) -> None:
        self.config, self.target = config, target
        self.weights = {name: weight.clone() for name, weight in weights.items()}

    def module(self, index: int, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One module over consecutive entries [n]: (normed output, what the next one takes), [n, H] each."""
        w = {
            n.removeprefix(f"modules.{index}."): x for n, x in self.weights.items() if n.startswith(f"modules.{index}.")
        }
        layer = self.config.layer
        embedded = self.norm(self.target.embed(tokens), w["enorm.weight"])
        hidden = self.norm(hidden, w["hnorm.weight"])
        parts = [hidden, embedded] if self.config.hidden_first else [embedded, hidden]
        x = torch.cat(parts, -1) @ w["proj.weight"].T
        u = self.norm(x, w["input_norm.weight"])
        q, k, v = (
            (u @ w[f"{part}.weight"].T + w.get(f"{part}.bias", torch.zeros(()))).view(len(tokens), -1, layer.head_dim)
            for part in "qkv"
        )
        if layer.qk_norm:
            q, k = self.norm(q, w["q_norm.weight"]), self.norm(k, w["k_norm.weight"])
        q, k = self.rotate(q), self.rotate(k)
        group = layer.num_heads // layer.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / layer.head_dim**0.5
        scores = scores.masked_fill(torch.ones(len(tokens), len(tokens)).triu(1).bool(), -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + attended @ w["o.weight"].T
        u = self.norm(x, w["mlp_norm.weight"])
        x = x + (torch.nn.functional.silu(u @ w["gate.weight"].T) * (u @ w["up.weight"].T)) @ w["down.weight"].T
        normed = self.norm(x, w["norm.weight"])
        return normed, normed if self.config.recycle == "post" else x

    def drafted(self, tokens: list[int], features: Tensor, drafts: list[int]) -> Tensor:
        """Logits [1 + len(drafts), V] after the last of ``tokens`` and after each draft.

        Args:
            features: [len(tokens) - 1, H] of all tokens but the last.
        """
        everything, last = torch.tensor(tokens + drafts), self.config.num_modules - 1
        outputs, hidden = [], features
        for index in range(min(last, len(drafts)) + 1):
            # module k begins at token k and ends k - 1 tokens after the known ones
            entries = everything[index + 1 : len(tokens) + index]
            inputs = hidden[: len(entries)]
            normed, hidden = self.module(index, entries, inputs)
            outputs.append(normed[-1])
        while len(outputs) < 1 + len(drafts):
            entries = everything[last + 1 : len(entries) + last + 2]
            inputs = torch.cat([inputs, hidden[-1:]])
            normed, hidden = self.module(last, entries, inputs)
            outputs.append(normed[-1])
        return self.target.logits(torch.stack(outputs))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.layer.norm_eps).sqrt() * weight

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        inverse = 1 / self.config.layer.rope.theta ** (torch.arange(half) / half)  # float32, as everywhere
        angles = torch.arange(len(x)).double()[:, None] * inverse
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


class Served:
    """A model driven as the engine does: entries in chunks, then a tree level by level on scratch slots."""

    def __init__(self, model: MTPModel, rows: int = 1) -> None:
        self.model = model
        self.run = PagedRun(model, rows)  # type: ignore[arg-type]
        self.run.lengths = [1] * rows  # slot 0 has no entry
        self.before = torch.zeros(rows, model.carry_size, dtype=model.dtype)

    @torch.inference_mode()
    def catch_up(self, chains: list[list[int]], features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Append entries to every row; logits after the last of each [R, V] and its carry [R, C]."""
        batch = self.run.batch(dict(enumerate(chains)))
        batch = replace(batch, positions=batch.positions - 1)
        before = self.before if self.model.continues else None
        out = self.model.catch_up(batch, torch.cat(features), before, self.run.cache)
        ends = batch.row_starts[1:].long() - 1
        self.before = out.carry[ends]
        self.run.lengths = [length + len(chain) for length, chain in zip(self.run.lengths, chains, strict=True)]
        return self.model.logits(out.hidden[ends]), out.carry[ends]

    @torch.inference_mode()
    def level(
        self, row: int, depth: int, scratch: int, tokens: list[int], masks: list[int], carry: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(logits [n, V], carry [n, C]) of nodes of one depth; masks are of ancestors-or-self, bit 0 the root."""
        root, count = self.run.lengths[row] - 1, len(tokens)
        keys = range(root + 1 + scratch, root + 1 + scratch + count)
        pages = self.run.pages[row]
        batch = RaggedBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.full((count,), root + depth - 1),
            slots=torch.tensor([pages[key // PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE for key in keys]),
            visible=torch.full((count,), root + 1, dtype=torch.int32),
            tree_mask=torch.tensor(masks),
            row_of=torch.zeros(count, dtype=torch.int32),
            row_starts=torch.tensor([0, count], dtype=torch.int32),
            tree_base=torch.tensor([root], dtype=torch.int32),
            page_table=torch.tensor([pages], dtype=torch.int32),
            wanted=torch.arange(count),
            max_query=count,
            max_keys=keys.stop,
        )
        batch.validate()
        out = self.model.extend(batch, carry, depth, self.run.cache)
        return self.model.logits(out.hidden), out.carry


def tiny_mtp(target: Decoder, config: MTPConfig, seed: int = 5, *, fused: bool = False) -> tuple[MTPModel, Dense]:
    """Random modules for a target, and the same weights densely."""
    backend = load_backend("auto", CPU, target.dtype) if fused else attend
    model = MTPModel(config, target, load_ops(CPU, target.dtype) if fused else TorchOps(), backend)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.weights().values():
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(1 + 0.2 * drawn if weight.dim() == 1 else 0.3 * drawn)
    dense = Dense(config, target, model.weights())
    model.pack()
    return model, dense


def features_of(target: Decoder, config: MTPConfig, tokens: list[int]) -> Tensor:
    """[len(tokens), H] by the target."""
    run = PagedRun(target)
    tap = target.num_layers
    out = run.forward(run.batch({0: tokens}), (tap,))
    return out.hidden if config.feed == "post" else out.taps[tap]


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


VARIANTS = {
    "one": {},
    "one, hidden first, all norms before": {"hidden_first": True, "feed": "pre", "recycle": "pre"},
    "two": {"modules": 2},
    "three, fed before the norm": {"modules": 3, "feed": "pre"},
    "three, recycled before the norm, biases": {"modules": 3, "recycle": "pre", "qkv_bias": True},
    "two, normed queries": {"modules": 2, "qk_norm": True},
}


def variant(target: Decoder, name: str) -> MTPConfig:
    settings = dict(VARIANTS[name])
    config = MTPConfig.like(target.config, settings.pop("modules", 1))  # type: ignore[arg-type]
    layer = {key: settings.pop(key) for key in ("qkv_bias", "qk_norm") if key in settings}
    return replace(config, layer=replace(config.layer, **layer), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_paths_of_a_tree_are_those_of_the_paper(name: str, fused: bool) -> None:
    target = tiny_decoder(torch.float64)
    config = variant(target, name)
    model, dense = tiny_mtp(target, config, fused=fused)
    tokens = random_tokens(21, 1)
    features = features_of(target, config, tokens)[:-1]

    served = Served(model)
    for start, end in ((1, 2), (2, 9), (9, 21)):  # in chunks
        logits, carry = served.catch_up([tokens[start:end]], [features[start - 1 : end - 1]])
    torch.testing.assert_close(logits, dense.drafted(tokens, features, []), rtol=0, atol=1e-9)

    paths: dict[int, list[int]] = {0: []}  # bit of each node -> its drafts
    masks, carries, above, scratch = {0: 1}, {0: carry[0]}, [0], 0
    for depth in range(1, 6):
        parents = [above[i % len(above)] for i in range(3)]
        bits = [1 + scratch + i for i in range(3)]
        for bit, parent in zip(bits, parents, strict=True):
            paths[bit] = [*paths[parent], (7 * bit + depth) % VOCAB]
            masks[bit] = masks[parent] | 1 << bit
        drafts, level_masks = [paths[bit][-1] for bit in bits], [masks[bit] for bit in bits]
        stacked = torch.stack([carries[parent] for parent in parents])
        level, carry = served.level(0, depth, scratch, drafts, level_masks, stacked)
        for i, bit in enumerate(bits):
            carries[bit] = carry[i]
            expected = dense.drafted(tokens, features, paths[bit])[-1]
            torch.testing.assert_close(level[i], expected, rtol=0, atol=1e-9)
        above, scratch = bits, scratch + 3


@pytest.mark.parametrize("name", ["one", "three, recycled before the norm, biases"])
def test_every_entry_predicts_what_the_paper_has_it_predict(name: str) -> None:
    """Teacher-forced: the first module's logits at every token of two rows of unequal length."""
    target = tiny_decoder(torch.float64)
    config = variant(target, name)
    model, dense = tiny_mtp(target, config)
    rows = [random_tokens(18, 2), random_tokens(7, 3)]
    features = [features_of(target, config, tokens) for tokens in rows]
    served = Served(model, rows=2)
    longest = max(map(len, rows))
    for end in range(2, longest + 1):
        if end <= len(rows[1]):
            logits, _ = served.catch_up(
                [tokens[end - 1 : end] for tokens in rows], [f[end - 2 : end - 1] for f in features]
            )
            for row, tokens in enumerate(rows):
                expected = dense.drafted(tokens[:end], features[row][: end - 1], [])
                torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=1e-9)


def test_two_tokens_are_enough_for_any_number_of_modules() -> None:
    """Modules begin at slots 1, 2, 3: before their first entry there is nothing to attend to, and no NaN."""
    target = tiny_decoder(torch.float64)
    for fused in (False, True):
        config = MTPConfig.like(target.config, 3)
        model, dense = tiny_mtp(target, config, fused=fused)
        tokens, drafts = random_tokens(2, 4), random_tokens(4, 5)
        features = features_of(target, config, tokens)[:-1]
        served = Served(model)
        logits, carry = served.catch_up([tokens[1:]], [features])
        torch.testing.assert_close(logits, dense.drafted(tokens, features, []), rtol=0, atol=1e-9)
        mask = 1
        for depth, token in enumerate(drafts, start=1):
            mask |= 1 << depth
            logits, carry = served.level(0, depth, depth - 1, [token], [mask], carry)
            expected = dense.drafted(tokens, features, drafts[:depth])[-1:]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_float32_with_fused_kernels_stays_near() -> None:
    exact, short = tiny_decoder(torch.float64), tiny_decoder(torch.float32)
    config = MTPConfig.like(exact.config, 2)
    tokens = random_tokens(30, 6)
    _, dense = tiny_mtp(exact, config)
    model, _ = tiny_mtp(short, config, fused=True)
    features = features_of(exact, config, tokens)[:-1]
    logits, _ = Served(model).catch_up([tokens[1:]], [features.float()])
    expected = dense.drafted(tokens, features, [])
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
