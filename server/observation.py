"""What is told of the server's work, beside its own metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class Observation:
    """Settings of metrics, log and traces."""

    vllm_metrics: bool = False  # metrics under vLLM's names as well
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    otlp_traces_endpoint: str | None = None  # URL of a collector that takes OTLP over HTTP
