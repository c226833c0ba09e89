"""An inflated family computes what the small one computes, and cannot be told from a trained model by its cost."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.inflate import DRAFTERS, inflate, main
from benchmarks.inflate_heads import inflate_eagle3
from benchmarks.inflate_model import Inflation, read_llama
from benchmarks.inflate_shapes import DRAFT_SHARE, LLAMA_3_8B, TARGETS, Shape, draft_shape, drafted_vocabulary
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from decoding.request import SamplingParams
from models.checkpoint import Checkpoint
from models.heads.eagle3_files import load_eagle3, write_eagle3
from models.heads.eagle3_files import read_eagle3_config as eagle3_config
from models.loader import load_model
from tests.engines import ALL_NODES, ROOT
from tests.paged import PagedRun
from tests.parity.tiny import load_reference, random_prompt, save_tiny

SMALL = {"vocab_size": 256, "num_hidden_layers": 3, "rms_norm_eps": 1e-3}  # an eps that counts
SAME = Shape(hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=256, tied=True)
SHAPES = {
    "wider": replace(SAME, hidden=104),
    "odd sizes": replace(SAME, hidden=100, mlp=149),
    "deeper": replace(SAME, layers=7),
    "more heads": replace(SAME, heads=8, kv_heads=4),
    "more queries to a K/V head": replace(SAME, heads=8),
    "fewer queries to a K/V head": replace(SAME, hidden=66, heads=6, kv_heads=6),
    "longer heads": replace(SAME, head_dim=48),
    "more tokens": replace(SAME, hidden=96, vocab=700),
    "its own head": replace(SAME, hidden=96, vocab=700, tied=False),
    "all": Shape(256, 8, 16, 4, 32, 200, 1000, tied=False),
}
FAMILY = Shape(hidden=320, layers=10, heads=10, kv_heads=5, head_dim=64, mlp=768, vocab=33_024, tied=True)
TREES = "depth=6,beam=4,top_k=8,min_confidence=0"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("small"), tie_word_embeddings=True, **SMALL)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family")
    inflate(ROOT / "demo/target", out, FAMILY, dtype="float32")
    return out


def inflated(small: Path, shape: Shape, out: Path, dtype: torch.dtype = torch.float64) -> Inflation:
    made = Inflation(small, shape, dtype=dtype, context=None, seed=0)
    made.write(out)
    return made


def outputs(folder: Path, taps: tuple[int, ...], dtype: str = "float64") -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [T, V] and taps [T, H] of a prompt of some tokens."""
    model = load_model(folder, dtype=dtype)
    run = PagedRun(model)
    out = run.forward(run.batch({0: random_prompt(40)}), taps)
    return model.logits(out.hidden), out.taps


@pytest.mark.parametrize("name", list(SHAPES))
def test_an_inflated_model_computes_what_the_small_one_does(name: str, small: Path, tmp_path: Path) -> None:
    made = inflated(small, SHAPES[name], tmp_path)
    wanted, taps = outputs(small, (0, 1, 2, 3))
    found, wide_taps = outputs(tmp_path, tuple(made.tap(tap) for tap in taps))
    assert found.shape == (40, SHAPES[name].vocab)
    assert load_model(tmp_path).num_layers == SHAPES[name].layers
    torch.testing.assert_close(found.log_softmax(1)[:, :256], wanted.log_softmax(1), rtol=1e-9, atol=1e-9)
    for tap, stream in taps.items():
        torch.testing.assert_close(wide_taps[made.tap(tap)][:, :64], stream, rtol=1e-9, atol=1e-9)
        unread = wide_taps[made.tap(tap)][:, 64:]
        assert torch.equal(unread, unread[:1].expand_as(unread))  # zeros, and the anchor's constant
        assert int(unread[0].count_nonzero()) == (SHAPES[name].vocab > 256)


@pytest.mark.parametrize("name", ["more tokens", "its own head", "all"])
def test_tokens_that_the_small_model_does_not_have_never_win(name: str, small: Path, tmp_path: Path) -> None:
    inflated(small, SHAPES[name], tmp_path)
    logits, _ = outputs(tmp_path, ())
    assert bool((logits[:, 256:].amax(1) < logits[:, :256].amin(1) - 50).all())


