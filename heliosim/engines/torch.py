"""The live engine: really loads layers, really runs them, and says how long it took.

It keeps what the server must not know (token ids, true lengths) and the KV itself, and obeys the placements, batches
and block counts it is told. Decoding is greedy. It knows nothing of objectives, breaches or clocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heliosim.engines.allocator import keep_freed_memory
from heliosim.engines.models.host import HostModel, Resident
from heliosim.engines.models.incoming import Incoming
from heliosim.engines.models.paged import PagedKV, Pass, Row
from heliosim.engines.models.walk import Gaps, Left, Walk, read
from heliosim.errors import InputError, MemoryBudgetError, UnknownNameError
from heliosim.formats.checkpoint import CheckpointInfo, checkpoint_path, inspect_checkpoint
from heliosim.types import (
    Arrival,
    Batch,
    Load,
    ModelSpec,
    Outcome,
    Placement,
    Request,
    RequestId,
    Run,
    Tokens,
    tick,
)

_EXTEND_TOKENS = 2048
"""Tokens run through new layers at once; bounds the activations of an ``extend``."""


@dataclass(slots=True)
class _Sequence:
    """A request as the engine knows it. ``known``: prompt and generated ids."""

    request: Request
    known: list[int]
    output_tokens: int | None

    @property
    def generated(self) -> list[int]:
        return self.known[self.request.prompt_tokens :]


class TorchEngine:
    """Serves early-exit OPT and Llama checkpoints on one device.

    ``checkpoints``: folder or shipped name by model name; all must share a vocabulary. ``exits``: exit layers by
    model name, in place of the checkpoint's own. ``is_pageable``: host weights are not pinned, on a GPU either.
    ``threads``: CPU threads, set for the whole process. ``record_ids``: report token ids in ``Tokens.ids``.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Path | str],
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        record_ids: bool = True,
        *,
        exits: Mapping[str, Sequence[int]] | None = None,
        is_pageable: bool = False,
    ) -> None:
        self.device = _device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
            keep_freed_memory()
        chosen = exits or {}
        infos = {
            name: inspect_checkpoint(checkpoint_path(folder), dtype, name=name, exits=chosen.get(name))
            for name, folder in checkpoints.items()
        }
        _require_one_vocabulary(infos)
        self.hosts = {
            name: HostModel(info, is_pinned=self.device.type == "cuda" and not is_pageable)
            for name, info in infos.items()
        }
        self.specs: dict[str, ModelSpec] = {name: info.spec for name, info in infos.items()}
        self.vocab = min(info.vocab for info in infos.values())
        self.record_ids = record_ids
        self.placement: Placement | None = None
        self.outputs: dict[RequestId, list[int]] = {}
        self.work = 0
        """Tokens x layers run since the last reset, loads apart."""
        self._sequences: dict[RequestId, _Sequence] = {}
        self._resident: Resident | None = None
        self._kv: PagedKV | None = None
        self._fetch: Incoming | None = None
        self._arrival: Incoming | None = None
        self._gaps = Gaps()

    # --- the protocol -----------------------------------------------------------------------------------------------

    def accept(self, arrival: Arrival) -> None:
        """Take the content of a request. One longer than the context window is the server's to refuse, not ours."""
        request, content = arrival.request, arrival.content
        where = f"request {request.id}"
        if content.prompt_ids is None:
            raise InputError(f"{where}: prompt_ids", None, "a live engine needs token ids", "Use a workload with text.")
        if not content.prompt_ids or len(content.prompt_ids) != request.prompt_tokens:
            problem = f"prompt_tokens says {request.prompt_tokens}"
            raise InputError(f"{where}: prompt_ids", len(content.prompt_ids), problem, "Make them agree.")
        for i in content.prompt_ids:
            if not 0 <= i < self.vocab:
                remedy = "Encode the text with the checkpoints' own tokenizer."
                raise InputError(f"{where}: prompt_ids", i, f"not in a vocabulary of {self.vocab}", remedy)
        if content.output_tokens is not None and content.output_tokens < 1:
            raise InputError(f"{where}: output_tokens", content.output_tokens, "must be at least 1", "Ask for a token.")
        self._sequences[request.id] = _Sequence(request, list(content.prompt_ids), content.output_tokens)

    def perform(self, action: Run | Load) -> Outcome:
        """Do the action; ``Outcome.seconds`` is the wall time it took."""
        began = time.perf_counter()
        with torch.inference_mode():
            if isinstance(action, Load):
                tokens, layers_run = self._load(action), 0
            else:
                tokens, layers_run = self._run(action)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        seconds = tick(time.perf_counter() - began)
        return Outcome(
            seconds, tokens, layers_run, arrives_s=self._arrives_s(action), stalled_s=self._stalled_s(action)
        )

    def _arrives_s(self, action: Run | Load) -> float | None:
        """Minus the seconds since the weights fetched in the background were there; None: they are not, or nobody asked
        for them.
        """
        fetch = self._fetch
        if fetch is None or fetch.done_at is None:
            return None
        if isinstance(action, Load) and action.part == "finish":
            self._fetch = None
        return min(0.0, tick(fetch.done_at - time.perf_counter()))

    def _stalled_s(self, action: Run | Load) -> float:
        """Seconds that a run waited for layers to arrive; behind it all of them are there."""
        arrival, self._arrival = self._arrival, None if isinstance(action, Run) else self._arrival
        return 0.0 if arrival is None or isinstance(action, Load) else tick(arrival.stalled_s)

    def forget(self, request_id: RequestId) -> None:
        """Drop a request, with its KV and its ids."""
        self._sequences.pop(request_id, None)
        self._release((request_id,))

    def reset(self) -> None:
        """Hold nothing: no weights, no KV, no requests, no outputs. The next run starts as on an empty device."""
        self._clear()
        self._sequences.clear()
        self.outputs.clear()
        self.work = 0

    # --- what it holds ----------------------------------------------------------------------------------------------

    def generated(self, request_id: RequestId) -> list[int]:
        """Ids generated for a request so far, or in all if it has ended and its output was not taken."""
        if request_id in self.outputs:
            return list(self.outputs[request_id])
        return self._sequences[request_id].generated

    def take_outputs(self) -> dict[RequestId, list[int]]:
        """Ids of the requests that ended since the last call."""
        taken, self.outputs = self.outputs, {}
        return taken

    def books(self) -> dict[str, int]:
        """Bytes and blocks really held on the device, work buffers apart."""
        kv = self._kv
        blocks = kv.total_blocks if kv is not None else 0
        kv_bytes = kv.nbytes if kv is not None else 0
        used = kv.used_blocks if kv is not None else 0
        block_bytes = kv_bytes // blocks if blocks else 0
        return {
            "weights_bytes": self._resident.nbytes if self._resident is not None else 0,
            "kv_bytes": kv_bytes,
            "kv_blocks": blocks,
            "kv_used_blocks": used,
            "kv_used_bytes": used * block_bytes,
            "block_bytes": block_bytes,
        }

    # --- loading ----------------------------------------------------------------------------------------------------

    def _load(self, action: Load) -> Tokens:
        """Change the placement. What cannot work is refused before anything is given up."""
        host = self._host(action.placement)
        self._require_extendable(action)
        self._release(action.evicted)
        self._hold(action)
        if action.part in ("begin", "drop"):
            self._fetch_in_background(host, action)
            return Tokens()
        if action.part == "whole":
            self._forget_fetch()
        try:
            if self._fetch is not None:
                self._fetch.wait()
            if action.kept:
                self._extend(host, action)
            else:
                self._replace(host, action)
        except RuntimeError as error:
            self._clear()
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            need = host.info.spec.weights_bytes(action.placement.depth)
            block = host.info.spec.block_bytes(action.placement.depth, action.stores_hidden)
            problem = f"the device is too small for {action.placement}: {need:,} B of weights, {block:,} B per block"
            raise MemoryBudgetError(
                "load.kv_blocks", action.kv_blocks, problem, "Lower the memory budget; nothing is loaded now."
            ) from error
        self.placement = action.placement
        return Tokens()

    def _fetch_in_background(self, host: HostModel, action: Load) -> None:
        """Begin, or give up, a transfer beside what is resident, whose KV storage shrinks or grows for it."""
        resident, kv = self._held()
        self._forget_fetch()
        kv.compact(action.kv_blocks)
        if action.part == "begin":
            present = resident.depth if resident.host is host else 0
            self._fetch = Incoming(host, present, action.placement.depth, self.device, host.dtype)

    def _forget_fetch(self) -> None:
        if self._fetch is not None:
            self._fetch.cancel()
            self._fetch = None

    def _arriving(self, host: HostModel, present: int, action: Load) -> Incoming | None:
        """What brings the weights of a load: a transfer that is done, one whose layers may be waited for later, or None
        (they are copied now).
        """
        if self._fetch is not None:
            return self._fetch
        if not action.is_pipelined:
            return None
        self._arrival = Incoming(host, present, action.placement.depth, self.device, host.dtype)
        return self._arrival

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
        self._kv, self._gaps = None, Gaps()
        if self._resident is None or self._resident.host is not host:
            self._resident = None  # freed before the other model comes
            arrival = self._arriving(host, 0, action)
            self._resident = Resident(host, self.device, host.dtype, arrival)
        else:
            self._resident.drop(depth)
            present = self._resident.depth
            arrival = self._arriving(host, present, action) if present < depth else None
        if arrival is not None:
            self._resident.adopt(arrival)
        else:
            self._resident.deepen(depth)
        if arrival is not None and arrival is self._fetch:
            self._resident.settle()
        hidden = host.info.hidden if action.stores_hidden and depth < host.info.spec.layers else None
        self._kv = PagedKV(action.kv_blocks, depth, host.kv_shape, self.device, host.dtype, hidden=hidden)

    def _extend(self, host: HostModel, action: Load) -> None:
        """Deepen the placement under the kept requests: run the new layers over their stored hidden states."""
        resident, kv = self._held()
        depth, old_depth = action.placement.depth, resident.depth
        kept = dict(action.kept)
        self._release([request for request in kv.tables if request not in kept])
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
        resident, kv = self._held()
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
        if self._kv is None or self._kv.hidden is None:
            remedy = "Make the earlier placement with stores_hidden."
            raise InputError("load.kept", str(old), "it stored no hidden states to extend", remedy)
        if self._gaps.done or self._gaps.visible is not None:
            remedy = "Use skipped_kv propagate or copy on placements that are extended."
            raise InputError("load.kept", str(old), "tokens lack the KV of resident layers", remedy)

    def _host(self, placement: Placement) -> HostModel:
        """The model a placement names; raises unless its depth is one tokens can leave at."""
        host = self.hosts.get(placement.model)
        if host is None:
            raise UnknownNameError("placement.model", placement.model, self.hosts)
        host.require_exit(placement.depth)
        return host

    def _held(self) -> tuple[Resident, PagedKV]:
        assert self._resident is not None, "nothing is loaded"
        assert self._kv is not None, "no KV is allocated"
        return self._resident, self._kv

    def _release(self, requests: Sequence[RequestId]) -> None:
        if self._kv is not None:
            for request in requests:
                self._kv.release(request)
                self._gaps.forget(request)

    def _clear(self) -> None:
        """Hold nothing: the state after a load that failed halfway."""
        self._forget_fetch()
        self.placement = self._resident = self._kv = self._arrival = None
        self._gaps = Gaps()

    # --- running ----------------------------------------------------------------------------------------------------

    def _run(self, action: Run) -> tuple[Tokens, int]:
        assert action.placement == self.placement, f"{action.placement} wanted, {self.placement} resident"
        resident, kv = self._held()
        self._release(action.evicted)
        batch = action.batch
        rows, ids = self._rows(batch, kv)
        rule = action.exits
        if rule.kind == "threshold" or self._gaps.done or self._gaps.visible is not None:
            requests, emits = batch.requests, batch.emits
            walk = Walk(resident, kv, self._gaps, rule, requests, rows, ids, emits, _is_decoding(batch))
            left, layers_run = walk.go()
            self.work += walk.work
            return self._settle(batch, left), layers_run
        run = Pass(rows, kv.shape, self.device, kv.dtype, ids=ids, emits=batch.emits)
        resident.family.begin(run)
        h = resident.family.embed(resident.base, run.ids, run.positions)
        depth = resident.depth
        self.work += run.tokens * depth
        for i in range(depth):
            h = resident.family.layer(resident.layers[i], h, run, kv.layers[i])
        if kv.hidden is not None:
            kv.hidden.index_copy_(0, run.slots, h)
        if run.ends is not None:
            h = h.index_select(0, run.ends)
        emitted = sum(batch.emits)
        logprobs, tokens = read(resident.logits(h, depth)) if emitted else ([], [])
        return self._settle(batch, Left(tokens, logprobs, [depth] * emitted)), depth

    def _rows(self, batch: Batch, kv: PagedKV) -> tuple[list[Row], list[list[int]]]:
        """Take the blocks of a batch; its rows, and the ids of their new tokens."""
        rows, ids = [], []
        most = self._held()[0].host.info.positions
        for request, start, count, is_emitting in zip(
            batch.requests, batch.starts, batch.counts, batch.emits, strict=True
        ):
            known = self._sequences[request].known
            assert start + count <= len(known), f"request {request} has {len(known)} tokens, not {start + count}"
            assert start + count <= most, f"request {request} outgrows the context window"
            assert is_emitting == (start + count == len(known)), f"request {request} emits where its text ends"
            rows.append(Row(kv.take(request, start + count), start, count))
            ids.append(known[start : start + count])
        return rows, ids

    def _settle(self, batch: Batch, left: Left) -> Tokens:
        """Append the tokens to their requests, and forget the requests that end with them."""
        requests = tuple(r for r, is_emitting in zip(batch.requests, batch.emits, strict=True) if is_emitting)
        lasts = tuple(self._append(request, token) for request, token in zip(requests, left.ids, strict=True))
        return Tokens(
            requests=requests,
            exit_layers=tuple(left.exit_layers),
            confidences=tuple(math.exp(logprob) for logprob in left.logprobs),
            logprobs=tuple(left.logprobs),
            lasts=lasts,
            ids=tuple(left.ids) if self.record_ids else None,
        )

    def _append(self, request: RequestId, token: int) -> bool:
        """Add a token; True, and the request is gone, if it was the last."""
        assert self.placement is not None
        sequence = self._sequences[request]
        sequence.known.append(token)
        length = len(sequence.known) - sequence.request.prompt_tokens
        if sequence.output_tokens is not None:
            is_last = length >= sequence.output_tokens
        else:
            is_eos = token in self.hosts[self.placement.model].info.eos_ids
            is_last = is_eos or length >= sequence.request.max_tokens
        if is_last:
            self.outputs[request] = sequence.generated
            self.forget(request)
        return is_last


def _is_decoding(batch: Batch) -> bool:
    """Whether every row only makes its next token: no row needs layers completed for tokens nobody reads."""
    return all(batch.emits) and all(start > 0 for start in batch.starts) and all(count == 1 for count in batch.counts)


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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError("device", name, "unknown device", "Use cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError("device", name, "unsupported device", "Use cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device", name, "no such device on this machine", "Use cpu.")
    return device


def _require_one_vocabulary(infos: Mapping[str, CheckpointInfo]) -> None:
    if not infos:
        raise InputError("checkpoints", {}, "no checkpoint given", "Name at least one.")
    first_name, first = next(iter(infos.items()))
    for name, info in infos.items():
        if info.spec.vocabulary != first.spec.vocabulary:
            problem = f"does not share the vocabulary of {first_name}"
            raise InputError(f"checkpoints: {name}", info.spec.vocabulary, problem, "Serve models with one tokenizer.")
