"""What is told of the server's work, beside its own metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """Settings of metrics, log and traces."""

    vllm_metrics: bool = False  # metrics under vLLM's names as well
