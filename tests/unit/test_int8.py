"""Weights of eight bits: the rounding, the product, and that a row's bits do not depend on its neighbours."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoding.assemble import build_drafters, load_target
from decoding.config import EngineConfig
from decoding.engine import Engine
from decoding.errors import ConfigError
from decoding.request import SamplingParams
from models import kernels
from models.attention import load_backend
from models.checkpoint import Checkpoint, CheckpointError
from models.decoder import Decoder
from models.families import NATIVE_FAMILIES
from models.layers.int8 import Int8Product, TorchaoProduct, int8_packing, quantize
from models.layers.linear import Linear
from models.layers.ops import load_ops
from models.layers.quantization import packing_of
from models.loader import fill, layer_packer, load_model, read_config

CPU = torch.device("cpu")
DEMO = Path(__file__).parents[2] / "demo"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 96), (1, 1), (257, 130), (1024, 300), (1087, 64)]  # odd inputs, outputs that fill no block

needs_kernels = pytest.mark.skipif(not kernels.load(), reason="the CPU kernels are not available")


def product(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Int8Product, Tensor, Tensor]:
    """A product, and the weight [O, I] and bias [O] that it stands for, in float64."""
    torch.manual_seed(inputs)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    values, scale = quantize(weight)
    return Int8Product(weight, bias), values.double() * scale.double(), bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_symmetric_and_to_the_nearest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 70).to(dtype)
    weight[3] = 0
    values, scale = quantize(weight)
    assert values.dtype == torch.int8
    assert int(values.min()) >= -127
    torch.testing.assert_close(scale.flatten()[4:], weight[4:].float().abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert torch.equal(values[3], torch.zeros(70, dtype=torch.int8))
    assert torch.equal(quantize(-weight)[0], -values)
    error = (values.double() * scale.double() - weight.double()).abs()
    assert bool((error <= scale.double() * 0.5001).all())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_the_product_is_that_of_the_rounded_weight(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    multiply, weight, bias = product(inputs, outputs, dtype)
    x = torch.randn(7, inputs).to(dtype)
    expected = x.double() @ weight.T + bias
    tolerance = 32 * max(torch.finfo(dtype).eps, 1e-15) * float(expected.abs().max())
    assert multiply(x).dtype == dtype
    torch.testing.assert_close(multiply(x).double(), expected, rtol=0, atol=tolerance)
    strided = torch.randn(7, inputs + 3).to(dtype)[:, 1 : 1 + inputs]
    assert torch.equal(multiply(strided), multiply(strided.contiguous()))


@needs_kernels
def test_every_weight_is_multiplied_by_its_own_value() -> None:
    for dtype in DTYPES:
        values = torch.arange(-127, 128, dtype=torch.int8).repeat(70, 1)  # [O, I], every value at every place
        values = torch.stack([row.roll(i) for i, row in enumerate(values)])
        packed = torch.ops.saccade.int8_pack(values, dtype)
        one_hot = torch.eye(255, dtype=dtype)
        made = torch.ops.saccade.int8_linear(one_hot, packed, torch.ones(70), None)
        assert torch.equal(made.double(), values.T.double())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    multiply, _, _ = product(inputs, outputs, dtype)
    x = torch.randn(130, inputs).to(dtype)
    alone = torch.cat([multiply(x[row : row + 1]) for row in range(130)])
    for rows in (*range(2, 66), 119, 120, 121, 130):
        assert torch.equal(multiply(x[:rows]), alone[:rows]), f"{rows} rows"


@needs_kernels
def test_threads_change_no_bit() -> None:
    multiply, _, _ = product(1024, 1000, torch.bfloat16)
    x = torch.randn(70, 1024).bfloat16()
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            made.append((multiply(x[:1]), multiply(x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, made[0][0]) and torch.equal(many, made[0][1]) for one, many in made)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchaos_own_product_agrees(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, bias, x = torch.randn(80, 96).to(dtype), torch.randn(80).to(dtype), torch.randn(5, 96).to(dtype)
    ours, theirs = Int8Product(weight, bias)(x), TorchaoProduct(weight, bias)(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * torch.finfo(dtype).eps * float(ours.abs().max()))


@needs_kernels
def test_a_layer_gives_its_plain_weight_up() -> None:
    linear = Linear(32, 48, True, CPU, torch.float32)
    assert linear.weight is not None
    assert linear.bias is not None
    linear.weight.normal_()
    linear.bias.normal_()
    linear.pack(packing_of("int8", CPU, torch.float32))
    assert linear.weight is None
    assert isinstance(linear.product, Int8Product)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_do_not_change_the_text_of_an_int8_target(dtype: str) -> None:
    target, prompt = str(DEMO / "target"), "def mean(values):\n    return"
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3)
    plain = Engine.load(target, dtype=dtype, quantization="int8", num_pages=64)
    speculate = (f"draft={DEMO / 'draft'}", "ngram", f"eagle3={DEMO / 'eagle3'}")
    drafted = Engine.load(target, dtype=dtype, quantization="int8", num_pages=64, speculate=speculate, plan="fixed")
    text = plain.generate(prompt, params)[0].token_ids
    generation = drafted.generate(prompt, params)[0]
    assert generation.token_ids == text
    assert generation.speculation.accepted > 0
    assert plain.info.quantization == "int8"
    unquantized = Engine.load(target, dtype=dtype, num_pages=64)
    assert unquantized.info.quantization == "none"


@needs_kernels
def test_the_drafters_weights_are_of_eight_bits_too() -> None:
    speculate = tuple(f"{name}={DEMO / name}" for name in ("draft", "mtp", "eagle3", "medusa"))
    config = EngineConfig(str(DEMO / "target"), quantization="int8", speculate=speculate)
    for drafter in build_drafters(config, load_target(config)):
        linears = linears_of(drafter)
        assert linears
        assert all(isinstance(one.product, Int8Product) for one in linears), drafter


def linears_of(root: object) -> list[Linear]:
    """Every ``Linear`` that an object reaches, but for its target's."""
    found: list[Linear] = []
    seen: set[int] = set()
    waiting: list[object] = [root]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Linear):
            found.append(each)
        elif isinstance(each, list | tuple):
            waiting += each
        elif type(each).__module__.startswith(("models.", "decoding.")) and hasattr(each, "__dict__"):
            waiting += [value for name, value in vars(each).items() if name != "_target"]
    return found


