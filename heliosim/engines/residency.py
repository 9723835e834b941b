"""What a device holds, and how that changes: weights, KV storage, transfers beside steps.

The loading half of the live engine. It does what a ``Load`` says and keeps what steps run on: ``held()`` gives the
resident layers and the KV storage, both in one ``Arena`` that is allocated once. It knows nothing of texts, exits or
clocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from heliosim.engines.models.arena import Allocate, Arena, allocate, available_bytes, is_out_of_memory
from heliosim.engines.models.host import HostModel, Resident
from heliosim.engines.models.incoming import Copy, Incoming, Slots
from heliosim.engines.models.paged import PagedKV, Pass, Row, block_values, slots_of
from heliosim.engines.models.ring import Ring
from heliosim.engines.models.walk import Gaps
from heliosim.errors import DeviceMemoryError, InputError, LoadError, UnknownNameError
from heliosim.types import Failure, Load, Placement, RequestId, Run, tick

_EXTEND_TOKENS = 2048
"""Tokens run through new layers at once; bounds the activations of an ``extend``."""

_LEAST_SHARE = 100
"""Where a device does not give what was asked for, less is tried, down to this part of it."""


class Residency:
    """The resident placement on ``device``, of the models ``hosts``, which share a dtype.

    ``resident``, ``kv``: its layers and its KV storage; None: nothing is loaded. ``gaps``: tokens whose KV lacks
    layers; steps write it, a change of placement asks for it. ``fetch``: a transfer beside steps; ``arrival``: layers
    that a step may wait for. ``copies``: every piece of weights copied since ``take_copies`` was last called.

    ``budget_bytes`` of device memory are taken at the first load and hold everything (0: as much as loads turn out to
    need). While a placement stands no address changes; layers of one model lie at the same ones in every placement.
    """

    def __init__(
        self,
        hosts: Mapping[str, HostModel],
        device: torch.device,
        *,
        budget_bytes: int = 0,
        is_pinned: bool = False,
        allocate: Allocate = allocate,
    ) -> None:
        self.hosts, self.device, self.budget_bytes = hosts, device, budget_bytes
        self.dtype = next(iter(hosts.values())).dtype
        self.arena = Arena(device, self.dtype, allocate)
        self.ring = Ring(max(host.largest for host in hosts.values()), is_pinned=is_pinned)
        self.copies: list[Copy] = []
        self.placement: Placement | None = None
        self.resident: Resident | None = None
        self.kv: PagedKV | None = None
        self.gaps = Gaps()
        self.fetch: Incoming | None = None
        self.arrival: Incoming | None = None
        self._spare: Tensor | None = None

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
        """Hold nothing: the state at the start, and after a load that failed halfway. The arena stays."""
        self._forget_fetch()
        if self.arrival is not None:
            self.arrival.cancel()
        self.placement = self.resident = self.kv = self.arrival = None
        self.gaps = Gaps()

    def take_copies(self) -> list[Copy]:
        """Pieces of weights that were copied since the last call, each with its times."""
        taken = list(self.copies)
        del self.copies[: len(taken)]
        return taken

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

    def lost_fetch(self) -> Failure | None:
        """Why a transfer beside steps came to nothing; it is forgotten then. None: it did not, or there is none."""
        fetch = self.fetch
        if fetch is None or fetch.failed is None:
            return None
        self._forget_fetch()
        return Failure("fetch", f"{fetch.host.info.spec.name}@{fetch.depth} did not come: {fetch.failed}", True)

    @contextmanager
    def stepping(self, action: Run) -> Iterator[None]:
        """Steps run inside. Raises DeviceMemoryError where the device has no memory for them (what is resident stays),
        LoadError where a layer that a step waited for did not come (nothing stays).
        """
        try:
            yield
        except Exception as error:
            if self.arrival is not None and self.arrival.failed is not None:
                problem = f"{action.placement} did not come: {self.arrival.failed}"
                self.clear()
                raise LoadError(problem) from error
            if not isinstance(error, RuntimeError) or not is_out_of_memory(error):
                raise
            problem = f"the device has no memory for a step of {action.batch.tokens} tokens"
            small = DeviceMemoryError("batcher", len(action.batch), problem, "Lower max_batch or token_budget.")
            small.is_intact = True
            raise small from error

    # --- changes of placement ---------------------------------------------------------------------------------------

    def load(self, action: Load) -> None:
        """Change the placement. What cannot work is refused before anything is given up.

        Raises DeviceMemoryError or LoadError where the device or the files let it down, and leaves the engine able to
        load again: with nothing resident, unless the error says otherwise.
        """
        host = self._host(action.placement)
        self._require_extendable(action)
        try:
            if self.resident is not None:
                self.resident.settle()
            self.release(action.evicted)
            self._hold(action)
            if action.part in ("begin", "drop"):
                self._beside(host, action)
                return
            if action.part == "whole":
                self._forget_fetch()
            elif self.fetch is not None:
                self.fetch.wait()
            if action.kept:
                self._extend(host, action)
            else:
                self._replace(host, action)
            self.placement = action.placement
        except DeviceMemoryError as error:
            if not error.is_intact:
                self.clear()
                self._fall_back(error)
            raise
        except (AssertionError, InputError):
            self.clear()
            raise
        except Exception as error:
            self.clear()
            raise LoadError(f"{action.placement} did not come: {error}") from error
        except BaseException:  # interrupted: nothing half done may stay
            self.clear()
            raise

    def _beside(self, host: HostModel, action: Load) -> None:
        """Begin, or give up, a transfer beside what is resident, whose KV storage shrinks or grows for it."""
        resident, kv = self.held()
        self._forget_fetch()
        held, present, first, more = resident.host.values(resident.depth), 0, 0, 0
        if action.part == "begin":
            if resident.host is host:
                present = resident.depth
                more = host.values(action.placement.depth) - held
            else:
                first, more = held, host.values(action.placement.depth)
        self._make_room(held + more, action.kv_blocks * kv.block_values, action, is_intact=True)
        self.gaps.move(kv.resize(action.kv_blocks))
        if action.part == "begin":
            self.fetch = self._transfer(host, present, action.placement.depth, first=first)

    def _replace(self, host: HostModel, action: Load) -> None:
        """Give up all KV and the weights not needed, bring the missing ones, and lay out the new KV."""
        depth = action.placement.depth
        self.kv, self.gaps = None, Gaps()
        if self.resident is None or self.resident.host is not host:
            self.resident = Resident(host, self.device, self.dtype, self._slots(host))
        else:
            self.resident.drop(depth)
        if self.fetch is not None:
            self._take_fetched(self.resident)
        hidden = host.info.hidden if self._keeps_hidden(host, action) else None
        block = block_values(depth, host.kv_shape, hidden)
        self._make_room(host.values(depth), action.kv_blocks * block, action)
        self._bring(self.resident, action, is_pipelined=action.is_pipelined)
        self.kv = PagedKV(
            action.kv_blocks, depth, host.kv_shape, self.device, self.dtype, hidden=hidden, storage=self.arena.data
        )

    def _extend(self, host: HostModel, action: Load) -> None:
        """Deepen the placement under the kept requests: run the new layers over their stored hidden states."""
        resident, kv = self.held()
        depth, old_depth, keeps = action.placement.depth, resident.depth, self._keeps_hidden(host, action)
        kept = dict(action.kept)
        self.release([request for request in kv.tables if request not in kept])
        fits = kv.has_room_for_hidden(depth, keeps_hidden=keeps)
        saved = {} if fits else {request: self._saved_states(request, tokens) for request, tokens in kept.items()}
        block = block_values(depth, host.kv_shape, host.info.hidden if keeps else None)
        self._make_room(host.values(depth), action.kv_blocks * block, action)
        if fits:  # weights first: blocks grow towards them
            kv.resize(kv.used_blocks)
            self._bring(resident, action)
            kv.relay(depth, action.kv_blocks, self._scratch(), keeps_hidden=keeps)
        else:
            kv.relay(depth, action.kv_blocks, self._scratch(), keeps_hidden=keeps)
            self._bring(resident, action)
        rows = {r: Row(kv.take(r, tokens), 0, tokens) for r, tokens in kept.items() if tokens}
        for group in _groups(list(rows.items()), _EXTEND_TOKENS):
            self._run_new_layers(group, old_depth, saved, keeps_hidden=keeps)
        if not keeps:
            kv.drop_hidden()

    def _run_new_layers(
        self,
        group: Sequence[tuple[RequestId, Row]],
        old_depth: int,
        saved: Mapping[RequestId, Tensor],
        *,
        keeps_hidden: bool,
    ) -> None:
        """Run the layers behind ``old_depth`` over the rows of some requests, from kept or ``saved`` states [n, d]."""
        resident, kv = self.held()
        run = Pass([row for _, row in group], kv.shape, self.device, kv.dtype, block_rows=kv.block_rows)
        if saved:
            h = torch.cat([saved[group[k][0]] for k in run.order]).to(self.device)
        else:
            assert kv.hidden is not None
            h = kv.hidden.of(run.slots)
        resident.family.begin(run)
        for i in range(old_depth, resident.depth):
            h = resident.family.layer(resident.layers[i], h, run, kv.layers[i])
        if keeps_hidden:
            assert kv.hidden is not None
            kv.hidden.keep(run.slots, h)

    def _saved_states(self, request: RequestId, tokens: int) -> Tensor:
        """Hidden states of a request's tokens, in host memory: the deeper block has no room for them."""
        _, kv = self.held()
        assert kv.hidden is not None
        slots = torch.tensor(list(slots_of(Row(kv.take(request, tokens), 0, tokens), kv.block_rows)))
        return kv.hidden.of(slots.to(self.device)).cpu()

    # --- weights ----------------------------------------------------------------------------------------------------

    def _bring(self, resident: Resident, action: Load, *, is_pipelined: bool = False) -> None:
        """Bring the layers that are missing: fetched ones, or copied now, or by a transfer that the next step may wait
        for.
        """
        if self.fetch is not None:
            self._take_fetched(resident)
        if resident.depth == action.placement.depth:
            return
        arrival = self._transfer(resident.host, resident.depth, action.placement.depth, is_background=is_pipelined)
        resident.adopt(arrival)
        if is_pipelined:
            self.arrival = arrival
        else:
            resident.settle()

    def _take_fetched(self, resident: Resident) -> None:
        """Use what a transfer beside steps has brought; another model moves to where models lie."""
        fetch, host = self.fetch, resident.host
        assert fetch is not None
        if resident.depth == fetch.depth:
            return
        is_beside = fetch.first > 0
        resident.adopt(fetch)
        resident.settle()
        if is_beside:
            self.arena.move_left(fetch.first, host.values(fetch.depth), fetch.first)
            resident.move(self._slots(host))

    def _transfer(
        self, host: HostModel, present: int, depth: int, *, first: int = 0, is_background: bool = True
    ) -> Incoming:
        """Weights on their way to where they belong, counted from ``first``."""
        return Incoming(
            host,
            present,
            depth,
            self._slots(host, first),
            self.device,
            first=first,
            ring=self.ring,
            copies=self.copies,
            is_background=is_background,
        )

    def _slots(self, host: HostModel, first: int = 0) -> Slots:
        """Where the pieces of a model lie in the arena."""

        def slot(kind: str, number: int) -> Tensor:
            start, values = host.place(kind, number)
            return self.arena.part(first + start, values)

        return slot

    def _forget_fetch(self) -> None:
        if self.fetch is not None:
            self.fetch.cancel()
            self.fetch = None

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

    # --- memory -----------------------------------------------------------------------------------------------------

    def _keeps_hidden(self, host: HostModel, action: Load) -> bool:
        return action.stores_hidden and action.placement.depth < host.info.spec.layers

    def _make_room(self, left: int, right: int, action: Load, *, is_intact: bool = False) -> None:
        """Have an arena in which weights take ``left`` values and KV ``right``. Only where nobody said how large it is
        to be, or it is to be larger than was said, can it have to be replaced.
        """
        resident, kv = self.resident, self.kv
        kept = resident.host.values(resident.depth) if resident is not None else 0
        blocks = kv.grid_blocks if kv is not None else 0
        wanted = max(left + right, self.budget_bytes // self.dtype.itemsize)
        try:
            if not self.arena.grow(wanted, kept, 0 if kv is None else kv.values):
                return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_small(action, is_intact=is_intact) from error
        if resident is not None:
            resident.move(self._slots(resident.host))
        if kv is not None:
            kv.bind(self.arena.data)
            self.gaps.shift(kv.grid_blocks - blocks)
        self._scratch()

    def _too_small(self, action: Load, *, is_intact: bool) -> DeviceMemoryError:
        spec = self._host(action.placement).info.spec
        need = spec.weights_bytes(action.placement.depth)
        block = spec.block_bytes(action.placement.depth, action.stores_hidden)
        problem = f"the device is too small for {action.placement}: {need:,} B of weights, {block:,} B per block"
        rest = "What was resident still is." if is_intact else "nothing is loaded now."
        error = DeviceMemoryError("load.kv_blocks", action.kv_blocks, problem, f"Lower the memory budget; {rest}")
        error.is_intact = is_intact
        return error

    def _fall_back(self, error: DeviceMemoryError) -> None:
        """Take a smaller arena than was asked for, and say so in ``error``: another load can be asked for then."""
        if not self.budget_bytes:
            return
        wanted = self.budget_bytes // self.dtype.itemsize
        there = available_bytes(self.device)
        if there is not None:
            wanted = min(wanted, there // self.dtype.itemsize)
        high = wanted
        while not self._can_have(low := int(0.9 * high)):
            high = low
            if high < wanted // _LEAST_SHARE:
                return
        for _ in range(5):
            middle = (low + high) // 2
            low, high = (middle, high) if self._can_have(middle) else (low, middle)
        if self._can_have(low):
            self.budget_bytes = error.available_bytes = low * self.dtype.itemsize

    def _can_have(self, values: int) -> bool:
        """Have an arena of ``values`` values, or none."""
        try:
            self.arena.grow(values, 0, 0)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _scratch(self) -> Tensor:
        """Room for a block of any placement, made once."""
        if self._spare is None:
            most = (block_values(h.info.spec.layers, h.kv_shape, h.info.hidden) for h in self.hosts.values())
            self._spare = torch.empty(max(most), device=self.device, dtype=self.dtype)
        return self._spare

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


def _groups(rows: Sequence[tuple[RequestId, Row]], tokens: int) -> list[list[tuple[RequestId, Row]]]:
    """Rows in groups of at most ``tokens`` tokens, or one row."""
    groups: list[list[tuple[RequestId, Row]]] = []
    size = tokens
    for request, row in rows:
        if size + row.count > tokens:
            groups.append([])
            size = 0
        groups[-1].append((request, row))
        size += row.count
    return groups
