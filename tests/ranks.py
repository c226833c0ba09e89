"""Ranks of one model as threads of the test: real groups, the real loop of the other ranks, no processes to start."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator

import torch

from models.parallel.driver import Driver
from models.parallel.ranks import Ranks, connect
from models.parallel.worker import Worker

CPU = torch.device("cpu")


class RankThreads:
    """``decoding.ranks.OtherRanks`` with threads in place of processes."""

    def __init__(self, size: int) -> None:
        self.workers: list[Worker] = []
        self._meeting = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._threads = [
            threading.Thread(target=self._follow, args=(rank, size), daemon=True) for rank in range(1, size)
        ]
        for thread in self._threads:
            thread.start()
        self.driver = Driver(self._meet(0, size), CPU)

    def _meet(self, rank: int, size: int) -> Ranks:
        return connect(rank, size, self._meeting.name, CPU)

    def _follow(self, rank: int, size: int) -> None:
        worker = Worker(self._meet(rank, size), CPU)
        self.workers.append(worker)
        worker.run()

    def check(self) -> None:
        """Threads end with the process."""

    def close(self) -> None:
        self.driver.stop(30)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@contextlib.contextmanager
def rank_threads(size: int) -> Iterator[RankThreads]:
    ranks = RankThreads(size)
    try:
        yield ranks
    finally:
        ranks.close()
