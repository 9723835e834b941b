"""The live engine: really loads layers, really runs them, and says how long it took.

It keeps what the server must not know (token ids, true lengths) and the KV itself, and obeys the placements, batches
and block counts it is told (loads are ``residency.py``'s). Decoding is greedy. It knows nothing of objectives, breaches
or clocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heliosim.engines.allocator import keep_freed_memory
from heliosim.engines.models.host import HostModel
from heliosim.engines.models.paged import PagedKV, Pass, Row
from heliosim.engines.models.ranks import ALONE, Ranks
from heliosim.engines.models.score import SequenceScore, score
from heliosim.engines.models.walk import Left, Walk, read
from heliosim.engines.parallel.cutting import rank_infos
from heliosim.engines.residency import Residency
from heliosim.errors import InputError
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
    ``tensor_parallel``: GPUs of this machine that share each layer, as a ``parallel.engine.ParallelEngine``; ``ranks``:
    the group of which this is one rank.
    """

    def __new__(cls, *_: Any, tensor_parallel: int = 1, **__: Any) -> TorchEngine:
        if cls is TorchEngine and tensor_parallel != 1:
            from heliosim.engines.parallel.engine import ParallelEngine

            return object.__new__(ParallelEngine)
        return object.__new__(cls)

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
        tensor_parallel: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        assert tensor_parallel == 1, "several ranks are made by __new__"
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
        if ranks.count > 1:
            infos = rank_infos(infos, ranks.rank, ranks.count)
        self.hosts = {
            name: HostModel(info, is_pinned=self.device.type == "cuda" and not is_pageable, ranks=ranks)
            for name, info in infos.items()
        }
        self.specs: dict[str, ModelSpec] = {name: info.spec for name, info in infos.items()}
        self.vocab = min(info.vocab for info in infos.values())
        self.record_ids = record_ids
        self.residency = Residency(self.hosts, self.device)
        self.outputs: dict[RequestId, list[int]] = {}
        self.work = 0
        """Tokens x layers run since the last reset, loads apart."""
        self._sequences: dict[RequestId, _Sequence] = {}

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
                self.residency.load(action)
                tokens, layers_run = Tokens(), 0
            else:
                tokens, layers_run = self._run(action)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        seconds = tick(time.perf_counter() - began)
        arrives_s, stalled_s = self.residency.arrives_s(action), self.residency.stalled_s(action)
        return Outcome(seconds, tokens, layers_run, arrives_s=arrives_s, stalled_s=stalled_s)

    def forget(self, request_id: RequestId) -> None:
        """Drop a request, with its KV and its ids."""
        self._sequences.pop(request_id, None)
        self.residency.release((request_id,))

    def reset(self) -> None:
        """Hold nothing: no weights, no KV, no requests, no outputs. The next run starts as on an empty device."""
        self.residency.clear()
        self._sequences.clear()
        self.outputs.clear()
        self.work = 0

    def score(self, model: str, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> list[SequenceScore]:
        """What exits of a model would have said at every position of texts (``models.score``)."""
        return score(self.hosts[model], sequences, layers, self.device)

    def close(self) -> None:
        """End what works for this engine elsewhere; alone, there is nothing."""

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

    @property
    def placement(self) -> Placement | None:
        """What is resident."""
        return self.residency.placement

    def books(self) -> dict[str, int]:
        """Bytes and blocks really held on the device, work buffers apart."""
        return self.residency.books()

    # --- running ----------------------------------------------------------------------------------------------------

    def _run(self, action: Run) -> tuple[Tokens, int]:
        assert action.placement == self.placement, f"{action.placement} wanted, {self.placement} resident"
        resident, kv = self.residency.held()
        self.residency.release(action.evicted)
        batch = action.batch
        rows, ids = self._rows(batch, kv)
        rule = action.exits
        if rule.kind == "threshold" or self.residency.gaps.done or self.residency.gaps.visible is not None:
            requests, emits = batch.requests, batch.emits
            walk = Walk(resident, kv, self.residency.gaps, rule, requests, rows, ids, emits, _is_decoding(batch))
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
        most = self.residency.held()[0].host.info.positions
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
