"""Which replica a request goes to: one that has its beginning in the cache, unless others have much less to do.

As in SGLang's cache-aware router, requests follow the longest beginning that is known, as long as the load is even.
What is known are keys of blocks (``server.ray.prefix_keys``), not a tree of texts. Where nothing is known, rendezvous
hashing (Thaler and Ravishankar 1998) chooses: several routers that know nothing of each other choose alike, and a
replica that comes or goes moves no keys but its own.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

MAX_IMBALANCE = 16  # a quarter of a batch: a prefix in the cache saves less than a much fuller batch costs
MAX_KEYS = 65536


class Affinity:
    """Remembers where beginnings went.

    Args:
        max_imbalance: requests that a replica may have more than the one that has the fewest, and still be chosen.
        max_keys: that are remembered; the ones not used for longest are forgotten first.
    """

    def __init__(self, max_imbalance: int = MAX_IMBALANCE, max_keys: int = MAX_KEYS) -> None:
        self._max_imbalance = max_imbalance
        self._max_keys = max_keys
        self._replicas: OrderedDict[str, set[str]] = OrderedDict()

    def __len__(self) -> int:
        """Keys that are remembered."""
        return len(self._replicas)

    def order(self, keys: Sequence[str], loads: Mapping[str, int]) -> list[str]:
        """All replicas, the best first.

        Args:
            keys: of the request's beginnings, the shortest first.
            loads: requests that each replica has.
        """
        if not loads:
            return []
        least = min(loads.values())
        fit = [replica for replica, load in loads.items() if load - least <= self._max_imbalance]
        first = self._longest(keys, fit, loads) or self._unknown(keys, fit, loads)
        others = sorted(loads.keys() - {first}, key=lambda replica: (loads[replica], replica))
        return [first, *others]

    def remember(self, keys: Sequence[str], replica: str) -> None:
        """A request with these keys went to ``replica``."""
        for key in reversed(keys):  # so that the longest of its beginnings is forgotten first
            self._replicas.setdefault(key, set()).add(replica)
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_keys:
            self._replicas.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        for key in list(self._replicas):
            self._replicas[key].intersection_update(replicas)
            if not self._replicas[key]:
                del self._replicas[key]

    def _longest(self, keys: Sequence[str], fit: Iterable[str], loads: Mapping[str, int]) -> str | None:
        """Of those that have the longest beginning the one with the least to do; None: nobody has any."""
        having = set(fit)
        found: set[str] = set()
        for key in keys:
            having = having & self._replicas.get(key, set())
            if not having:
                break
            found = having
        return min(found, key=lambda replica: (loads[replica], replica)) if found else None

    def _unknown(self, keys: Sequence[str], fit: Sequence[str], loads: Mapping[str, int]) -> str:
        """By the shortest beginning, so that requests which begin alike meet; of the next two the one with less to do
        where the first has too much.
        """
        if not keys:
            return min(fit, key=lambda replica: (loads[replica], replica))
        ranked = sorted(loads, key=lambda replica: _weight(keys[0], replica), reverse=True)
        if ranked[0] in fit:
            return ranked[0]
        two = [replica for replica in ranked if replica in fit][:2]
        return min(two, key=lambda replica: loads[replica])


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key} {replica}".encode(), digest_size=8).digest()