def test_transformers_agrees(small: Path, tmp_path: Path) -> None:
    inflated(small, SHAPES["all"], tmp_path, torch.float32)
    ids = torch.tensor([random_prompt(40)])
    with torch.no_grad():
        wanted, found = (load_reference(folder)(ids).logits.log_softmax(-1) for folder in (small, tmp_path))
    torch.testing.assert_close(found[..., :256], wanted, rtol=1e-4, atol=1e-4)


def test_what_is_padded_is_noise_of_the_trained_weights_size(small: Path, tmp_path: Path) -> None:
    inflated(small, replace(SHAPES["all"], mlp=800), tmp_path, torch.bfloat16)
    trained = load_file(small / "model.safetensors")
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if ".layers." not in name or weight.dim() < 2:
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        like = trained[f"model.layers.{int(layer) * 3 // 8}.{rest}"]
        assert weight.float().std() == pytest.approx(float(like.std()), rel=0.35), name
        assert float((weight == 0).float().mean()) < 0.3, name
        assert weight[96:, 96:].abs().max() < 2 * like.std(), name


def test_bfloat16_keeps_the_bits_of_matrices_and_the_value_of_norms(small: Path, tmp_path: Path) -> None:
    inflated(small, replace(SHAPES["all"], head_dim=16), tmp_path, torch.bfloat16)
    wide, trained = load_file(tmp_path / "model.safetensors"), load_file(small / "model.safetensors")
    assert torch.equal(
        wide["model.layers.0.mlp.up_proj.weight"][:96, :64], trained["model.layers.0.mlp.up_proj.weight"].bfloat16()
    )
    norm, small_norm = wide["model.layers.0.input_layernorm.weight"], trained["model.layers.0.input_layernorm.weight"]
    assert torch.equal(norm[:64].float(), small_norm / 2)  # of four times the width; float32, because these are


