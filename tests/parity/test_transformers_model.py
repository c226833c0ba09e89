"""Transformers models on our cache against transformers itself: logits, greedy text, trees, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BlenderbotSmallConfig,
    BloomConfig,
    DeepseekV4Config,
    DiffLlamaConfig,
    FalconH1Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    StableLmConfig,
    T5Config,
    ZayaConfig,
)

from models.loader import CheckpointError, load_model
from models.transformers_checkpoint import load_checkpoint
from models.transformers_comparison import compare_with, reference_logits
from models.transformers_model import TransformersModel, load_transformers_model
from tests.paged import PagedRun, greedy_rows
from tests.parity import zoo

LENGTHS = (1, 15, 16, 17, 300)
NEW_TOKENS = 200


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, zoo.VOCAB) for _ in range(length)] for length in lengths]


def load(path: Path, dtype: str = "float32", max_model_len: int | None = None) -> TransformersModel:
    device = torch.device("cpu")
    return load_transformers_model(path, dtype=dtype, device=device, attention="auto", max_model_len=max_model_len)


@torch.no_grad()
def eager_logits(model: PreTrainedModel, text: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([text]), use_cache=False).logits[0]
    return logits


def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """transformers' greedy text; the margins of its choices are checked, so that rounding cannot change it."""
    ids = torch.tensor([prompt])
    text = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()
    best = eager_logits(model, text)[len(prompt) - 1 : -1].topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) >= zoo.MARGIN, "choose another seed in the zoo"
    return text[len(prompt) :]


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_logits_and_greedy_text(name: str, tmp_path: Path) -> None:
    theirs = zoo.make(name)
    ours = load(zoo.save(theirs, tmp_path))
    logits = PagedRun(ours, rows=len(LENGTHS)).extend(prompts())
    for prompt, row in zip(prompts(), logits, strict=True):
        torch.testing.assert_close(row, eager_logits(theirs, prompt), atol=1e-4, rtol=0)
    texts = greedy_rows(ours, prompts(), NEW_TOKENS)
    assert texts == [generated(theirs, prompt) for prompt in prompts()]


