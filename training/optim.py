"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from training.errors import TrainError

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class OptimizerOptions:
    """Learning rates are peaks, reached after ``warmup`` and left for zero in the last ``decay`` of the run."""

    optimizer: str = "muon"  # muon: Muon for matrices, AdamW for everything else; adamw: AdamW for all
    lr: float = 3e-3  # of AdamW
    muon_lr: float = 0.02  # of Muon
    weight_decay: float = 0.0  # of matrices
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float = 1.0  # of the gradient's norm; 0: none
    warmup: float = 0.02  # share of the run in which the learning rates rise
    decay: float = 0.55  # share of the run in which they fall

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        if self.optimizer not in OPTIMIZERS:
            raise TrainError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if not (self.lr > 0 and self.muon_lr > 0):
            raise TrainError("--lr and --muon-lr must be positive")
        if not (self.clip >= 0 and self.weight_decay >= 0):
            raise TrainError("--clip and --weight-decay must be 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TrainError("--betas must be at least 0 and less than 1")
        if not (0 <= self.warmup < 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise TrainError("--warmup and --decay are shares of the run, together at most 1")


class Optimizers:
    """The optimisers of one module, driven as one.

    Muon (Jordan, 2024) orthogonalises the momentum of matrices; embeddings, heads and vectors take AdamW, as its
    author advises.
    """

    def __init__(self, module: nn.Module, options: OptimizerOptions) -> None:
        self._options = options
        trained = [p for p in module.parameters() if p.requires_grad]
        lookups = {id(p) for part in module.modules() for p in part.parameters(recurse=False) if _is_lookup(part)}
        heads = {id(p) for name, p in module.named_parameters() if "lm_head" in name}
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in lookups | heads]
        use_muon = options.optimizer == "muon" and bool(matrices)
        others = [p for p in trained if not use_muon or all(p is not m for m in matrices)]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if use_muon:
            muon = torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=options.weight_decay)
            self.parts.append((muon, options.muon_lr))
        if others:
            decayed = [p for p in others if p.ndim >= 2]
            groups = [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            ]
            adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr, betas=options.betas)
            self.parts.append((adamw, options.lr))
        self._trained = trained

    def step(self, progress: float) -> None:
        """Apply the gathered gradients and forget them; ``progress`` in [0, 1] is how much of the run is done."""
        if self._options.clip > 0:
            nn.utils.clip_grad_norm_(self._trained, self._options.clip)
        factor = schedule(progress, self._options.warmup, self._options.decay)
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


def schedule(progress: float, warmup: float, decay: float) -> float:
    """Factor of the peak learning rate: a linear rise, a plateau, a linear fall to 0."""
    if progress < warmup:
        return max(progress, 0.1 * warmup) / warmup
    left = 1 - min(progress, 1.0)
    return min(1.0, left / decay) if decay > 0 else 1.0


def _is_lookup(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)
