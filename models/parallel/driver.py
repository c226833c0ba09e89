"""Rank 0's side: a model on all ranks looks like any other, and each call of it is told to the other ranks first.

Rank 0 alone schedules, drafts, draws and verifies. The other ranks (worker.py) repeat what it does to the model, so
nothing that ranks would have to agree on is decided twice.
"""

from __future__ import annotations

import itertools
import json
import weakref
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from models.batch import RaggedBatch
from models.checkpoint import CheckpointError
from models.decoder import Decoder
from models.kv_cache import KVCache
from models.loader import load_model
from models.parallel.calls import BatchSizes, Call, Line, batch_tensors
from models.parallel.ranks import Ranks
from models.target import ForwardOutput, Trunk


class Driver:
    """Has the other ranks do what this one, rank 0, does."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.size = ranks.size
        self.device = device
        self.line = Line(ranks, device)
        self._ranks = ranks
        self._models = itertools.count()
        self._caches = itertools.count()
        self._gone: list[int] = []  # caches that nobody has any more

    def load(
        self,
        path: Path,
        *,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        attention: str = "auto",
        max_model_len: int | None = None,
        quantization: str = "none",
        room: int | None = None,
    ) -> ShardedModel:
        """``load_model`` on all ranks, a part on each.

        Args:
            device: the ranks' own, of this one.

        Raises:
            CheckpointError, ValueError, RuntimeError: as ``load_model``; another rank could not load its part.
            RankError: one of the other ranks is gone.
        """
        assert torch.device(device) == self.device
        settings = {
            "dtype": dtype,
            "attention": attention,
            "max_model_len": max_model_len,
            "quantization": quantization,
        }
        number, order = next(self._models), json.dumps({"path": str(path), **settings}).encode()
        self.line.send(Call.LOAD, (number, len(order)), [torch.frombuffer(bytearray(order), dtype=torch.uint8)])
        try:
            part = load_model(
                path,
                dtype=dtype,
                device=self.device,
                attention=attention,
                max_model_len=max_model_len,
                quantization=quantization,
                room=room,
                ranks=self._ranks,
            )
        finally:  # whatever happened here: the others say how it went for them
            complaints = self._ranks.tell("")
        for rank, complaint in enumerate(complaints):
            if complaint:
                raise CheckpointError(f"rank {rank} cannot load its part of {path}: {complaint}")
        return ShardedModel(cast(Decoder, part), number, self)

    def new_cache(self, part: Decoder, model: int, num_pages: int) -> ShardedCache:
        """K/V of a model on all ranks. The others give theirs up when this one is collected."""
        number = next(self._caches)
        self.line.send(Call.CACHE, (number, model, num_pages))
        cache = ShardedCache(part, num_pages, number, self.line)
        weakref.finalize(cache, self._gone.append, number)
        return cache

    def forward(self, batch: RaggedBatch, cache: KVCache, model: int, layers: int = 0) -> None:
        """Announce a forward pass: of all layers, or of the first ones and what follows them at an exit."""
        assert isinstance(cache, ShardedCache)
        while self._gone:
            self.line.send(Call.DROP, (self._gone.pop(),))
        sizes, tensors = BatchSizes.of(batch), batch_tensors(batch)
        assert [(tensor.shape, tensor.dtype) for tensor in tensors] == sizes.kinds()  # what the others take them for
        self.line.send(Call.FORWARD, (model, cache.number, layers, *sizes), tensors)

    def free_memory(self) -> list[int]:
        """Bytes that are free on the CUDA devices of the other ranks."""
        self.line.send(Call.FREE)
        return [int(said) for said in self._ranks.tell("")[1:]]

    def stop(self, seconds: float) -> None:
        """Have the other ranks end.

        Raises:
            RankError: one of them has ended already, or was not ready for it in this time: it is in a pass that this
                rank gave up.
        """
        self.line.send(Call.STOP, timeout=timedelta(seconds=seconds))


class ShardedCache(KVCache):
    """This rank's K/V; what is moved here is moved in all ranks."""

    shared = True

    def __init__(self, part: Decoder, num_pages: int, number: int, line: Line) -> None:
        super().__init__(part.kv_spec, num_pages, part.dtype, part.device)
        self.number = number
        self._line = line

    def move(self, source: Tensor, target: Tensor) -> None:
        """See ``KVCache.move``."""
        self._line.send(Call.MOVE, (self.number, source.shape[0]), (source, target))
        super().move(source, target)


class ShardedModel:
    """An ``ExitingModel`` (models/target.py) on all ranks. Its results are whole.

    Args:
        part: this rank's.
        number: what the model is called between the ranks.
    """

    def __init__(self, part: Decoder, number: int, driver: Driver) -> None:
        self.vocab_size = part.vocab_size
        self.hidden_size = part.hidden_size
        self.num_layers = part.num_layers
        self.max_model_len = part.max_model_len
        self.kv_spec = part.kv_spec
        self.dtype = part.dtype
        self.device = part.device
        self.embed = part.embed
        self._part = part
        self._number = number
        self._driver = driver

    @property
    def layer_size(self) -> int:
        """See ``ExitingModel``."""
        return self._part.layer_size

    def new_cache(self, num_pages: int) -> KVCache:
        """See ``CausalModel.new_cache``; no other cache will do for this model."""
        return self._driver.new_cache(self._part, self._number, num_pages)

    def forward(self, batch: RaggedBatch, cache: KVCache, taps: tuple[int, ...] = ()) -> ForwardOutput:
        """See ``CausalModel.forward``."""
        self._driver.forward(batch, cache, self._number)
        return self._part.forward(batch, cache, taps)

    def exit_after(self, layers: int) -> Trunk:
        """See ``ExitingModel.exit_after``."""
        trunk = self._part.exit_after(layers)

        def run(batch: RaggedBatch, cache: KVCache) -> Tensor:
            self._driver.forward(batch, cache, self._number, layers)
            return trunk(batch, cache)

        return run

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel.logits``."""
        if hidden.shape[0]:  # nothing cannot be sent
            self._driver.line.send(Call.LOGITS, (self._number, hidden.shape[0]), [hidden])
            return self._part.logits(hidden)
        return hidden.new_empty((0, self.vocab_size), dtype=torch.promote_types(self.dtype, torch.float32))
