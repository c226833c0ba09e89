"""The kernels that are not behind a protocol (noise, sampling), and their build."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoding.sampling_ops import NOT_A_TOKEN, CpuSamplingOps, TorchSamplingOps
from models import kernels
from models.kernels import build

LOW = 0xFFFFFFFF


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    assert kernels.load(), "the kernels must work where tests run"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 from its paper's definition, on Python's integers."""
    for step in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        k0, k1 = (key[0] + step * 0x9E3779B9) & LOW, (key[1] + step * 0xBB67AE85) & LOW
        counter = [(second >> 32) ^ counter[1] ^ k0, second & LOW, (first >> 32) ^ counter[3] ^ k1, first & LOW]
    return counter


def test_philox_known_answers() -> None:
    """The three vectors that Random123 publishes (kat_vectors, philox4x32 10)."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    counters = torch.tensor([[0] * 4, [LOW] * 4, pi])
    keys = torch.tensor([[0, 0], [LOW, LOW], [0xA4093822, 0x299F31D0]])
    words = torch.ops.saccade.philox_bits(counters, keys)
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    assert words.tolist() == expected
    assert [philox_in_python(c, k) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)] == expected


def noise(vocab: int, seeds: list[int], positions: list[int], choices: list[int]) -> Tensor:
    out = torch.empty(len(seeds), vocab)
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    torch.ops.saccade.fill_noise_rows(out, list(range(len(seeds))), signed, positions, choices)
    return out


def test_noise_is_the_function_of_seed_position_id_and_choice() -> None:
    cases = [(0, 0, 0), (7, 3, 0), (2**64 - 1, 1023, 5), (1 << 40, 2**32 + 9, 1)]
    out = noise(1003, *(list(column) for column in zip(*cases, strict=True)))
    for row, (seed, position, choice) in enumerate(cases):
        for token in [*range(40), 500, 999, 1000, 1001, 1002]:
            words = philox_in_python([token // 4, position & LOW, choice, 0], [seed & LOW, seed >> 32])
            exact = -math.log(-math.log1p(-(words[token % 4] + 0.5) * 2.0**-32))
            assert out[row, token].item() == pytest.approx(exact, rel=1e-7, abs=1e-9)


def test_noise_does_not_depend_on_the_length_of_the_vector() -> None:
    whole = noise(9001, [3], [8], [0])
    assert torch.equal(noise(4097, [3], [8], [0])[0], whole[0, :4097])
    assert whole.isfinite().all()
    assert abs(float(whole.mean()) - 0.5772) < 0.05  # a Gumbel variable's mean is Euler's constant


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 40000), (5, 8192), (3, 1), (4, 127), (2, 129)])
def test_sample_rows_has_the_bits_of_torch(dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits = (torch.randn(rows, vocab, dtype=torch.float64) * 3).to(dtype)
    temperature, vectors = torch.rand(rows) + 0.2, noise(vocab, [1, 2], [3, 4], [0, 0])
    source = torch.tensor([1, -1, 0, 1, -1])[:rows]
    drawn = torch.ops.saccade.sample_rows(logits, temperature, vectors, source)
    scores = logits / temperature[:, None] + vectors[source.clamp(min=0)]
    assert torch.equal(drawn, torch.where(source[:, None] < 0, logits, scores).argmax(1))


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("k", [1, 8, 16])
def test_topk_rows(k: int, divide: bool) -> None:
    logits = torch.randint(-3, 4, (6, 20000)).float()  # ties everywhere
    logits[4, :19990] = -torch.inf
    temperature, vectors = torch.full((6,), 0.5), torch.randint(0, 3, (2, 20000)).float()
    source = torch.tensor([0, 1, -1, 0, 1, -1])
    values, ids = torch.ops.saccade.topk_rows(logits, temperature, vectors, source, k, divide)
    warm = vectors[source.clamp(min=0)]
    scores = logits / 0.5 + warm if divide else logits + 0.5 * warm
    scores = torch.where(source[:, None] < 0, logits, scores)
    expected, order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :k])
    assert torch.equal(ids, order[:, :k])


def test_the_lowest_id_wins_and_rows_without_a_number_have_no_token() -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [700, 300]] = 1.0
    logits[1] = -torch.inf
    logits[2, :] = torch.nan
    logits[2, 5] = 0.0
    none = torch.tensor([-1, -1, -1])
    drawn = torch.ops.saccade.sample_rows(logits, torch.ones(3), torch.empty(0, 1000), none)
    assert drawn.tolist() == [300, NOT_A_TOKEN, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_ids(dtype: torch.dtype) -> None:
    logits = torch.randint(-9, 9, (7, 1000)).to(dtype)  # ties in every row
    logits[3] = -torch.inf
    logits[4, 1:] = torch.nan
    best = torch.ops.saccade.best_ids(logits[:, :999])
    expected = logits[:, :999].nan_to_num(-torch.inf, neginf=-torch.inf)
    first = [int((row == row.max()).nonzero()[0]) for row in expected]
    assert best.tolist() == [*first[:3], NOT_A_TOKEN, *first[4:]]


def test_parameters_of_nodes_are_those_of_their_rows() -> None:
    temperature, first, position = torch.rand(4), torch.tensor([0, -1, 7, 21]), torch.tensor([5, 9, 30, 11])
    row, depth = torch.tensor([2, 0, 1, 3, 3]), torch.tensor([0, 4, 1, 2, 0])
    fused = CpuSamplingOps().of_nodes(temperature, first, position, row, depth, 7)
    plain = TorchSamplingOps().of_nodes(temperature, first, position, row, depth, 7)
    assert all(torch.equal(mine, other) for mine, other in zip(fused, plain, strict=True))
    assert plain[1].tolist() == [7 + 30 % 7, 9 % 7, -1, 21 + 13 % 7, 21 + 11 % 7]


def test_scores_are_not_fused() -> None:
    """logits + T * g in two roundings, as PyTorch's operations give them: a fused multiply-add would differ."""
    logits, vectors, temperature = torch.randn(1, 50000), torch.randn(1, 50000), torch.tensor([0.7])
    values, ids = torch.ops.saccade.topk_rows(logits, temperature, vectors, torch.tensor([0]), 16)
    assert torch.equal(values[0], (logits + 0.7 * vectors)[0][ids[0]])