def test_shards_hold_one_model(small: Path, tmp_path: Path) -> None:
    made = Inflation(small, SHAPES["all"], dtype=torch.float64, context=2048, seed=0)
    made.write(tmp_path, shard_bytes=300_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[-1] == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    assert all(path.stat().st_size < 300_000 + 8 * 256_000 + 10_000 for path in tmp_path.glob("*.safetensors"))
    whole = tmp_path / "whole"
    inflated(small, SHAPES["all"], whole)
    torch.testing.assert_close(outputs(tmp_path, ())[0], outputs(whole, ())[0], rtol=0, atol=0)
    assert load_model(tmp_path).max_model_len == 2048


@cache
def prompts() -> list[str]:
    lines = (ROOT / "demo/prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[4:40:18]]


def rollouts(root: Path, drafter: str) -> list[tuple[list[int], int, int]]:
    """(text, steps, accepted) of each prompt, at temperature 0 and 1."""
    speculate = (f"{drafter}={root}/{drafter}" + ("" if drafter == "medusa" else f":{TREES}"),) if drafter else ()
    engine = Engine.load(
        f"{root}/target",
        speculate=speculate,
        dtype="float32",
        device="cpu",
        max_nodes=24,
        plan=ALL_NODES,
        num_pages=400,
    )
    done = []
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=24, temperature=temperature, seed=4, ignore_eos=True)
        done += engine.generate(prompts(), params)
    return [(list(one.token_ids), one.speculation.steps, one.speculation.accepted) for one in done]


@pytest.mark.parametrize("drafter", ["", *DRAFTERS])
def test_the_family_drafts_as_the_small_one_does(drafter: str, family: Path) -> None:
    assert rollouts(family, drafter) == rollouts(ROOT / "demo", drafter)


def test_the_family_has_published_proportions(family: Path) -> None:
    stated = {one["name"]: one for one in json.loads((family / "inflate.json").read_text())["made"]}
    assert stated["target"]["parameters"] == FAMILY.parameters
    assert stated["draft"]["share"] >= DRAFT_SHARE
    heads = Checkpoint.open(family / "eagle3").shapes
    assert heads["lm_head.weight"] == (8256, 320)
    assert heads["fc.weight"] == (320, 960)
    assert heads["d2t"] == (8256,)


def test_a_draft_vocabulary_of_its_own_is_kept(tmp_path: Path) -> None:
    source, weights = ROOT / "demo/eagle3", load_file(ROOT / "demo/eagle3/model.safetensors")
    config = eagle3_config(json.loads((source / "config.json").read_text()), dict.fromkeys(weights, ""), 8, source)
    ids = torch.arange(0, 8192, 2)
    weights["lm_head.weight"] = weights["lm_head.weight"][ids]
    write_eagle3(tmp_path / "small", replace(config, draft_vocab_size=4096), weights, ids)
    target = Inflation(ROOT / "demo/target", FAMILY, dtype=torch.bfloat16, context=None, seed=0)
    target.write(tmp_path / "target")
    inflate_eagle3(tmp_path / "small", tmp_path / "eagle3", target)
    wide = load_eagle3(tmp_path / "eagle3", load_model(tmp_path / "target", dtype="float32"))
    assert wide.token_ids is not None
    assert wide.config.num_drafted == 8256
    assert torch.equal(wide.token_ids[:4096], ids)
    assert int(wide.token_ids[4096:].min()) == 8192


def test_named_shapes_are_those_of_published_models() -> None:
    demo = Shape.of(read_llama(ROOT / "demo/target")[1])
    assert TARGETS["8b"].parameters == 8_030_261_248  # as Meta's model cards and files say
    assert TARGETS["1b"].parameters == 1_235_814_400
    assert TARGETS["0.3b"].parameters == pytest.approx(0.3e9, rel=0.1)
    for shape in TARGETS.values():
        shape.holds(demo)
        draft = draft_shape(shape, replace(demo, layers=1))
        draft.holds(replace(demo, layers=1))
        assert DRAFT_SHARE <= draft.parameters / shape.parameters < 1.3 * DRAFT_SHARE
    assert drafted_vocabulary(LLAMA_3_8B, 8192) == pytest.approx(32_000, rel=0.01)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden": 63}, "hidden 63 is less"),
        ({"layers": 2}, "layers 2 is less"),
        ({"head_dim": 24}, "multiple"),
        ({"heads": 7}, "evenly"),
        ({"vocab": 300}, "raise hidden"),
        ({"hidden": 65}, "multiple of the 4 heads"),
        ({"heads": 3, "kv_heads": 3}, "heads 3 is less"),
    ],
)
def test_shapes_that_cannot_hold_the_model(
    changed: dict[str, int], said: str | None, small: Path, tmp_path: Path
) -> None:
    shape = replace(SAME, **changed)
    if said is None:
        Inflation(small, shape, dtype=torch.float32, context=None, seed=0)
    else:
        with pytest.raises(ConfigError, match=said):
            Inflation(small, shape, dtype=torch.float32, context=None, seed=0)


def test_copies_of_a_shared_head_need_room(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path, hidden_size=96, num_attention_heads=6, tie_word_embeddings=True)
    shape = Shape.of(read_llama(source)[1])
    with pytest.raises(ConfigError, match="at least 4 K/V heads"):
        Inflation(source, replace(shape, kv_heads=3), dtype=torch.float32, context=None, seed=0)


def test_a_head_of_its_own_cannot_be_tied(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path, **SMALL)
    with pytest.raises(ConfigError, match="--untied"):
        Inflation(source, SAME, dtype=torch.float32, context=None, seed=0)


@pytest.mark.parametrize("variant", ["qwen3", "llama-tied-biased"])
def test_other_models_are_refused(variant: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can be inflated"):
        read_llama(save_tiny(variant, tmp_path))


def test_nothing_is_overwritten(small: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "target/model.safetensors")
    with pytest.raises(ConfigError, match="holds a model already"):
        inflate(small, tmp_path, SAME, drafters=())
    assert not (tmp_path / "target/config.json").exists()


def test_the_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(small), str(tmp_path), "--drafters", "none", "--hidden", "96", "--vocab", "300", "--untied"]
    assert main(words) == 0
    assert "target" in capsys.readouterr().out
    assert load_model(tmp_path / "target").vocab_size == 300
    assert main(words) == 1
    assert "holds a model already" in capsys.readouterr().err
    assert main([*words[:3], "medusaa"]) == 1
    assert "did you mean 'medusa'" in capsys.readouterr().err
    assert main([*words[:2], "--shape", "7b"]) == 1
    assert "0.3b" in capsys.readouterr().err
