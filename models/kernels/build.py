"""Builds the CPU kernels with the machine's C++ compiler, into a cache. ``python -m models.kernels.build`` at set-up.

A library is named by a hash of everything that decides its code: sources, flags, PyTorch, Python, and the CPU's
features or the level that it is compiled for (arch.py). So a cache may be shared by versions and machines, and a stale
library is never loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from models.kernels.arch import NATIVE, Arch, ArchError, cpu_features, pick, wanted

log = logging.getLogger("saccade.kernels")

FOLDER = Path(__file__).parent
SOURCES: dict[str, list[str]] = {  # file: flags of its own
    "bindings.cpp": [],
    "accepted.cpp": [],
    "attention.cpp": [],
    "batch.cpp": [],
    "calibration.cpp": [],
    "expansion.cpp": [],
    "int8_linear.cpp": [],
    "layer_ops.cpp": [],
    "layer_stack.cpp": [],
    "linear.cpp": [],
    "lookahead.cpp": [],
    "ngram.cpp": [],
    "planning.cpp": [],
    "prediction.cpp": ["-ffp-contract=off"],
    "recycling.cpp": ["-ffp-contract=off"],
    "retrieval.cpp": ["-ffp-contract=off"],
    "sampling.cpp": ["-ffp-contract=off"],  # they say why
    "suffix.cpp": ["-ffp-contract=off"],
    "tree.cpp": [],
}
# no -ffast-math: it would reorder sums, and results must not depend on how work is split
FLAGS = ["-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-w"]


class BuildError(Exception):
    """The kernels could not be built; the message says why, and what to do."""


def library_path(arch: Arch = NATIVE) -> Path:
    """Where the library of these sources, this PyTorch and ``arch`` is, or would be."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    cpus = cpu_features() if arch is NATIVE else arch.name
    digest.update(repr((_flags(arch), SOURCES, torch.__version__, torch.version.git_version)).encode())
    digest.update(repr((sysconfig.get_config_var("SOABI"), platform.machine(), cpus)).encode())
    return cache_folder() / f"saccade-{digest.hexdigest()[:20]}.so"


def speed_key() -> str:
    """What decides how fast this process's kernels are: their code, the CPU, and for which CPUs they were compiled."""
    try:
        arch = pick().name
    except ArchError:
        arch = "none"
    return f"{arch} {library_path().name}"


def cache_folder() -> Path:
    """$SACCADE_CACHE/kernels, or ~/.cache/saccade/kernels."""
    root = os.environ.get("SACCADE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "saccade") / "kernels"


def find_compiler() -> str | None:
    """$CXX, or the first of the usual names that is installed."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def build(arch: Arch | None = None) -> Path:
    """The library's path, after building it if it is not there. Processes that want it at once build it once.

    Args:
        arch: None: the one to run here.

    Raises:
        BuildError: no compiler, or it failed; a cache folder that cannot be written; nothing for this CPU.
    """
    try:
        arch = arch or pick()
    except ArchError as error:
        raise BuildError(str(error)) from error
    library = library_path(arch)
    if library.exists():
        return library
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"there is no library for {arch.name}, and no C++ compiler was found ($CXX, c++, g++, clang++); install a "
            "C++ compiler (g++ 10 or newer) and start again"
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _build_once(compiler, library, arch)
    except OSError as error:
        raise BuildError(
            f"the compiled kernels cannot be kept in {library.parent} ({error.strerror or error}); set SACCADE_CACHE "
            "to a folder that can be written"
        ) from error
    return library


def _build_once(compiler: str, library: Path, arch: Arch) -> None:
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():  # else another process has built it meanwhile
            started = time.monotonic()
            log.info("building the CPU kernels (%s) with %s", arch.name, compiler)
            _compile(compiler, library, arch)
            log.info("built %s in %.0f s", library, time.monotonic() - started)


def _flags(arch: Arch) -> list[str]:
    return ["-std=c++20", "-O3", *arch.flags, *FLAGS]


def _compile(compiler: str, library: Path, arch: Arch) -> None:
    """Compile and link next to ``library``, then move it into place in one step."""
    installed = Path(torch.__file__).parent
    headers = installed / "include"
    includes = [f"-isystem{headers}", f"-isystem{headers / 'torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = {name: str(Path(folder, name).with_suffix(".o")) for name in SOURCES}

        def compile_one(name: str) -> None:
            _run([compiler, *_flags(arch), *SOURCES[name], *includes, "-c", str(FOLDER / name), "-o", objects[name]])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, SOURCES))
        linked = str(Path(folder, library.name))
        # -fopenmp names libgomp by its soname, which the loader finds loaded already by PyTorch: one pool of threads
        _run(
            [
                compiler,
                "-shared",
                "-fopenmp",
                *objects.values(),
                "-o",
                linked,
                f"-L{installed / 'lib'}",
                "-ltorch_cpu",
                "-lc10",
            ]
        )
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        errors = "\n".join(result.stderr.splitlines()[:20])
        raise BuildError(f"{' '.join(command)} failed; a newer compiler may do (g++ 10 or newer, or $CXX):\n{errors}")


def main() -> int:
    """Build what $SACCADE_KERNEL_ARCH names, and say what was done.

    Returns:
        0, also where the machine is left to the slower reference kernels; 1 if levels were named and cannot be built,
        or do not work though this CPU is fit.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from models import kernels

    try:
        archs = wanted()
        for arch in archs:
            if library_path(arch).exists():
                log.info("the CPU kernels are built: %s", library_path(arch))
            elif arch is not NATIVE:
                build(arch)  # this CPU need not be one that can run it
    except (ArchError, BuildError) as error:
        log.error("the CPU kernels could not be built: %s", error)
        return 1
    try:
        pick()
    except ArchError as error:
        log.info("the CPU kernels were not tried here: %s", error)
        return 0
    if kernels.load():
        log.info("the CPU kernels work")
        return 0
    return int(NATIVE not in archs)


if __name__ == "__main__":
    sys.exit(main())
