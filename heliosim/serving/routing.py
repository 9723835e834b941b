"""Routers: which replica of a fleet a request goes to.

Pure, as everything here: a router holds no clock and draws from no global generator. It sees what a load balancer in
front of live servers could know: how many requests it sent to each replica and has not got back, and what a replica's
status page says. It knows no lengths, no future and no replica's insides.

A router of your own is a callable that takes ``Streams`` and returns a ``Router`` (a class will do), in your package,
named by an entry point of the group ``heliosim.routers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from heliosim.types import Bytes, Request

MOST_REPLICAS = 2**20
"""Replicas that a fleet may have."""
Streams = Callable[..., np.random.Generator]
"""Named random streams with the run's seed in them: the generator of a name made of texts and whole numbers."""


class ReplicaStatus(Protocol):
    """What a router may see of a replica, read-only and as it is now.

    ``outstanding``: requests sent there that have not left; ``waiting`` and ``running`` as the replica counts them. A
    replica that is down has nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def is_up(self) -> bool: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def kv_used_bytes(self) -> Bytes: ...
    @property
    def kv_total_bytes(self) -> Bytes: ...


class Router(Protocol):
    """Chooses among replicas."""

    def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
        """Index of the replica that takes the request. At least one is up; the answer must be one that is.

        ``replicas``: all of the fleet, always in the same order.
        """
        ...


def up(replicas: Sequence[ReplicaStatus]) -> list[int]:
    """Indices of the replicas that are up, ascending."""
    return [k for k, replica in enumerate(replicas) if replica.is_up]


class RoundRobin:
    """One behind the other, those that are down left out."""

    looks_at_load = False
    """Whether it makes a difference what a replica's status says. False: as long as all are up, each may be simulated
    alone. A router that says nothing is always shown what there is.
    """

    def __init__(self, streams: Streams | None = None) -> None:
        self._next = 0

    def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
        count = len(replicas)
        chosen = next(k % count for k in range(self._next, self._next + count) if replicas[k % count].is_up)
        self._next = (chosen + 1) % count
        return chosen

    def deal(self, requests: int, replicas: int) -> list[slice]:
        """Which of the next ``requests`` requests each replica gets while all are up; a router need not have this."""
        first, self._next = self._next, (self._next + requests) % replicas
        return [slice((k - first) % replicas, None, replicas) for k in range(replicas)]


class LeastOutstanding:
    """The fewest requests sent there and not back yet; of equals the first."""

    looks_at_load = True

    def __init__(self, streams: Streams | None = None) -> None: ...

    def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
        chosen, fewest = -1, -1
        for k, replica in enumerate(replicas):
            if replica.is_up:
                outstanding = replica.outstanding
                if fewest < 0 or outstanding < fewest:
                    chosen, fewest = k, outstanding
        return chosen

    def choose_among(self, request: Request, outstanding: Sequence[int]) -> int:
        """The same where all are up, from the requests outstanding at each; a router need not have this."""
        return outstanding.index(min(outstanding))


class LeastKv:
    """The smallest share of KV bytes in use; of equals the fewest outstanding, then the first.

    A replica without room for KV (its weights are not loaded yet) counts as one that holds none: it has no requests but
    those that are outstanding.
    """

    looks_at_load = True

    def __init__(self, streams: Streams | None = None) -> None: ...

    def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
        chosen, least = -1, 0.0
        for k, replica in enumerate(replicas):
            if replica.is_up:
                share = _kv_share(replica)
                if chosen < 0 or share < least:
                    chosen, least = k, share
                elif share == least and replica.outstanding < replicas[chosen].outstanding:
                    chosen = k
        return chosen


def _kv_share(replica: ReplicaStatus) -> float:
    total = replica.kv_total_bytes
    return replica.kv_used_bytes / total if total else 0.0


class PowerOfTwo:
    """Two drawn at random, the one with fewer outstanding requests wins; of equals the first.

    The draws of a request depend on the seed and its id alone, so they are the same whatever else happens; they fall on
    the replicas that are up. (Mitzenmacher, *The power of two choices in randomized load balancing*, 2001.)
    """

    looks_at_load = True

    BLOCK = 1024
    """Requests whose draws are made at once."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._block = -1
        self._drawn: list[list[float]] = []

    def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
        alive = up(replicas)
        first, second = (alive[k] for k in self._two_of(len(alive), request.id))
        return second if replicas[second].outstanding < replicas[first].outstanding else first

    def choose_among(self, request: Request, outstanding: Sequence[int]) -> int:
        """The same where all are up, from the requests outstanding at each."""
        first, second = self._two_of(len(outstanding), request.id)
        return second if outstanding[second] < outstanding[first] else first

    def _two_of(self, count: int, request: int) -> tuple[int, int]:
        """Two places, the first one first; of one place that one, twice."""
        if count == 1:
            return 0, 0
        u, v = self._draws(request)
        first, second = int(u * count), int(v * (count - 1))
        return (first, second + 1) if second >= first else (second, first)

    def _draws(self, request: int) -> list[float]:
        """Two numbers in [0, 1) of a request."""
        block, place = divmod(request, self.BLOCK)
        if block != self._block:  # requests come nearly in order
            self._block = block
            self._drawn = self._streams("power of two", block).random((self.BLOCK, 2)).tolist()
        return self._drawn[place]
