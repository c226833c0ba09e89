"""The training loop: steps, schedule, validation, checkpoints, several devices by torch's own data parallelism."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from training import distributed
from training.checkpoint import forget_state, load_state, replace_folder, save_state
from training.data import WindowSampler
from training.errors import TrainError
from training.history import History
from training.optim import OptimizerOptions, Optimizers
from training.recipe import Losses, Recipe, Windows


@dataclass(frozen=True)
class RunOptions:
    """How long and in what portions a run goes."""

    steps: int | None = None  # default: one pass over the data
    minutes: float | None = None  # ends, and decays the learning rate, by the clock
    batch: int = 16  # windows a step, over all devices
    micro_batch: int = 16  # windows a forward pass
    save_every: float = 5.0  # minutes between checkpoints
    validate_every: int = 200  # steps between validations
    log_every: int = 10  # steps between noted losses

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        for name in ("steps", "minutes", "batch", "micro_batch", "save_every", "validate_every", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainError(f"--{name.replace('_', '-')} must be positive, not {value}")


@dataclass
class Position:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0  # of training, interruptions not counted
    tokens: int = 0
    history: History = field(default_factory=History)


class Trainer:
    """Trains a recipe's module; ``run`` goes on from a checkpoint where there is one.

    Args:
        out: the result's folder; checkpoints lie in its ``.train``.
    """

    def __init__(
        self,
        recipe: Recipe,
        sampler: WindowSampler,
        run: RunOptions,
        optimizer: OptimizerOptions,
        out: Path,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.recipe = recipe
        self.position = Position()
        self._sampler = sampler
        self._run = run
        self._out = out
        self._state_folder = out / ".train"
        self._device = device
        self._autocast = autocast
        self._steps = run.steps or (10**9 if run.minutes else sampler.steps_per_epoch)
        recipe.module.to(device)
        self._optimizers = Optimizers(recipe.module, optimizer)
        self._loss: nn.Module = _Loss(recipe)
        if distributed.world_size() > 1:
            self._loss = DistributedDataParallel(self._loss, find_unused_parameters=True)

    def resume(self, fingerprint: dict[str, Any]) -> bool:
        """Go on from this run's last checkpoint; False if there is none.

        Raises:
            TrainError: the checkpoint is of a run with other options.
        """
        self._fingerprint = fingerprint
        state = load_state(self._state_folder)
        if state is None:
            return False
        if state["fingerprint"] != fingerprint:
            changed = [k for k in fingerprint if state["fingerprint"].get(k) != fingerprint[k]]
            raise TrainError(
                f"{self._out} holds an unfinished run with other options ({', '.join(changed)}); run its command "
                "again to go on, choose another --out, or give --restart to begin anew"
            )
        self.recipe.module.load_state_dict(state["module"])
        self._optimizers.load_state_dict(state["optimizers"])
        position = state["position"]
        self.position = Position(
            position["step"], position["seconds"], position["tokens"], History(position["history"])
        )
        return True

    def run(self) -> History:
        """Train to the end and write the result. An interrupt saves a checkpoint first."""
        started, saved = time.monotonic() - self.position.seconds, time.monotonic()
        try:
            with self._bar() as bar:
                while (progress := self._progress()) < 1:
                    losses = self._step(progress)
                    self.position.step += 1
                    self.position.seconds = time.monotonic() - started
                    self._log(losses, progress, bar)
                    if time.monotonic() - saved > 60 * self._run.save_every:
                        self.save_state()
                        saved = time.monotonic()
            self._validate()
        except KeyboardInterrupt:
            self.save_state()
            raise
        if distributed.is_main():
            self._finish()
        return self.position.history

    def save_state(self) -> None:
        """Write a checkpoint; the previous one stays until it is complete."""
        if not distributed.is_main():
            return
        position = vars(self.position) | {"history": self.position.history.rows}
        state = {
            "fingerprint": self._fingerprint,
            "module": self.recipe.module.state_dict(),
            "optimizers": self._optimizers.state_dict(),
            "position": position,
        }
        save_state(self._state_folder, state)

    def _finish(self) -> None:
        try:
            replace_folder(self._out, self._write)
        except (TrainError, KeyboardInterrupt):
            self.save_state()  # the same command has nothing left to do but to write
            raise
        forget_state(self._state_folder)

    def _write(self, folder: Path) -> None:
        self.recipe.save(folder)
        self.position.history.write(folder)

    def _progress(self) -> float:
        """How much of the run is done, the same on every device."""
        by_steps = self.position.step / self._steps
        by_clock = self.position.seconds / (60 * self._run.minutes) if self._run.minutes else 0.0
        return distributed.largest(max(by_steps, by_clock), self._device)

    def _step(self, progress: float) -> Losses:
        tokens, counts = self._sampler.batch(self.position.step)
        own = slice(distributed.rank(), None, distributed.world_size())
        windows = self._windows(tokens[own], counts[own])
        portions = list(_portions(windows, self._run.micro_batch))
        self.recipe.module.train()
        sums: dict[str, Tensor] = {}
        total = torch.zeros((), device=self._device)
        for index, portion in enumerate(portions):
            with self._no_sync(last=index + 1 == len(portions)):
                with self._precision():
                    losses = self._loss(portion)
                (losses.total / len(portions)).backward()
            total += losses.total.detach() / len(portions)
            for name, value in losses.metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / len(portions)
        self._optimizers.step(progress)
        self.position.tokens += tokens.size
        return Losses(total, sums)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Average over the windows that no step sees."""
        windows = self._windows(*self._sampler.validation())
        self.recipe.module.eval()
        sums: dict[str, float] = {}
        for portion in _portions(windows, self._run.micro_batch):
            with self._precision():
                losses = self.recipe.loss(portion)
            share = len(portion.tokens) / len(windows.tokens)
            for name, value in ({"loss": losses.total} | losses.metrics).items():
                sums[name] = sums.get(name, 0.0) + float(value) * share
        self.position.history.add(self.position.step, self.position.seconds, "validation", sums)
        return sums

    def _log(self, losses: Losses, progress: float, bar: Any) -> None:
        step = self.position.step
        if self._run.validate_every and step % self._run.validate_every == 0:
            shown = self._validate()
            bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))
        if step % self._run.log_every == 0 or step == 1:
            values = {"loss": float(losses.total)} | {name: float(value) for name, value in losses.metrics.items()}
            self.position.history.add(step, self.position.seconds, "training", values)
            rate = self.position.tokens / max(self.position.seconds, 1e-9)
            bar.set_postfix_str(f"step {step}, loss {values['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
        bar.n = round(100 * min(progress, 1.0), 1)
        bar.update(0)

    def _bar(self) -> Any:
        shape = "{percentage:3.0f}%|{bar}| {elapsed} elapsed{postfix}"
        return tqdm(total=100, bar_format=shape, disable=not distributed.is_main(), mininterval=1.0)

    def _windows(self, tokens: Any, counts: Any) -> Windows:
        return Windows(torch.from_numpy(tokens).to(self._device), torch.from_numpy(counts).to(self._device))

    def _precision(self) -> Any:
        return torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None)

    @contextmanager
    def _no_sync(self, *, last: bool) -> Iterator[None]:
        """Gradients are exchanged once a step, with its last portion."""
        if isinstance(self._loss, DistributedDataParallel) and not last:
            with self._loss.no_sync():
                yield
        else:
            yield


class _Loss(nn.Module):
    """A recipe's loss as a module, which is what data parallelism wraps."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.trained = recipe.module
        self._recipe = recipe

    def forward(self, windows: Windows) -> Losses:
        return self._recipe.loss(windows)


def _portions(windows: Windows, size: int) -> Iterator[Windows]:
    for first in range(0, len(windows.tokens), size):
        yield Windows(windows.tokens[first : first + size], windows.counts[first : first + size])
