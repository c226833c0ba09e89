"""The Triton kernels without a device: in the interpreter, compiled for devices, and what happens where they fail."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding.assemble import resolve_device
from models.attention import AttentionSpec, load_backend
from models.attention.triton import Blocks, TritonAttention, blocks_for
from models.kernels import triton as triton_kernels
from models.layers.ops import load_ops
from models.layers.triton_ops import TritonOps
from tests.contract.test_attention import Row, make_query, make_scene

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LLAMA_8B = AttentionSpec(num_heads=32, num_kv_heads=8, key_dim=128, value_dim=128, scale=128**-0.5)
# shared memory that one program may have, by compute capability (CUDA programming guide, table of technical limits)
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@pytest.mark.parametrize("file", ["check_attention.py", "check_layer_ops.py"])
def test_in_the_interpreter(file: str) -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/interpreted/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Launches:
    """Stands where a kernel stood and keeps what it would have been launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.seen: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **named: Any) -> None:
        self.seen.append(dict(zip(self.kernel.arg_names, arguments, strict=False)) | named)

    def compile(self, capability: int) -> Iterator[Any]:
        """Each launch, compiled for an NVIDIA device of this compute capability."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        for launch in self.seen:
            options = {name: value for name, value in launch.items() if name not in self.kernel.arg_names}
            signature, constants, attributes = {}, {}, {}
            for index, name in enumerate(self.kernel.arg_names):
                value = launch[name]
                if isinstance(value, Tensor):
                    signature[name] = "*" + TYPES[value.dtype]
                    attributes[(index,)] = [["tt.divisibility", 16]]
                elif self.kernel.params[index].is_constexpr:
                    signature[name], constants[(index,)] = "constexpr", value
                else:
                    signature[name] = "i32"
            source = ASTSource(self.kernel, signature, constants, attributes)
            yield triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiles anew, nothing kept."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("spec", "dtype", "capability"),
    [
        (LLAMA_8B, torch.bfloat16, 90),
        (LLAMA_8B, torch.float16, 89),
        (replace(LLAMA_8B, num_heads=21, num_kv_heads=3, key_dim=80, value_dim=40, window=40), torch.bfloat16, 80),
        (replace(LLAMA_8B, soft_cap=50.0, first_key=1, window=4096, key_dim=16, value_dim=16), torch.float32, 80),
    ],
    ids=["8B", "8B on an L4", "odd", "everything"],
)
def test_attention_compiles_and_fits(
    monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, dtype: torch.dtype, capability: int
) -> None:
    from models.attention import triton as backend

    kernels = {name: Launches(getattr(backend, name)) for name in ("attend_tiles", "merge_splits")}
    for name, launches in kernels.items():
        monkeypatch.setattr(backend, name, launches)
    scene = make_scene([Row(600, 1, (-1, 0, 0))], spec, dtype, 0)
    query = make_query(scene, spec, dtype, 0)
    attend = TritonAttention(partial(blocks_for, shared_limit=SHARED_LIMIT[capability]), backend.Spread(busy=1))
    sinks = torch.zeros(spec.num_heads, dtype=dtype) if spec.first_key else None
    attend(query, scene.key_cache, scene.value_cache, scene.batch, spec, sinks)
    assert [len(launches.seen) for launches in kernels.values()] == [3, 1], "both ways, and the batch"
    compiled = {name: list(launches.compile(capability)) for name, launches in kernels.items()}
    assert all(kernel.metadata.shared <= SHARED_LIMIT[capability] for made in compiled.values() for kernel in made)
    unit = "wgmma.mma_async" if capability == 90 else "mma.sync" if dtype != torch.float32 else "fma"
    assert all(unit in kernel.asm["ptx"] for kernel in compiled["attend_tiles"]), "not on the matrix units"


@pytest.mark.usefixtures("compiled")
def test_layer_ops_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.layers.triton_ops import kernels

    names = ("rms_norm", "add_rms_norm", "rotate_and_store", "gated")
    launched = {name: Launches(getattr(kernels, name)) for name in names}
    for name in names:
        monkeypatch.setattr(kernels, name, launched[name])
    ops, x = TritonOps(), torch.zeros(3, 4096, dtype=torch.bfloat16)
    cache, index = torch.zeros(32, 8, 128, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    heads = torch.zeros(3, 48, 128, dtype=torch.bfloat16)
    query, key, value = heads.tensor_split((32, 40), 1)
    ops.rms_norm(query, x[0, :128], 1e-5)
    ops.add_rms_norm(x, x, x[0], 1e-5)
    for rotated in (128, 32):
        ops.rotate_and_store(query, key, value, torch.zeros(9, 2, rotated // 2), index, index, cache, cache)
    for activation in ("silu", "gelu", "gelu_tanh"):
        ops.gated(x, activation)
    assert [len(launches.seen) for launches in launched.values()] == [1, 1, 2, 3]
    for launches in launched.values():
        assert all(re.search(r"\.target sm_90", kernel.asm["ptx"]) for kernel in launches.compile(90))


def test_no_variant_of_a_kernel_for_every_batch() -> None:
    """Compiling takes seconds. Triton makes a variant for each value or alignment class of what it may specialise."""
    from models.kernels.triton import attention, layer_ops

    strides = {"query_token", "query_head", "key_slot", "key_head", "value_slot", "value_head"}
    tensors = {"sinks", "out", "peaks_and_totals", "sums"}

    def specialised(kernel: Any) -> set[str]:
        return {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize}

    assert specialised(attention.attend_tiles) == strides | tensors | {"query", "keys", "values"}
    assert specialised(attention.merge_splits) == tensors
    assert specialised(layer_ops.rms_norm) == {"x", "weight", "out", "token", "head"}
    assert specialised(layer_ops.add_rms_norm) == {"x", "residual", "weight", "out"}
    assert not specialised(layer_ops.rotate_and_store) & {"positions", "slots"}


def test_blocks_fit_the_device() -> None:
    for limit in SHARED_LIMIT.values():
        for dim in (16, 64, 80, 128, 256):
            for dtype in triton_kernels.DTYPES:
                spec = replace(LLAMA_8B, key_dim=dim, value_dim=dim)
                blocks = blocks_for(spec, dtype, limit)
                assert blocks.shared_bytes(dtype.itemsize) <= limit or blocks.num_stages == 1
                assert 256 % blocks.keys == 0
    assert blocks_for(LLAMA_8B, torch.bfloat16, SHARED_LIMIT[90]) == Blocks(64, 64, 128, 128, 8, 3)
    assert blocks_for(LLAMA_8B, torch.bfloat16, SHARED_LIMIT[89]).num_stages == 2
    wide_group = replace(LLAMA_8B, num_heads=71, num_kv_heads=1)
    assert blocks_for(wide_group, torch.bfloat16, SHARED_LIMIT[90]).vectors == 128


def test_named_on_a_cpu_they_are_refused() -> None:
    for load in (partial(load_backend, "triton", CPU), partial(load_ops, CPU, name="triton")):
        with pytest.raises(RuntimeError, match="need a CUDA device, not cpu"):
            load(dtype=torch.float32)
        with pytest.raises(RuntimeError, match=r"know float32, bfloat16 and float16, not torch\.float64"):
            load(dtype=torch.float64)


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found out about a device is kept for the life of a process; not here."""
    for forget in (triton_kernels.failure.cache_clear, triton_kernels._failure_logged.cache_clear):
        forget()
    yield
    for forget in (triton_kernels.failure.cache_clear, triton_kernels._failure_logged.cache_clear):
        forget()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (RuntimeError("no kernel image is available"), "RuntimeError: no kernel image is available"),
        (FileNotFoundError("ptxas"), "FileNotFoundError: ptxas"),
        (None, "attention is off by"),
    ],
)
def test_auto_goes_on_without_them_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: Exception | None, reason: str
) -> None:
    from models.kernels.triton import probe

    def attend(self: TritonAttention, query: Tensor, *rest: Any) -> Tensor:
        if failing is not None:
            raise failing
        return query + 1

    monkeypatch.setattr(TritonAttention, "__call__", attend)
    whole_probe = probe.probe
    monkeypatch.setattr(probe, "probe", lambda device, dtype: whole_probe(CPU, dtype))  # no device is at hand
    with caplog.at_level(logging.WARNING, "saccade.kernels"):
        for _ in range(2):
            assert load_backend("auto", CUDA, torch.bfloat16).__module__ == "models.attention.reference"
            assert type(load_ops(CUDA, torch.bfloat16)).__name__ == "TorchOps"
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "plain PyTorch, which is slower" in record.getMessage()
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        load_backend("triton", CUDA, torch.bfloat16)


@pytest.mark.usefixtures("fresh")
def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert load_backend("auto", CUDA, torch.float16).__module__ == "models.attention.reference"
    assert "install the package triton" in caplog.text
    with pytest.raises(RuntimeError, match="install the package triton"):
        load_ops(CUDA, torch.float16, "triton")


@pytest.mark.parametrize(("name", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu:0", [])])
def test_a_numbered_device_is_the_one_that_kernels_launch_on(
    monkeypatch: pytest.MonkeyPatch, name: str, current: list[torch.device]
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_device(name) == torch.device(name)
    assert chosen == current
