"""Builds the CPU kernels with the machine's C++ compiler, into a cache. ``python -m models.kernels.build`` at set-up.

A library is named by a hash of everything that decides its code: sources, flags, PyTorch, Python, the CPU's features.
So a cache may be shared by versions and machines, and a stale library is never loaded.
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
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-w"]


class BuildError(Exception):
    """The kernels could not be built; the message says why, and what to do."""


def library_path() -> Path:
    """Where the library of these sources, this PyTorch and this machine is, or would be."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr((FLAGS, SOURCES, torch.__version__, torch.version.git_version)).encode())
    digest.update(repr((sysconfig.get_config_var("SOABI"), platform.machine(), _cpu_features())).encode())
    return cache_folder() / f"saccade-{digest.hexdigest()[:20]}.so"


def cache_folder() -> Path:
    """$SACCADE_CACHE/kernels, or ~/.cache/saccade/kernels."""
    root = os.environ.get("SACCADE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "saccade") / "kernels"


def find_compiler() -> str | None:
    """$CXX, or the first of the usual names that is installed."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def build() -> Path:
    """The library's path, after building it if it is not there. Processes that want it at once build it once.

    Raises:
        BuildError: no compiler, or it failed; a cache folder that cannot be written.
    """
    library = library_path()
    if library.exists():
        return library
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "no C++ compiler was found ($CXX, c++, g++, clang++); install a C++ compiler (g++ 10 or newer) and start "
            "again"
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _build_once(compiler, library)
    except OSError as error:
        raise BuildError(
            f"the compiled kernels cannot be kept in {library.parent} ({error.strerror or error}); set SACCADE_CACHE "
            "to a folder that can be written"
        ) from error
    return library


def _build_once(compiler: str, library: Path) -> None:
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():  # else another process has built it meanwhile
            started = time.monotonic()
            log.info("building the CPU kernels with %s", compiler)
            _compile(compiler, library)
            log.info("built %s in %.0f s", library, time.monotonic() - started)


def _compile(compiler: str, library: Path) -> None:
    """Compile and link next to ``library``, then move it into place in one step."""
    installed = Path(torch.__file__).parent
    headers = installed / "include"
    includes = [f"-isystem{headers}", f"-isystem{headers / 'torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = {name: str(Path(folder, name).with_suffix(".o")) for name in SOURCES}

        def compile_one(name: str) -> None:
            _run([compiler, *FLAGS, *SOURCES[name], *includes, "-c", str(FOLDER / name), "-o", objects[name]])

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


def _cpu_features() -> str:
    """What -march=native looks at: the feature lines of the first CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "model name", "CPU part", "CPU implementer")
    return "\n".join(line for line in lines if line.startswith(names))


def main() -> None:
    """Build, say what was done, and leave an unfit machine to the slower reference kernels."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from models import kernels

    if library_path().exists():
        log.info("the CPU kernels are built: %s", library_path())
    if kernels.load():
        log.info("the CPU kernels work")


if __name__ == "__main__":
    main()