def test_bad_arguments_are_named() -> None:
    row = torch.tensor([0])
    with pytest.raises(IndexError, match="noise_row 1 of 1"):
        torch.ops.saccade.sample_rows(torch.zeros(1, 8), torch.ones(1), torch.zeros(1, 8), row + 1)
    with pytest.raises(IndexError, match="place 1 of 1"):
        torch.ops.saccade.fill_noise_rows(torch.zeros(1, 8), [1], [0], [0], [0])
    with pytest.raises(IndexError, match="row 1 of 1"):
        torch.ops.saccade.node_parameters(torch.ones(1), row, row, row + 1, row, 3)
    with pytest.raises(RuntimeError, match="k must be from 1 to 8"):
        torch.ops.saccade.topk_rows(torch.zeros(1, 8), torch.ones(1), torch.zeros(1, 8), row, 9)
    with pytest.raises(RuntimeError, match="logits are"):
        torch.ops.saccade.sample_rows(torch.zeros(1, 8).half(), torch.ones(1), torch.zeros(1, 8), row)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_one_openmp_runtime() -> None:
    """A second one would have its own threads, and both would fight over the cores."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) <= 1


def in_a_new_process(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(build.FOLDER).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_without_a_compiler_one_warning_and_the_reference(tmp_path: Path) -> None:
    code = """
import torch
from models.attention import load_backend
from models.layers.ops import load_ops
for _ in range(2):
    print(load_backend("auto", torch.device("cpu"), torch.float32).__module__)
    print(type(load_ops(torch.device("cpu"), torch.float32)).__name__)
"""
    process = in_a_new_process(code, SACCADE_CACHE=str(tmp_path), CXX="no-such-compiler")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.count("the CPU kernels are not available") == 1
    assert "install a C++ compiler" in out
    assert out.count("models.attention.reference\nTorchOps") == 2


def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it() -> None:
    code = "from models import kernels; print(kernels.load())"
    process = in_a_new_process(code, SACCADE_CACHE="/dev/null/cache")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    warning, answer = out.strip().splitlines()
    assert "cannot be kept in /dev/null/cache/kernels (Not a directory); set SACCADE_CACHE" in warning
    assert "several times slower" in warning
    assert "compiler" not in warning
    assert answer == "False"


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    code = """
from models import kernels
from models.kernels import build
library = build.library_path()
library.parent.mkdir(parents=True)
library.write_text("no library")
print(kernels.load())
"""
    out, _ = in_a_new_process(code, SACCADE_CACHE=str(tmp_path), SACCADE_KERNEL_ARCH="native").communicate(timeout=60)
    assert "cannot be loaded" in out
    assert "delete it and start again" in out
    assert out.strip().endswith("False")


FAKE_COMPILER = """#!/bin/sh
echo run >> "$0.log"
while [ "$1" != -o ]; do shift; done
sleep 0.2
echo built > "$2"
"""


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    compiler = tmp_path / "fake-c++"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    code = "from models.kernels.build import build; print(build().read_text())"
    cache = str(tmp_path / "cache")
    started = [in_a_new_process(code, SACCADE_CACHE=cache, CXX=str(compiler)) for _ in range(2)]
    for process in started:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip() == "built"
    assert len((tmp_path / "fake-c++.log").read_text().splitlines()) == len(build.SOURCES) + 1


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'no such dialect' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    with pytest.raises(build.BuildError, match="no such dialect"):
        build.build()
    assert not list((tmp_path / "kernels").glob("*.so"))
