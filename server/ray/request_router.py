"""The request router of Ray Serve: runs in every process that sends requests to replicas, above all the proxies."""

from __future__ import annotations

from dataclasses import dataclass

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from server.ray.affinity import MAX_IMBALANCE, MAX_KEYS, Affinity
from server.ray.replica_app import NOT, PIN


@dataclass(frozen=True)
class Hints:
    """What the proxy's middleware says of a request.

    Attributes:
        keys: of its beginnings, the shortest first.
        only: the replica that it is for.
        avoid: a replica that it is not for.
    """

    keys: tuple[str, ...] = ()
    only: str | None = None
    avoid: str | None = None

    @classmethod
    def of(cls, request: PendingRequest | None) -> Hints:
        """Ray passes them on as the id of a session."""
        words = [] if request is None else str(request.metadata.session_id).split()
        keys = tuple(word for word in words if word[0] not in PIN + NOT)
        named = {word[0]: word[1:] for word in words if word[0] in PIN + NOT}
        return cls(keys, named.get(PIN), named.get(NOT))


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Sends requests that begin alike to the same replica, as long as the load is even; see ``server.ray.affinity``."""

    def initialize_state(self, max_imbalance: int = MAX_IMBALANCE, max_keys: int = MAX_KEYS) -> None:
        """Called by Ray, with request_router_kwargs."""
        self._affinity = Affinity(max_imbalance, max_keys)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Ray: all replicas, each a rank of its own, the best first. A later one is taken if those before it
        have as many requests as Ray may give them.
        """
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where none has room: wait before asking again
        hints = Hints.of(pending_request)
        if hints.only in replicas:
            return [[replicas[hints.only]]]
        # an engine that restarts answers at once, with an error: it must not look idle
        ready = [name for name, each in replicas.items() if each.routing_stats.get("ready", True)] or list(replicas)
        others = [name for name in ready if name != hints.avoid] or ready
        loads = {name: self._load(replicas[name]) for name in others}
        return [[replicas[name]] for name in self._affinity.order(hints.keys, loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Called by Ray when a replica has taken a request."""
        self._affinity.remember(Hints.of(pending_request).keys, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray when replicas have come or gone."""
        super().update_replicas(replicas)
        self._affinity.keep([each.replica_id.unique_id for each in replicas])

    def _load(self, replica: RunningReplica) -> int:
        """Requests that a replica has: as counted here, or as it said last where the count is too old."""
        counted = self.replica_queue_len_cache.get(replica.replica_id)
        return counted if counted is not None else int(replica.routing_stats.get("requests", 0))
