"""The rows of steps.parquet that failures leave: a step or a load that did not end, or an idle replica that stopped."""

from __future__ import annotations

from heliosim.flight import Flight
from heliosim.serving.server import Server
from heliosim.types import Bytes, Load, Seconds, StepRecord


def lost_step(server: Server, flight: Flight, done: int, kv_used: Bytes, now: Seconds) -> StepRecord:
    """The row of the step (or load) under way when a replica fails at ``now``: time and energy spent, no tokens.

    ``done``: steps of the flight that ended before; ``kv_used``: bytes of KV the step held.
    """
    start_s = flight.ends_s[done - 1] if done else flight.start_s
    if start_s == now:
        return idle_loss(server, now)
    action, stride = flight.action, flight.outcome.stride
    energy, share = flight.outcome.energy_j, (now - start_s) / (flight.ends_s[done] - start_s)
    if stride is not None:
        energy = None if stride.watts is None else stride.watts.of(stride.steps[done])
    row = idle_loss(server, start_s)._replace(
        seconds=now - start_s,
        model=action.placement.model,
        depth=action.placement.depth,
        kv_used_bytes=kv_used,
        energy_j=None if energy is None else energy * share,
    )
    if isinstance(action, Load):
        return row._replace(reason=action.reason)
    if stride is not None:
        step = stride.steps[done]
        rows, decode, prefill = step.rows, step.decode_rows, step.prefill_tokens
    else:
        rows, decode = len(action.batch), action.batch.decode_rows
        prefill = action.batch.tokens - decode
    return row._replace(rows=rows, decode_rows=decode, prefill_tokens=prefill, is_probe=action.is_probe)


def idle_loss(server: Server, now: Seconds) -> StepRecord:
    """The row of a failure between two steps: no time was lost, but from here on nothing is held."""
    placement, pool = server.placement, server.pool
    return StepRecord(
        start_s=now,
        seconds=0.0,
        kind="lost",
        reason="",
        model="" if placement is None else placement.model,
        depth=0 if placement is None else placement.depth,
        layers_run=0,
        rows=0,
        decode_rows=0,
        prefill_tokens=0,
        tokens_out=0,
        waiting=0,
        running=0,
        weights_bytes=pool.weights_bytes,
        kv_used_bytes=0,
        kv_total_bytes=pool.kv_total_bytes,
        breaches=server.controller.breaches,
        is_probe=False,
        energy_j=0.0,
    )
