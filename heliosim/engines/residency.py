"""What a device holds, and how that changes: weights, KV storage, transfers beside steps.

The loading half of the live engine. It does what a ``Load`` says and keeps what steps run on: ``held()`` gives the
resident layers and the KV storage. It knows nothing of texts, exits or clocks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from heliosim.engines.models.host import HostModel, Resident
from heliosim.engines.models.incoming import Incoming
from heliosim.engines.models.paged import PagedKV, Pass, Row
from heliosim.engines.models.walk import Gaps
from heliosim.errors import InputError, MemoryBudgetError, UnknownNameError
from heliosim.types import Load, Placement, RequestId, Run, tick

_EXTEND_TOKENS = 2048
"""Tokens run through new layers at once; bounds the activations of an ``extend``."""


class Residency:
    """The resident placement on ``device``, of the models ``hosts``.

    ``resident``, ``kv``: its layers and its KV storage; None: nothing is loaded. ``gaps``: tokens whose KV lacks
    layers; steps write it, a change of placement asks for it. ``fetch``: a transfer beside steps; ``arrival``: layers
    that a step may wait for.
    """

    def __init__(self, hosts: Mapping[str, HostModel], device: torch.device) -> None:
        self.hosts, self.device = hosts, device
        self.placement: Placement | None = None
        self.resident: Resident | None = None
        self.kv: PagedKV | None = None
        self.gaps = Gaps()
        self.fetch: Incoming | None = None
        self.arrival: Incoming | None = None

    def held(self) -> tuple[Resident, PagedKV]:
        """What steps run on: the resident layers and the KV storage."""
        assert self.resident is not None, "nothing is loaded"
        assert self.kv is not None, "no KV is allocated"
        return self.resident, self.kv

    def release(self, requests: Sequence[RequestId]) -> None:
        """Free the KV of requests; nothing of those that hold none."""
        if self.kv is not None:
            for request in requests:
                self.kv.release(request)
                self.gaps.forget(request)

    def clear(self) -> None:
        """Hold nothing: the state at the start, and after a load that failed halfway."""
        self._forget_fetch()
        self.placement = self.resident = self.kv = self.arrival = None
        self.gaps = Gaps()

    def books(self) -> dict[str, int]:
        """Bytes and blocks really held on the device, work buffers apart."""
        kv = self.kv
        blocks = kv.total_blocks if kv is not None else 0
        kv_bytes = kv.nbytes if kv is not None else 0
        used = kv.used_blocks if kv is not None else 0
        block_bytes = kv_bytes // blocks if blocks else 0
        return {
            "weights_bytes": self.resident.nbytes if self.resident is not None else 0,
            "kv_bytes": kv_bytes,
            "kv_blocks": blocks,
            "kv_used_blocks": used,
            "kv_used_bytes": used * block_bytes,
            "block_bytes": block_bytes,
        }

    def arrives_s(self, action: Run | Load) -> float | None:
        """Minus the seconds since the weights fetched in the background were there; None: they are not, or nobody asked
        for them. Asked once behind each action.
        """
        fetch = self.fetch
        if fetch is None or fetch.done_at is None:
            return None
        if isinstance(action, Load) and action.part == "finish":
            self.fetch = None
        return min(0.0, tick(fetch.done_at - time.perf_counter()))

    def stalled_s(self, action: Run | Load) -> float:
        """Seconds that a run waited for layers to arrive; behind it all of them are there. Asked once behind each
        action.
        """
        arrival, self.arrival = self.arrival, None if isinstance(action, Run) else self.arrival
        return 0.0 if arrival is None or isinstance(action, Load) else tick(arrival.stalled_s)

    # --- changes of placement ---------------------------------------------------------------------------------------

    def load(self, action: Load) -> None:
        """Change the placement. What cannot work is refused before anything is given up."""
        host = self._host(action.placement)
        self._require_extendable(action)
        self.release(action.evicted)
        self._hold(action)
        if action.part in ("begin", "drop"):
            self._fetch_in_background(host, action)
            return
        if action.part == "whole":
            self._forget_fetch()
        try:
            if self.fetch is not None:
                self.fetch.wait()
            if action.kept:
                self._extend(host, action)
            else:
                self._replace(host, action)
        except RuntimeError as error:
            self.clear()
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            need = host.info.spec.weights_bytes(action.placement.depth)
            block = host.info.spec.block_bytes(action.placement.depth, action.stores_hidden)
            problem = f"the device is too small for {action.placement}: {need:,} B of weights, {block:,} B per block"
            raise MemoryBudgetError(
                "load.kv_blocks", action.kv_blocks, problem, "Lower the memory budget; nothing is loaded now."
            ) from error
        self.placement = action.placement

    def _fetch_in_background(self, host: HostModel, action: Load) -> None:
        """Begin, or give up, a transfer beside what is resident, whose KV storage shrinks or grows for it."""
        resident, kv = self.held()
        self._forget_fetch()
        kv.compact(action.kv_blocks)
        if action.part == "begin":
            present = resident.depth if resident.host is host else 0
            self.fetch = Incoming(host, present, action.placement.depth, self.device, host.dtype)

    def _forget_fetch(self) -> None:
        if self.fetch is not None:
            self.fetch.cancel()
            self.fetch = None

    def _arriving(self, host: HostModel, present: int, action: Load) -> Incoming | None:
        """What brings the weights of a load: a transfer that is done, one whose layers may be waited for later, or None
        (they are copied now).
        """
        if self.fetch is not None:
            return self.fetch
        if not action.is_pipelined:
            return None
        self.arrival = Incoming(host, present, action.placement.depth, self.device, host.dtype)
        return self.arrival

    def _hold(self, action: Load) -> None:
        """Free the host memory of weights that wait on disk, those that this load reads from there included."""
        if action.host is None:
            return
        held = dict(action.host)
        for name, host in self.hosts.items():
            depth = held.get(name, 0)
            if name == action.placement.model and action.disk_bytes:
                whole, spec = host.info.spec.weights_bytes(action.placement.depth), host.info.spec
                on_host = (d for d in range(spec.layers) if d and whole - spec.weights_bytes(d) == action.disk_bytes)
                host.hold(next(on_host, 0))
            host.hold(depth)

    def _replace(self, host: HostModel, action: Load) -> None:
        """Free all KV and the weights not needed, then copy the missing ones and allocate the new KV."""
        depth = action.placement.depth
        self.kv, self.gaps = None, Gaps()
        if self.resident is None or self.resident.host is not host:
            self.resident = None  # freed before the other model comes
            arrival = self._arriving(host, 0, action)
            self.resident = Resident(host, self.device, host.dtype, arrival)
        else:
            self.resident.drop(depth)
            present = self.resident.depth
            arrival = self._arriving(host, present, action) if present < depth else None
        if arrival is not None:
            self.resident.adopt(arrival)
        else:
            self.resident.deepen(depth)
        if arrival is not None and arrival is self.fetch:
            self.resident.settle()
        hidden = host.info.hidden if action.stores_hidden and depth < host.info.spec.layers else None
        self.kv = PagedKV(action.kv_blocks, depth, host.kv_shape, self.device, host.dtype, hidden=hidden)

    def _extend(self, host: HostModel, action: Load) -> None:
        """Deepen the placement under the kept requests: run the new layers over their stored hidden states."""
        resident, kv = self.held()
        depth, old_depth = action.placement.depth, resident.depth
        kept = dict(action.kept)
        self.release([request for request in kv.tables if request not in kept])
        kv.compact(action.kv_blocks)
        arrival = self._arriving(host, old_depth, action)
        if arrival is not None:
            resident.adopt(arrival)
            resident.settle()  # the new layers run at once
        else:
            resident.deepen(depth)
        kv.add_layers(depth - old_depth)
        rows = [Row(kv.take(request, tokens), 0, tokens) for request, tokens in kept.items() if tokens]
        for group in _groups(rows, _EXTEND_TOKENS):
            self._run_new_layers(group, old_depth)
        if not action.stores_hidden or depth == host.info.spec.layers:
            kv.hidden = None

    def _run_new_layers(self, rows: Sequence[Row], old_depth: int) -> None:
        resident, kv = self.held()
        assert kv.hidden is not None
        run = Pass(rows, kv.shape, self.device, kv.dtype)
        h = kv.hidden.index_select(0, run.slots)
        resident.family.begin(run)
        for i in range(old_depth, resident.depth):
            h = resident.family.layer(resident.layers[i], h, run, kv.layers[i])
        kv.hidden.index_copy_(0, run.slots, h)

    def _require_extendable(self, action: Load) -> None:
        if not action.kept:
            return
        old, new = self.placement, action.placement
        if old is None or old.model != new.model or old.depth >= new.depth:
            raise InputError("load.kept", str(old), f"{new} does not extend it", "Keep requests only when deepening.")
        if self.kv is None or self.kv.hidden is None:
            remedy = "Make the earlier placement with stores_hidden."
            raise InputError("load.kept", str(old), "it stored no hidden states to extend", remedy)
        if self.gaps.done or self.gaps.visible is not None:
            remedy = "Use skipped_kv propagate or copy on placements that are extended."
            raise InputError("load.kept", str(old), "tokens lack the KV of resident layers", remedy)

    def _host(self, placement: Placement) -> HostModel:
        """The model a placement names; raises unless its depth is one tokens can leave at."""
        host = self.hosts.get(placement.model)
        if host is None:
            raise UnknownNameError("placement.model", placement.model, self.hosts)
        host.require_exit(placement.depth)
        return host


def _groups(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Rows in groups of at most ``tokens`` tokens, or one row."""
    groups: list[list[Row]] = []
    size = tokens
    for row in rows:
        if size + row.count > tokens:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += row.count
    return groups
