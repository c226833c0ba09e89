"""Kernels for other CPUs than the one that compiles them."""

from __future__ import annotations

import os
import platform
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from models.kernels import arch, build

ZEN_3 = frozenset({"sse4_2", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
SKYLAKE_X = ZEN_3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
COOPER_LAKE = SKYLAKE_X | {"avx512_bf16"}
ZEN_4 = COOPER_LAKE | {"avx512vbmi", "avx512_vnni"}
SHIPPED = "x86-64-v4-bf16,x86-64-v4,x86-64-v3"
# what the compiler defines, and the same feature in /proc/cpuinfo, where that is no matter of case
FEATURES = {"lzcnt": "abm", "bmi": "bmi1", "avx512bf16": "avx512_bf16"}
# in every CPU of level 2, or of none and without instructions that a compiler comes up with
ASSUMED = {"sse", "sse2", "sse2_math", "sse3", "sse4_1", "sse4_2", "sse_math", "ssse3", "popcnt", "mmx", "mmx_with_sse"}
ASSUMED |= {"fxsr", "xsave", "lahf_sahf", "crc32"}


@pytest.mark.parametrize(
    ("cpu", "name"),
    [(ZEN_3, "x86-64-v3"), (SKYLAKE_X, "x86-64-v4"), (COOPER_LAKE, "x86-64-v4"), (ZEN_4, "x86-64-v4-bf16")],
)
def test_the_best_that_the_cpu_runs(cpu: frozenset[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(arch.VARIABLE, SHIPPED)
    assert arch.pick(cpu).name == name


def test_an_old_cpu_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(arch.VARIABLE, SHIPPED)
    with pytest.raises(arch.ArchError, match=r"x86-64-v3 or better, and this CPU lacks avx2, fma; .*native"):
        arch.pick(ZEN_3 - {"avx2", "fma"})


def test_native_is_the_default_and_runs_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(arch.VARIABLE, raising=False)
    assert arch.pick(frozenset()) is arch.NATIVE


def test_an_unknown_level_is_answered_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(arch.VARIABLE, "x86-64-v3, x86-64-v5")
    with pytest.raises(arch.ArchError, match=r"'x86-64-v5'; it takes native, x86-64-v3, x86-64-v4, x86-64-v4-bf16"):
        arch.pick()


def test_libraries_have_names_of_their_own() -> None:
    paths = {build.library_path(each) for each in arch.ARCHS.values()}
    assert len(paths) == len(arch.ARCHS)


def test_costs_are_those_of_the_library_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(arch.VARIABLE, "native")
    native = build.speed_key()
    monkeypatch.setitem(arch.ARCHS, "x86-64-v3", arch.Arch("x86-64-v3", ()))  # which any CPU runs
    monkeypatch.setenv(arch.VARIABLE, "x86-64-v3")
    assert build.speed_key() != native


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.parametrize("level", [each for each in arch.ARCHS.values() if each.needs], ids=lambda each: each.name)
def test_the_compiler_uses_nothing_that_is_not_asked_of_the_cpu(level: arch.Arch) -> None:
    compiler = build.find_compiler()
    assert compiler is not None, "the tests need the compiler that the kernels need"
    command = [compiler, *level.flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = "AVX|SSE|SSSE|MMX|BMI|F16C|FMA|LZCNT|MOVBE|POPCNT|FXSR|XSAVE|LAHF|CRC32|VAES|VPCLMUL|GFNI|SHA|AMX"
    defined = {name.lower() for name in re.findall(rf"#define __((?:{names})\w*?)__ ", out)}
    assert {FEATURES.get(name, name) for name in defined - ASSUMED} == level.needs


COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
while [ "$1" != -o ]; do shift; done
echo built > "$2"
"""


def build_at_set_up(tmp_path: Path, script: str, levels: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    compiler = tmp_path / "c++"
    compiler.write_text(script)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    setting = {arch.VARIABLE: levels, "SACCADE_CACHE": str(tmp_path), "CXX": str(compiler)}
    done = subprocess.run(
        [sys.executable, "-m", "models.kernels.build"],
        env={**os.environ, **setting},
        cwd=Path(build.FOLDER).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done, tmp_path / "c++.log"


def test_set_up_builds_every_level_and_fails_where_one_does_not_work(tmp_path: Path) -> None:
    done, log = build_at_set_up(tmp_path, COMPILER, "x86-64-v4,x86-64-v3")
    calls = log.read_text().splitlines()
    for level in ("v4", "v3"):
        assert sum(f"-march=x86-64-{level} " in call for call in calls) == len(build.SOURCES)
    assert not any("native" in call for call in calls)
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 2
    fit = arch.ARCHS["x86-64-v3"].needs <= frozenset(arch.cpu_features().split())
    if fit:  # what was "built" is no library
        assert "cannot be loaded" in done.stdout
        assert done.returncode == 1
    else:
        assert "were not tried here" in done.stdout
        assert done.returncode == 0


@pytest.mark.parametrize(("levels", "status"), [("x86-64-v3", 1), ("native", 0)])
def test_only_a_named_level_must_be_built(levels: str, status: int, tmp_path: Path) -> None:
    done, _ = build_at_set_up(tmp_path, "#!/bin/sh\necho 'no such level' >&2\nexit 1\n", levels)
    assert "no such level" in done.stdout
    assert done.returncode == status
