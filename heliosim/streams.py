"""Named random streams: one seed, one independent generator for every purpose.

A draw depends on the seed and the name of its stream alone, so changing how one thing is drawn (arrivals, lengths,
exits) never moves another. The names are hashed with BLAKE2b, which does not change between Python versions or
processes as ``hash`` does.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The generator of ``seed`` (any integer >= 0) and ``names``; the same arguments give the same numbers.

    ``1`` and ``"1"`` are different names, and ("ab", "c") is not ("a", "bc").
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, not {seed!r}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=_words(names))))


def replication_seed(seed: int, index: int) -> int:
    """The seed of a replication: the run's own for index 0, else drawn from it, below 2^63."""
    return seed if index == 0 else int(stream(seed, "replication", index).integers(2**63))


def _words(names: tuple[str | int, ...]) -> tuple[int, ...]:
    """Names as four 32-bit words."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"a stream's name must be text or an integer, not {name!r}")
        kind, text = ("i", str(name)) if isinstance(name, int) else ("s", name)
        data = text.encode("utf-8")
        digest.update(f"{kind}{len(data)}:".encode() + data)
    raw = digest.digest()
    return tuple(int.from_bytes(raw[i : i + 4], "little") for i in range(0, 16, 4))
