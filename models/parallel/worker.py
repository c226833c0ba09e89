"""The ranks after rank 0: each holds its parts of the models, and does what rank 0 announces until it says stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from models.batch import RaggedBatch
from models.checkpoint import CheckpointError
from models.decoder import Decoder
from models.kv_cache import KVCache
from models.loader import load_model
from models.parallel.calls import BatchSizes, Call, Line
from models.parallel.ranks import Ranks
from models.target import Trunk

_FAILURES = (CheckpointError, ValueError, RuntimeError, OSError, MemoryError)  # of loading, to be told


class Worker:
    """One rank's models and caches, by the numbers that rank 0 gave them."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._line = Line(ranks, device)
        self._models: dict[int, Decoder] = {}
        self._trunks: dict[tuple[int, int], Trunk] = {}
        self._caches: dict[int, KVCache] = {}
        self._acts: dict[Call, Callable[..., None]] = {
            Call.LOAD: self._load,
            Call.FREE: self._free,
            Call.CACHE: self._cache,
            Call.DROP: self._drop,
            Call.FORWARD: self._forward,
            Call.LOGITS: self._logits,
            Call.MOVE: self._move,
        }

    @torch.inference_mode()
    def run(self) -> None:
        """Follow rank 0 until it says stop.

        Raises:
            RankError: another rank is gone.
        """
        while True:
            call, numbers = self._line.receive()
            if call is Call.STOP:
                return
            self._acts[call](numbers)

    def _load(self, numbers: list[int]) -> None:
        model, size = numbers[:2]
        [order] = self._line.tensors([((size,), torch.uint8)])
        settings = json.loads(order.cpu().numpy().tobytes())
        complaint = ""
        try:
            part = load_model(Path(settings.pop("path")), device=self._device, ranks=self._ranks, **settings)
            self._models[model] = cast(Decoder, part)
        except _FAILURES as error:
            complaint = str(error) or type(error).__name__
        self._ranks.tell(complaint)

    def _free(self, numbers: list[int]) -> None:
        self._ranks.tell(str(torch.cuda.mem_get_info(self._device)[0]))

    def _cache(self, numbers: list[int]) -> None:
        cache, model, num_pages = numbers[:3]
        self._caches[cache] = self._models[model].new_cache(num_pages)

    def _drop(self, numbers: list[int]) -> None:
        del self._caches[numbers[0]]

    def _forward(self, numbers: list[int]) -> None:
        model, cache, layers = numbers[:3]
        sizes = BatchSizes(*numbers[3:8])
        batch = sizes.batch(self._line.tensors(sizes.kinds()))
        self._trunk(model, layers)(batch, self._caches[cache])

    def _trunk(self, model: int, layers: int) -> Callable[[RaggedBatch, KVCache], object]:
        if not layers:
            return self._models[model].forward
        if (model, layers) not in self._trunks:
            self._trunks[model, layers] = self._models[model].exit_after(layers)
        return self._trunks[model, layers]

    def _logits(self, numbers: list[int]) -> None:
        model, rows = self._models[numbers[0]], numbers[1]
        [hidden] = self._line.tensors([((rows, model.hidden_size), model.dtype)])
        model.logits(hidden)

    def _move(self, numbers: list[int]) -> None:
        cache, slots = numbers[:2]
        source, target = self._line.tensors([((slots,), torch.int64), ((slots,), torch.int64)])
        self._caches[cache].move(source, target)