@pytest.mark.parametrize("model_type", zoo.SPECIAL)
def test_logits_of_special_families(model_type: str, tmp_path: Path) -> None:
    theirs = zoo.special(model_type)
    ours = load(zoo.save(theirs, tmp_path))
    run = PagedRun(ours, rows=2)
    texts = prompts((3, 100))
    for text, row in zip(texts, run.extend(texts, chunk=32), strict=True):
        torch.testing.assert_close(row, eager_logits(theirs, text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_chunked_prefill(name: str, tmp_path: Path) -> None:
    ours = load(zoo.save(zoo.make(name), tmp_path), "float64")
    whole = PagedRun(ours, rows=3).extend(prompts((1, 16, 120)))
    chunked = PagedRun(ours, rows=3).extend(prompts((1, 16, 120)), chunk=13)
    for expected, row in zip(whole, chunked, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("context", [0, 61])  # 61: longer than the sliding windows, in the middle of a page
def test_tree_nodes_equal_plain_paths(name: str, context: int, tmp_path: Path) -> None:
    ours = load(zoo.save(zoo.make(name), tmp_path), "float64")
    prompt, tokens = prompts((context, 9))
    parents = [-1, 0, 0, 1, 1, 3, 2, 6, 5]
    run = PagedRun(ours)
    if prompt:
        run.extend([prompt])
    nodes = run.tree(0, tokens, parents)
    for leaf in (4, 7, 8):
        path = [leaf]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        plain = PagedRun(ours).extend([prompt + [tokens[node] for node in path]])[0]
        torch.testing.assert_close(nodes[path], plain[len(prompt) :], atol=1e-6, rtol=0)


def test_two_models_in_one_process(tmp_path: Path) -> None:
    names = ("gemma2", "qwen3_moe")
    theirs = [zoo.make(name) for name in names]
    ours = [load(zoo.save(model, tmp_path / name)) for name, model in zip(names, theirs)]
    runs = [PagedRun(model) for model in ours]
    text = prompts((60,))[0]
    for piece in (text[:20], text[20:45], text[45:]):  # turn and turn about, each on its own cache
        rows = [run.extend([piece])[0] for run in runs]
    for row, model in zip(rows, theirs):
        torch.testing.assert_close(row, eager_logits(model, text)[45:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_taps_are_the_residual_stream(name: str, tmp_path: Path) -> None:
    theirs = zoo.make(name)
    ours = load(zoo.save(theirs, tmp_path))
    run, text = PagedRun(ours), prompts((20,))[0]
    out = run.forward(run.batch({0: text}), taps=(0, 1))
    with torch.no_grad():
        expected = theirs(torch.tensor([text]), output_hidden_states=True).hidden_states
    assert set(out.taps) == {0, 1}
    for tap, hidden in out.taps.items():
        torch.testing.assert_close(hidden, expected[tap][0], atol=1e-4, rtol=0)
    assert not run.forward(run.batch({0: text})).taps


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float16", torch.float16)])
def test_dtypes(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    theirs = zoo.make("mixtral")
    ours = load(zoo.save(theirs.to(torch.bfloat16), tmp_path), dtype)
    assert ours.dtype is expected
    logits = PagedRun(ours).extend([prompts((30,))[0]])[0]
    assert logits.dtype is torch.float32
    reference = eager_logits(theirs.float(), prompts((30,))[0])
    assert float((logits - reference).norm(dim=1).median() / reference.norm(dim=1).median()) < 0.05


def test_the_loader_takes_this_path_for_other_families(tmp_path: Path) -> None:
    ours = load_model(zoo.save(zoo.make("olmo2"), tmp_path), max_model_len=64)
    assert isinstance(ours, TransformersModel)
    assert ours.max_model_len == 64
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers) == (zoo.VOCAB, 48, 2)


# length-dependent RoPE ---------------------------------------------------------------------------------------------


def _dynamic() -> PretrainedConfig:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, rope_parameters=rope, initializer_range=0.3,
    )  # fmt: skip


def test_dynamic_rope_does_not_depend_on_batch_mates(tmp_path: Path) -> None:
    ours = load(zoo.save(zoo.random_model(_dynamic()), tmp_path), "float64")
    assert ours.max_model_len == 256  # 64 positions, scaled by 4
    short, long = prompts((30, 200))
    alone = PagedRun(ours).extend([short])[0]
    together = PagedRun(ours, rows=2).extend([short, long])[0]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(PagedRun(ours).extend([short])[0], alone, atol=0, rtol=0)


def test_dynamic_rope_has_the_frequencies_of_the_longest_text(tmp_path: Path) -> None:
    theirs = zoo.random_model(_dynamic())
    folder, text = zoo.save(theirs, tmp_path), prompts((100,))[0]
    ours = PagedRun(load(folder, max_model_len=100)).extend([text])[0]
    torch.testing.assert_close(ours, eager_logits(theirs, text), atol=1e-4, rtol=0)
    wider = PagedRun(load(folder, max_model_len=256)).extend([text])[0]
    assert float((wider - ours).abs().max()) > 1e-2
    unscaled = PagedRun(load(folder, max_model_len=64)).extend([text[:50]])[0]
    torch.testing.assert_close(unscaled, eager_logits(theirs, text[:50]), atol=1e-4, rtol=0)


def test_longrope_takes_the_factors_that_the_longest_text_needs(tmp_path: Path) -> None:
    config = zoo.FAMILIES["phi3_longrope_short"].configure()
    config.rope_parameters["original_max_position_embeddings"] = config.original_max_position_embeddings = 64
    theirs = zoo.random_model(config)
    folder, text = zoo.save(theirs, tmp_path), prompts((80,))[0]
    long = PagedRun(load(folder, max_model_len=100))
    start = long.extend([text[:50]])[0]
    torch.testing.assert_close(start, eager_logits(theirs, text)[:50], atol=1e-4, rtol=0)
    short = PagedRun(load(folder, max_model_len=64)).extend([text[:50]])[0]
    torch.testing.assert_close(short, eager_logits(theirs, text[:50]), atol=1e-4, rtol=0)
    assert float((short - start).abs().max()) > 1e-2


# what is refused ---------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": zoo.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}

REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "mamba": (
        lambda: MambaConfig(vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=2),
        "layers of type linear_attention",
    ),
    "bloom": (lambda: BloomConfig(vocab_size=zoo.VOCAB, hidden_size=32, n_head=4, n_layer=2), "attention interface"),
    "stablelm": (lambda: StableLmConfig(**SMALL), "do not pass keyword arguments on"),
    "diffllama": (lambda: DiffLlamaConfig(**SMALL), "not every layer calls the attention interface once"),
    "bert": (lambda: BertConfig(**SMALL), "neither causal nor a sliding window"),
    "roberta": (lambda: RobertaConfig(**SMALL, is_decoder=True, pad_token_id=1), "does not number positions from 0"),
    "blenderbot-small": (
        lambda: BlenderbotSmallConfig(
            vocab_size=zoo.VOCAB,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            init_std=0.3,
            is_decoder=True,
            is_encoder_decoder=False,
        ),
        "more than the token and its position",
    ),
    "deepseek_v4": (
        lambda: DeepseekV4Config(
            **SMALL,
            num_key_value_heads=1,
            head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            q_lora_rank=16,
            o_lora_rank=16,
        ),
        "layers of type .*compressed",
    ),
    "llama4_text": (
        lambda: Llama4TextConfig(
            **SMALL, intermediate_size_mlp=48, num_key_value_heads=2, num_local_experts=2, attention_chunk_size=100
        ),
        "neither causal nor a sliding window",
    ),
    "falcon_h1": (
        lambda: FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8),
        "cannot be served",
    ),
    "zaya": (lambda: ZayaConfig(**SMALL), "layers of type hybrid"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_families(model_type: str, dtype: str, tmp_path: Path) -> None:
    configure, reason = REFUSED[model_type]
    folder = zoo.save(zoo.random_model(configure()), tmp_path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(folder, dtype, max_model_len=128)
    assert repr(model_type) in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [{"scale": 0.1}, {"window": 4}, {"soft_cap": 0.2}], ids=str)
def test_attention_that_computes_something_else_is_noticed(dtype: str, wrong: dict[str, float], tmp_path: Path) -> None:
    folder = zoo.save(zoo.make("olmo2"), tmp_path)
    theirs = load_checkpoint(folder, dtype)
    reference = reference_logits(theirs)
    ours = load(folder, dtype)
    compare_with(ours, reference)
    ours.specs = tuple(replace(spec, **wrong) for spec in ours.specs)
    with pytest.raises(ValueError, match="differ from transformers'"):
        compare_with(ours, reference)


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=zoo.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    folder = zoo.save(AutoModelForSeq2SeqLM.from_config(config), tmp_path)
    with pytest.raises(CheckpointError, match="'t5' is an encoder-decoder"):
        load(folder)


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(CheckpointError, match="'homemade': it brings its own code, which is never run"):
        load(tmp_path)


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _drop(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.self_attn.q_proj.weight"]


def _add(weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.self_attn.extra.weight"] = torch.zeros(2)


def _shorten(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing weight model\.layers\.1\.self_attn\.q_proj\.weight"),
        (_add, r"unknown weight model\.layers\.1\.self_attn\.extra\.weight"),
        (_shorten, r"weight model\.norm\.weight has shape \[5\], the configuration says \[48\]"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    folder = zoo.save(zoo.make("olmo2"), tmp_path)
    _rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_more_positions_than_the_model_has(tmp_path: Path) -> None:
    folder = zoo.save(zoo.make("gpt2"), tmp_path)
    with pytest.raises(CheckpointError, match=f"--max-model-len 769 is not possible.* 1 to {zoo.LONG}"):
        load(folder, max_model_len=zoo.LONG + 1)


def test_a_context_length_must_be_known(tmp_path: Path) -> None:
    folder = zoo.save(zoo.random_model(REFUSED["mamba"][0]()), tmp_path)
    with pytest.raises(CheckpointError, match="states no context length; set max_model_len"):
        load(folder)