@needs_kernels
def test_loading_packs_each_layer_as_soon_as_it_is_there() -> None:
    hf = read_config(DEMO / "target")
    family, checkpoint = NATIVE_FAMILIES[hf["model_type"]], Checkpoint.open(DEMO / "target")
    ops, attend = load_ops(CPU, torch.float32), load_backend("auto", CPU, torch.float32)
    model = Decoder(family.configure(hf), ops, attend, CPU, torch.float32)
    pack = layer_packer(model, packing_of("int8", CPU, torch.float32))
    plain = []

    def filled(name: str) -> None:
        pack(name)
        plain.append(sum(layer.qkv.weight is not None for layer in model.layers))

    fill(model.weights(), checkpoint, family, DEMO / "target", filled)
    assert set(plain) == set(range(len(model.layers) + 1))
    assert plain == sorted(plain, reverse=True)


def test_what_cannot_be_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--quantization 'int-8': did you mean 'int8'\?"):
        Engine.load(str(DEMO / "target"), quantization="int-8")
    with pytest.raises(ValueError, match="unknown quantization 'awq'"):
        load_model(DEMO / "target", quantization="awq")
    monkeypatch.setattr(kernels, "serves", lambda device, dtype: False)
    with pytest.raises(RuntimeError, match=r"needs the CPU kernels.*compiler, or leave --quantization out"):
        int8_packing(CPU, torch.float32)
    assert int8_packing(torch.device("cuda"), torch.bfloat16) is TorchaoProduct
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"needs torchao; pip install 'saccade\[quant\]'"):
        Engine.load(str(DEMO / "target"), quantization="int8")


def test_a_model_that_runs_through_transformers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(CheckpointError, match="--quantization int8 is for models that the native decoder runs"):
        load_model(tmp_path, quantization="int8")


def test_the_default_is_no_quantization() -> None:
    (default,) = (field.default for field in dataclasses.fields(EngineConfig) if field.name == "quantization")
    assert default == "none"
