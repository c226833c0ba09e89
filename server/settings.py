"""The HTTP side's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.config import EngineConfig
from server.limits import Limits
from server.observation import Observation
from server.openai.sse import PING_SECONDS
from server.security import Security


@dataclass(frozen=True)
class ServerSettings:
    """What the HTTP process must know beside the engine's configuration."""

    model_names: tuple[str, ...]  # that clients may ask for; the first is the one that answers name
    seed: int | None = None  # of requests that bring none; None: a random one each
    ping_seconds: float = PING_SECONDS
    tool_call_parser: str = "auto"  # a name of server/openai/tools/table.py, auto or none
    reasoning_parser: str = "auto"  # a name of server/openai/reasoning.py, auto or none
    enable_auto_tool_choice: bool = False  # refuse to start where models could not be left the choice of tools
    rows: int = EngineConfig.max_num_seqs  # choices in the engine's batch; what is beyond them waits
    limits: Limits = field(default_factory=Limits)
    security: Security = field(default_factory=Security)
    observation: Observation = field(default_factory=Observation)
