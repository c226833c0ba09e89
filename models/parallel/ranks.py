"""The ranks of a model: processes that hold a part of it each, and exchange tensors by torch.distributed.

A ``Ranks`` is passed to whoever needs one. The library's global group is not used: nothing here is ambient, and several
sets of ranks can live in one process.

Nothing listens beyond the loopback interface. The ranks meet in a file, not at a port: torch's TCPStore would listen on
all interfaces and take what anybody sends (CVE-2025-47277).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

LOOPBACK = "127.0.0.1"
MEETING = timedelta(minutes=1)  # for all ranks to come to the meeting, when all are on their way
ANSWER = timedelta(minutes=5)  # of another rank within a pass: one that takes longer hangs
PATIENCE = timedelta(days=365)  # between two calls: an idle engine makes none
COMPLAINT = 1024  # bytes of what a rank can say


class RankError(RuntimeError):
    """Another rank ended or does not answer: the model cannot be run any more."""


class Work(Protocol):
    """An operation under way."""

    def wait(self, timeout: timedelta = ...) -> bool: ...


class Group(Protocol):
    """A process group of torch.distributed, as far as it is used; rank 0 is the root of what has one."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...

    def broadcast(self, tensors: list[Tensor]) -> Work: ...

    def allreduce(self, tensors: list[Tensor]) -> Work: ...

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work: ...


