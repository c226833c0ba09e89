"""Which CPUs the kernels are compiled for: this one, or levels of x86-64 that many have.

``$SACCADE_KERNEL_ARCH`` is "native" (or unset) where the kernels run on the machine that compiles them. An image that
is built on another machine names levels in its place, with commas and the best first: all are compiled, and a process
takes the first that its CPU can run.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "SACCADE_KERNEL_ARCH"
CPUINFO = Path("/proc/cpuinfo")


class ArchError(Exception):
    """What the environment asks for is unknown, or nothing for this CPU; the message says what to do."""


@dataclass(frozen=True)
class Arch:
    """CPUs to compile for.

    Attributes:
        flags: the compiler's.
        needs: what the CPU must have, as /proc/cpuinfo names it.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()


NATIVE = Arch("native", ("-march=native",))

# The levels of the x86-64 psABI, of which only what GCC emits beyond the oldest CPUs that PyTorch runs on is asked for.
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# No level has the products of bfloat16 pairs, in which most models are served (Zen 4, Sapphire Rapids and newer).
_BF16 = _V4 | {"avx512_bf16", "avx512vbmi"}

ARCHS = {
    arch.name: arch
    for arch in (
        NATIVE,
        Arch("x86-64-v3", ("-march=x86-64-v3",), _V3),
        Arch("x86-64-v4", ("-march=x86-64-v4",), _V4),
        Arch("x86-64-v4-bf16", ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi"), _BF16),
    )
}


def wanted() -> tuple[Arch, ...]:
    """What ``$SACCADE_KERNEL_ARCH`` names, in its order.

    Raises:
        ArchError: it names something unknown.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()] or [NATIVE.name]
    unknown = [name for name in names if name not in ARCHS]
    if unknown:
        raise ArchError(
            f"{VARIABLE} has {unknown[0]!r}; it takes {', '.join(ARCHS)}, several with commas, the best first"
        )
    return tuple(ARCHS[name] for name in names)


def pick(features: frozenset[str] | None = None) -> Arch:
    """The first one wanted that a CPU can run.

    Args:
        features: of the CPU, as /proc/cpuinfo names them; None: of this one.

    Raises:
        ArchError: there is none.
    """
    archs = wanted()
    features = frozenset(cpu_features().split()) if features is None else features
    fit = next((arch for arch in archs if arch.needs <= features), None)
    if fit is None:
        least = min(archs, key=lambda arch: len(arch.needs))
        missing = ", ".join(sorted(least.needs - features))
        raise ArchError(
            f"{VARIABLE} asks for {least.name} or better, and this CPU lacks {missing}; use a newer machine, or "
            f"{VARIABLE}=native where there is a C++ compiler"
        )
    return fit


def cpu_features() -> str:
    """What -march=native looks at: the feature lines of the first CPU."""
    try:
        lines = CPUINFO.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "model name", "CPU part", "CPU implementer")
    return "\n".join(line for line in lines if line.startswith(names))
