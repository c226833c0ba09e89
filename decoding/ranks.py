"""The other ranks of an engine: processes of their own that rank 0, the engine's, starts and ends.

They are on this machine, and rank 0's children: the end of any of them is the end of all. A rank that dies is noticed
by those that wait for it, since its connections close, and by rank 0 when it looks (``check``). Ranks whose rank 0 dies
are killed by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import torch

from decoding.config import EngineConfig
from decoding.errors import ConfigError, EngineDeadError
from models.parallel.driver import Driver
from models.parallel.ranks import RankError, connect

END_SECONDS = 0.5  # how long ranks may take to hear that they are to end, and to end


class OtherRanks(Protocol):
    """Ranks 1 and up, seen from rank 0."""

    driver: Driver

    def check(self) -> None:
        """Raise EngineDeadError if one of them has ended."""
        ...

    def close(self) -> None:
        """End them; twice does no harm."""
        ...


def start_ranks(config: EngineConfig, device: torch.device) -> OtherRanks | None:
    """The other ranks that ``--tensor-parallel-size`` asks for, ready to load; None where one is enough.

    Args:
        device: of rank 0; on CUDA the others take those after it.

    Raises:
        ConfigError: more ranks than devices, sizes that cannot be; a rank that does not start.
    """
    size, drafters = config.tensor_parallel_size, config.draft_tensor_parallel_size
    if min(size, drafters) < 1 or drafters not in (1, size):
        raise ConfigError(
            f"--tensor-parallel-size {size} and --draft-tensor-parallel-size {drafters} do not go together: the first "
            "is at least 1, the second 1 or the same"
        )
    if size == 1:
        return None
    if sys.platform != "linux":
        raise ConfigError("--tensor-parallel-size above 1 needs Linux; leave it out")
    try:
        return RankProcesses(devices_of(device, size))
    except (RankError, OSError) as error:
        raise ConfigError(f"--tensor-parallel-size {size}: {error}") from error


def devices_of(first: torch.device, size: int) -> list[torch.device]:
    """The device of each rank.

    Raises:
        ConfigError: there are not as many.
    """
    if first.type != "cuda":
        return [first] * size
    begin, count = first.index or 0, torch.cuda.device_count()
    if begin + size > count:
        asked = f"--tensor-parallel-size {size} from cuda:{begin} on"
        raise ConfigError(
            f"{asked} needs a GPU for each rank, and there are {count} in all; lower it to {count - begin}"
        )
    return [torch.device("cuda", begin + rank) for rank in range(size)]


class RankProcesses:
    """``OtherRanks`` as child processes, which run ``decoding.rank_process``.

    Args:
        devices: of all ranks, this one's first.

    Raises:
        RankError: one did not start.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        size = len(devices)
        self._folder = tempfile.mkdtemp(prefix="saccade-")  # mode 0700
        self._meeting = str(Path(self._folder) / "ranks")
        self._processes: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _kill, self._processes)  # of an engine that was never closed
        try:
            for rank in range(1, size):
                self._processes.append(self._start(rank, size, devices[rank]))
            for process in self._processes:
                self._await(process)
            ranks = connect(0, size, self._meeting, devices[0])
            if devices[0].type == "cpu":  # all are connected; a thread of NCCL's goes on looking into the file
                shutil.rmtree(self._folder)
        except BaseException:
            self._end()
            raise
        self.driver = Driver(ranks, devices[0])

    def check(self) -> None:
        """See ``OtherRanks``."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise EngineDeadError(f"rank {rank} ended with status {process.returncode}")

    def close(self) -> None:
        """See ``OtherRanks``."""
        if self._processes:
            with contextlib.suppress(RankError):
                self.driver.stop(END_SECONDS)
        self._end(END_SECONDS)

    def _start(self, rank: int, size: int, device: torch.device) -> subprocess.Popen[bytes]:
        threads = torch.get_num_threads()
        command = [sys.executable, "-m", "decoding.rank_process", "--rank", str(rank), "--size", str(size)]
        command += ["--device", str(device), "--threads", str(threads)]
        command += ["--meeting", self._meeting, "--parent", str(os.getpid())]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a rank has come as far as to meet the others, so that nobody waits for one that cannot."""
        assert process.stdout is not None
        with process.stdout as said:
            if not said.read(1):
                raise RankError(f"a rank did not start: it ended with status {process.wait()}; its log is above")

    def _end(self, seconds: float = 0.0) -> None:
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        _kill(self._processes)
        shutil.rmtree(self._folder, ignore_errors=True)


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """End processes that have not ended, and forget them."""
    for process in processes:
        process.kill()
        process.wait()
    processes.clear()