class Ranks:
    """The ranks as one of them sees them.

    Between CPUs everything goes from or to rank 0, by single sends: gloo's collective operations hand each call to
    another thread, and where cores are short, two ranks that send at one time keep each other from receiving.

    Args:
        rank: this one's number. Rank 0 decides what is done.
        size: how many there are.
        calls: carries what rank 0 wants done, from host to host; waits as long as it takes.
        tensors: carries tensors of the model's device; None for one rank, as ``calls``.
    """

    def __init__(self, rank: int, size: int, calls: Group | None = None, tensors: Group | None = None) -> None:
        self.rank = rank
        self.size = size
        self._calls = calls
        self._tensors = tensors

    def share(self, total: int) -> range:
        """This rank's of ``total`` things: as many as any other rank's, or one less."""
        return self._share_of(self.rank, total)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, the same bits in all of them; may overwrite ``x``.

        On a CPU it is summed in the order of the ranks, in float32 at least. A library's reduction cuts the tensor into
        as many pieces as there are ranks and sums each in another order, so that a row's bits would depend on where in
        the batch it stands.

        Raises:
            RankError: another rank is gone.
        """
        if self.size == 1:
            return x
        assert self._tensors is not None
        if x.is_cuda:
            with _watched():
                self._tensors.allreduce([x]).wait()
            return x
        return _sum(self._tensors, x.contiguous(), self.rank, self.size)

    def gather_columns(self, x: Tensor, total: int) -> Tensor:
        """``x`` [W, share(total)] of all ranks side by side [W, total], at rank 0; the other ranks get their own back.

        Raises:
            RankError: another rank is gone.
        """
        if self.size == 1:
            return x
        assert self._tensors is not None
        widest = -(-total // self.size)
        sent = F.pad(x, (0, widest - x.shape[1])).contiguous()
        parts = _gather(self._tensors, sent, self.rank, self.size)
        if not parts:
            return x
        return torch.cat([part[:, : len(self._share_of(rank, total))] for rank, part in enumerate(parts)], dim=1)

    def call(self, message: Tensor, timeout: timedelta = ANSWER) -> None:
        """Make every rank's ``message``, on the host, rank 0's; the others wait for it, however long it takes.

        Args:
            timeout: in which the others must be ready for it.

        Raises:
            RankError: another rank is gone.
        """
        assert self._calls is not None
        _broadcast(self._calls, message, self.rank, self.size, timeout)

    def broadcast(self, x: Tensor) -> None:
        """Make every rank's ``x``, on the model's device, rank 0's.

        Raises:
            RankError: another rank is gone.
        """
        assert self._tensors is not None
        _broadcast(self._tensors, x, self.rank, self.size)

    def tell(self, text: str) -> list[str]:
        """What every rank says, in their order, at rank 0; nothing elsewhere. Waits until all have said something.

        Raises:
            RankError: another rank is gone.
        """
        assert self._calls is not None
        said = text.encode()[:COMPLAINT].ljust(COMPLAINT, b"\0")
        mine = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        parts = _gather(self._calls, mine, self.rank, self.size)
        return [part.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for part in parts]

    def _share_of(self, rank: int, total: int) -> range:
        return range(total * rank // self.size, total * (rank + 1) // self.size)


ALONE = Ranks(0, 1)


def connect(rank: int, size: int, meeting: str, device: torch.device) -> Ranks:
    """Meet the other ranks; returns when all are there.

    Args:
        meeting: path of a file that all ranks can open and nobody else, empty at first.
        device: the model's, of this rank: NCCL carries tensors of a CUDA device, gloo those of a CPU.

    Raises:
        RankError: they did not come.
    """
    from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

    try:
        store = FileStore(meeting, size)
        calls = _gloo(PrefixStore("calls", store), rank, size, PATIENCE)
        at_device = PrefixStore("tensors", store)
        if device.type == "cuda":
            tensors = _nccl(at_device, rank, size, device)
        else:
            tensors = _gloo(at_device, rank, size, ANSWER)
        ranks = Ranks(rank, size, calls, tensors)
        ranks.tell("")  # now rank 0 knows that nobody has to look into the file any more
    except RuntimeError as error:
        raise RankError(f"the ranks of the model did not find each other: {error}") from error
    return ranks


def _gloo(store: object, rank: int, size: int, timeout: timedelta) -> Group:
    from torch.distributed import ProcessGroupGloo

    with _polite_threads():
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]  # it would listen on the host's address
        options._threads = 1
        options._timeout = MEETING
        group = ProcessGroupGloo(store, rank, size, options)  # type: ignore[arg-type]
    group._set_default_timeout(timeout)
    return cast(Group, group)


@contextmanager
def _polite_threads() -> Iterator[None]:
    """Threads that are started here do not push others off a core when there is something for them to do.

    gloo's thread for the network asks again and again for a lock that the thread that sends has. Where cores are short,
    it would do that on the core which that thread was on: milliseconds an operation in place of a tenth of one.
    """
    before = None
    if hasattr(os, "SCHED_BATCH"):  # Linux, where it may be forbidden, too
        with suppress(OSError):
            before = os.sched_getscheduler(0), os.sched_getparam(0)
            if before[0] == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, before[1])
    try:
        yield
    finally:
        if before is not None:
            os.sched_setscheduler(0, *before)


def _nccl(store: object, rank: int, size: int, device: torch.device) -> Group:
    from torch.distributed import ProcessGroupNCCL

    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # it has no other way to be told where to listen
    options = ProcessGroupNCCL.Options()
    options._timeout = ANSWER
    group = ProcessGroupNCCL(store, rank, size, options)  # type: ignore[arg-type]
    group.eager_connect_single_device(device)
    return cast(Group, group)


def _sum(group: Group, x: Tensor, rank: int, size: int) -> Tensor:
    """The sum of every rank's ``x``, on CPUs."""
    if rank:
        total = torch.empty_like(x)
        with _watched():
            answer = group.recv([total], 0, 0)  # before the question: nobody waits for a place to put it
            group.send([x], 0, 0).wait()
            answer.wait()
        return total
    parts = _gather(group, x, rank, size)
    wide = parts[0].to(torch.promote_types(x.dtype, torch.float32))
    for part in parts[1:]:
        wide = wide + part
    total = wide.to(x.dtype)
    _broadcast(group, total, rank, size)
    return total


def _gather(group: Group, x: Tensor, rank: int, size: int) -> list[Tensor]:
    """Every rank's ``x``, in their order, at rank 0; nothing elsewhere. All are contiguous, of one shape and dtype."""
    with _watched():
        if x.is_cuda:  # the stream waits, not the host
            outputs = [torch.empty_like(x) for _ in range(size)] if rank == 0 else []
            group.gather([outputs] if outputs else [], [x]).wait()
            return outputs
        if rank:
            group.send([x], 0, 0).wait()
            return []
        parts = [torch.empty_like(x) for _ in range(1, size)]
        for other, part in enumerate(parts, start=1):
            group.recv([part], other, 0).wait()
        return [x, *parts]


def _broadcast(group: Group, x: Tensor, rank: int, size: int, timeout: timedelta = ANSWER) -> None:
    """Overwrite every rank's ``x``, contiguous, with rank 0's."""
    with _watched():
        if x.is_cuda:
            group.broadcast([x]).wait()
        elif rank:
            group.recv([x], 0, 0).wait()
        else:
            for sent in [group.send([x], other, 0) for other in range(1, size)]:
                sent.wait(timeout)


@contextmanager
def _watched() -> Iterator[None]:
    """Name the error of operations that another rank does not complete."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"another rank of the model ended or does not answer: {error}") from error
