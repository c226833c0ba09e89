"""What is measured: servers, loads, and what is sent. All of it is known, and checked, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from decoding.errors import ConfigError

Endpoint = Literal["completions", "chat"]
Arrival = Literal["poisson", "constant", "burst"]
# what is asked of a server about its tokens: a count in each chunk, one in the last chunk, nothing
Usage = Literal["continuous", "final", "none"]
PATHS: Mapping[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class NoServerError(ConfigError):
    """Nobody answers at an address."""


@dataclass(frozen=True)
class Server:
    """Whom requests are sent to.

    Attributes:
        flag: of the command line, that names the address.
        model: empty until the server was asked for the models that it has.
        extra: fields of each request, over those that all servers get.
    """

    label: str
    flag: str
    base_url: str
    model: str = ""
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = "continuous"


@dataclass(frozen=True)
class Load:
    """One load of a sweep: a closed loop of ``concurrency`` clients, or an open one of ``rate`` requests a second.

    Attributes:
        burstiness: shape of the gamma distribution of the times between requests; 1 is a Poisson process, less comes
            in clusters, more is nearer to a beat.
        burst_size: requests that come at once, where arrivals are bursts.
        max_concurrency: requests in flight in an open loop at most; others wait, and their waiting counts.
    """

    concurrency: int | None = None
    rate: float | None = None
    arrival: Arrival = "poisson"
    burstiness: float = 1.0
    burst_size: int = 8
    max_concurrency: int | None = None

    @property
    def label(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} at once"
        if self.rate == float("inf"):
            return "all at once"
        return f"{self.rate:g}/s {self.arrival}"

    @property
    def connections(self) -> int | None:
        """That are needed at most; None: nobody knows."""
        return self.concurrency or self.max_concurrency


@dataclass(frozen=True)
class Sampling:
    """What requests ask for beside their prompts."""

    endpoint: Endpoint = "completions"
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Extent:
    """How much is sent, of each load and to each server.

    Attributes:
        requests: in all rounds together.
        duration: seconds of all rounds together in which requests are sent, in place of a number of them.
        rounds: pieces that a load is cut into; of two servers, each piece is one's turn.
        warm_ups: requests to each server that nothing is measured of.
        timeout: seconds for one request.
        keep_alive: use connections for several requests.
    """

    requests: int = 100
    duration: float | None = None
    rounds: int = 1
    warm_ups: int = 1
    timeout: float = 600.0
    keep_alive: bool = True


@dataclass(frozen=True)
class Goal:
    """A request is good when none of its times is longer. Milliseconds."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft, self.tpot, self.e2el))

    def __str__(self) -> str:
        limits = {"ttft": self.ttft, "tpot": self.tpot, "e2el": self.e2el}
        return " ".join(f"{name}:{limit:g}" for name, limit in limits.items() if limit is not None)
