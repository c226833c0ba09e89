"""Where a number comes from: command, commit, versions, machine, models."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from models import kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "GOMP_SPINCOUNT",
    "GOMP_CPU_AFFINITY",
    "KMP_BLOCKTIME",
)


def provenance(command: Sequence[str], models: Mapping[str, str], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Everything that one needs to measure again, as it is now.

    Args:
        command: the command line.
        models: what a model is for -> its folder.
        dtypes: whose -> the dtype that it computes in.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        **git_state(ROOT),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "thread_variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "cpu_kernels": kernels.load(),
        "dtypes": dict(dtypes),
        "models": {name: {"path": folder, "sha256": weights_hash(Path(folder))} for name, folder in models.items()},
    }


def git_state(root: Path) -> dict[str, Any]:
    """The commit, and whether tracked files differ from it; both None outside a git checkout."""

    def git(*words: str) -> str | None:
        try:
            # asking must not lock the index: status would write it anew, and a full disk would leave the lock behind
            command = ["git", "--no-optional-locks", "-C", str(root), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def weights_hash(folder: Path) -> str | None:
    """SHA-256 over names and contents of a folder's safetensors files; None when there are none (a hub id)."""
    files = sorted(folder.glob("*.safetensors"))
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest() if files else None
