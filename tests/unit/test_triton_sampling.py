"""Triton's sampling without a device: in the interpreter, and compiled for devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from decoding.triton_sampling import PART, WORDS

ROOT = Path(__file__).parents[2]
SIGNATURES = {
    "fill_noise": ({"bank": "*fp32", "index": "*i64", "vocab": "i32"}, {"WORDS": WORDS}),
    "best_of_part": (
        {"logits": "*fp32", "temperature": "*fp32", "noise": "*fp32", "noise_row": "*i64"}
        | {"values": "*fp32", "ids": "*i32", "vocab": "i32", "row_stride": "i32"},
        {"BLOCK": PART},
    ),
    "best_of_parts": ({"values": "*fp32", "ids": "*i32", "out": "*i64", "parts": "i32"}, {"BLOCK": 64}),
}


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = "tests/interpreted/check_sampling.py"
    done = subprocess.run([*command, file], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.kernels.triton import sampling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature, constants = SIGNATURES[name]
    source = ASTSource(getattr(sampling, name), signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    # the definition's bits are from float64, its quotient from a rounded division
    wanted = {"fill_noise": "f64", "best_of_part": "div.rn.f32"}.get(name, ".visible .entry")
    assert wanted in compiled.asm["ptx"]
