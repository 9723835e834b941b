"""From rows to what a profile keeps of them (``heliosim.formats.hardware_facts``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from heliosim.costs import StepCost, StepShape
from heliosim.formats.hardware_facts import (
    BatchCheck,
    BlockCheck,
    ByteCheck,
    Drift,
    EnergyWindow,
    GraphFacts,
    HardwareFacts,
    LayerFit,
    LayerLoad,
    Line,
    Link,
    ModelHardware,
    Quantity,
    RegionScore,
)
from heliosim.formats.profile import Energy, LoadFit, MemoryFacts, ModelFacts, ModelPower
from heliosim.types import BLOCK_TOKENS, ModelSpec, blocks_for

from .cell import Row, of_kind
from .drift import TOLERANCE
from .fit import fit_layer, held_out, line, named, scores, usable
from .grid import CHECKS, FILLS, LAYER_KINDS, SOURCES
from .passes import shape_of
from .run import Measured, missing

LINES = {"embedding": "tokens", "final_norm": "rows", "head": "rows", "exit_head": "rows"}
HOST_LINES = {"host_step": "rows", "host_prepare": "rows", "ingress": "tokens", "detokenise": "rows"}


def hardware_facts(
    measured: Measured,
    specs: Mapping[str, ModelSpec],
    costs: Mapping[str, StepCost],
    *,
    mode: Literal["quick", "full"],
    clock: Literal["cpu", "wall"],
    budget_s: float | None,
) -> HardwareFacts:
    """Facts of all models. ``costs``: of whole steps, to hold the parts against."""
    rows = measured.rows
    idle = [r for r in of_kind(rows, "energy") if r.cell.where["phase"] == "idle"]
    decision = of_kind(rows, "decision")
    return HardwareFacts(
        mode=mode,
        clock=clock,
        budget_s=budget_s,
        spent_s=round(measured.spent_s, 3),
        cells=sum(r.is_measured for r in rows),
        skipped=len(measured.skipped),
        saved=measured.saved,
        decision=_quantity(decision[0]) if decision else None,
        links={source: link for source in SOURCES if (link := _link(rows, source)) is not None},  # type: ignore[misc]
        idle_w=_quantity(idle[0]) if idle else None,
        drift=_drift(measured, is_gpu=clock == "wall"),
        unavailable=missing(measured),
        sensors=tuple(dict(s) for s in measured.sensors),
        models={
            name: model_facts(rows, spec, costs.get(name), measured.ended.get(name, {})) for name, spec in specs.items()
        },
    )


def model_facts(rows: Sequence[Row], spec: ModelSpec, cost: StepCost | None, ended: Mapping[str, str]) -> ModelHardware:
    mine = [r for r in rows if r.cell.model == spec.name]
    parts = {kind: _line(of_kind(mine, kind), unit) for kind, unit in LINES.items()}
    for kind, methods in (("sampler", ("greedy", "top-p")), ("check", CHECKS)):
        parts |= {f"{kind}:{m}": _line(_with(mine, kind, "method", m), "rows") for m in methods}
    fills = {m: _fill_line(_with(mine, "kv_fill", "method", m)) for m in FILLS}
    host = {kind: _line(of_kind(mine, kind), unit) for kind, unit in HOST_LINES.items()}
    return ModelHardware(
        layer=_layer(mine, parts, host, cost, spec, ended),
        parts=_known(parts),
        kv_fill=_known(fills),
        host=_known(host),
        bytes=_bytes(mine),
        largest_batch=tuple(
            BatchCheck(
                depth=r.cell.number("depth"),
                context_tokens=r.cell.number("context"),
                budget_bytes=r.cell.number("budget_bytes"),
                rows=int(r.value),
                formula_rows=int(r.facts["formula_rows"]),
                limit=str(r.facts["limit"]),
            )
            for r in of_kind(mine, "largest_batch")
        ),
        kv_blocks=tuple(
            BlockCheck(
                depth=r.cell.number("depth"),
                budget_bytes=r.cell.number("budget_bytes"),
                engine_blocks=int(r.value),
                pool_blocks=int(r.facts["pool_blocks"]),
            )
            for r in of_kind(mine, "kv_blocks")
        ),
        graphs=tuple(_graph(r) for r in of_kind(mine, "graph")),
        layer_loads=tuple(
            LayerLoad(
                layers=r.cell.number("layers"),
                source=r.cell.where["source"],
                bytes=int(r.facts["bytes"]),
                seconds=_quantity(r),
            )
            for r in sorted(
                of_kind(mine, "layer_load"), key=lambda r: (r.cell.where["source"] == "disk", r.cell.number("layers"))
            )
        ),
        energy=tuple(_energy(r) for r in of_kind(mine, "energy") if r.cell.where["phase"] != "idle"),
    )


def load_facts(fit: LoadFit, facts: HardwareFacts) -> LoadFit:
    """A model's load costs with what links say of other sources, and of decoding beside transfers."""
    per_byte = dict(fit.seconds_per_byte)
    sources: tuple[tuple[Literal["pageable", "disk"], str], ...] = (("pageable", "pageable"), ("disk", "disk-cold"))
    for name, source in sources:
        link = facts.links.get(source)  # type: ignore[call-overload]
        if link is not None and link.alone.value > 0:
            per_byte[name] = 1.0 / link.alone.value
    usual = facts.links.get("pinned") or facts.links.get("pageable")
    slowdown = None if usual is None or usual.decode_slowdown is None else max(1.0, usual.decode_slowdown)
    return fit.model_copy(update={"seconds_per_byte": per_byte, "step_slowdown": slowdown})


def memory_facts(measured: Measured, specs: Mapping[str, ModelSpec]) -> dict[str, MemoryFacts]:
    """What an engine needs beside weights and KV, by model, from activations, workspace and graphs that were measured.

    On a CPU nothing is made of them: its budget is one of weights and KV, and scratch memory lies outside it.
    """
    found = {}
    for name in specs:
        mine = [r for r in measured.rows if r.cell.model == name]
        each = {kind: max((r.value for r in of_kind(mine, kind)), default=0.0) for kind in ("activations", "workspace")}
        fixed = max((float(r.facts["fixed_bytes"]) for r in of_kind(mine, "activations")), default=0.0)
        graphs = sum(int(r.facts["memory_bytes"]) for r in of_kind(mine, "graph"))
        found[name] = MemoryFacts(
            activation_bytes_per_token=math.ceil(each["activations"]),
            workspace_bytes=math.ceil(each["workspace"] + fixed),
            graph_bytes=graphs,
            sources=dict.fromkeys(("activation_bytes_per_token", "workspace_bytes", "graph_bytes"), "measured"),
        )
    return found


def energy_facts(energy: Energy, facts: HardwareFacts) -> Energy:
    """What the meter said, with the power of single phases where windows of them were measured."""
    powers = {name: {w.phase: w.mean_w for w in model.energy} for name, model in facts.models.items()}
    known = {name: watts for name, watts in powers.items() if "decode" in watts}
    if not known or energy.source == "unavailable":
        return energy
    idle = energy.idle_w if facts.idle_w is None else round(facts.idle_w.value, 3)
    loads = [watts["load"] for watts in known.values() if "load" in watts]
    models = {
        name: ModelPower(decode_w=round(watts["decode"], 3), prefill_w=_rounded(watts.get("prefill")))
        for name, watts in known.items()
    }
    load_w = round(float(np.mean(loads)), 3) if loads else None
    return energy.model_copy(update={"idle_w": idle, "load_w": load_w, "models": models})


def _rounded(watts: float | None) -> float | None:
    return None if watts is None else round(watts, 3)


def with_hardware(model: ModelFacts, facts: HardwareFacts, memory: MemoryFacts | None) -> ModelFacts:
    """A model's facts with what its cells say of loads and memory."""
    load = {clock: load_facts(fit, facts) for clock, fit in model.load.items()}
    return model.model_copy(update={"load": load, "memory": memory or model.memory})


# --- parts -----------------------------------------------------------------------------------------------------------


def _quantity(row: Row) -> Quantity:
    return Quantity(value=row.value, spread=round(row.spread, 6), repeats=len(row.values))


def _known(lines: Mapping[str, Line | None]) -> dict[str, Line]:
    return {name: one for name, one in lines.items() if one is not None}


def _with(rows: Iterable[Row], kind: str, name: str, value: str) -> list[Row]:
    return [r for r in rows if r.cell.kind == kind and r.is_measured and r.cell.where.get(name) == value]


def _line(rows: Sequence[Row], unit: str) -> Line | None:
    """Through the medians of cells against what they count."""
    if not rows:
        return None
    fixed, per_unit = line([(float(r.cell.number(unit)), max(0.0, r.value)) for r in rows])
    spread = float(np.median([r.spread for r in rows]))
    return Line(fixed_s=fixed, per_unit_s=per_unit, unit=unit.rstrip("s"), cells=len(rows), spread=round(spread, 6))


def _fill_line(rows: Sequence[Row]) -> Line | None:
    """Cells hold seconds per token of one layer; the line is of one layer's tokens together."""
    if not rows:
        return None
    points = [(float(r.cell.number("tokens")), max(0.0, r.value * r.cell.number("tokens"))) for r in rows]
    spread = round(float(np.median([r.spread for r in rows])), 6)
    if not any(s for _, s in points):
        return Line(fixed_s=0.0, per_unit_s=0.0, unit="token", cells=len(rows), spread=0.0)
    fixed, per_unit = line(points)
    return Line(fixed_s=fixed, per_unit_s=per_unit, unit="token", cells=len(rows), spread=spread)


def _bytes(rows: Sequence[Row]) -> dict[str, ByteCheck]:
    found = {}
    for row in [*of_kind(rows, "bytes"), *of_kind(rows, "activations"), *of_kind(rows, "workspace")]:
        name = {"bytes": row.cell.where.get("part"), "activations": "activations per token"}.get(row.cell.kind)
        formula = row.facts.get("formula_bytes")
        found[str(name or row.cell.kind)] = ByteCheck(
            measured_bytes=row.value, formula_bytes=None if formula is None else float(formula)
        )
    return found


def _graph(row: Row) -> GraphFacts:
    return GraphFacts(
        rows=row.cell.number("rows"),
        layers=int(row.facts["layers"]),
        replay=_quantity(row),
        eager_s=float(row.facts["eager_s"]),
        capture_s=float(row.facts["capture_s"]),
        memory_bytes=int(row.facts["memory_bytes"]),
    )


def _energy(row: Row) -> EnergyWindow:
    f = row.facts
    return EnergyWindow(
        phase=str(row.cell.where["phase"]),
        per_call_j=_quantity(row),
        call_s=float(f["call_s"]),
        mean_w=float(f["mean_w"]),
        window_s=float(f["window_s"]),
    )


def _link(rows: Sequence[Row], source: str) -> Link | None:
    mine = {r.cell.where["beside"]: r for r in of_kind(rows, "link") if r.cell.where["source"] == source}
    alone, beside = mine.get("nothing"), mine.get("decode")
    if alone is None:
        return None
    more: dict[str, Any] = {}
    if beside is not None:
        more = {
            "beside_decode": _quantity(beside),
            "decode_slowdown": float(beside.facts["decode_slowdown"]),
            "transfer_slowdown": float(beside.facts["alone_over_beside"]),
        }
    return Link(alone=_quantity(alone), **more)


def _drift(measured: Measured, *, is_gpu: bool) -> Drift | None:
    seen = measured.references
    if not seen:
        return None
    return Drift(
        tolerance=TOLERANCE[is_gpu],
        readings=len(seen),
        low=float(min(seen)),
        high=float(max(seen)),
        rejected=measured.rejected,
        unsteady=measured.unsteady,
    )


# --- the layer, and the cross-check ----------------------------------------------------------------------------------


def _layer(
    rows: Sequence[Row],
    parts: Mapping[str, Line | None],
    host: Mapping[str, Line | None],
    cost: StepCost | None,
    spec: ModelSpec,
    ended: Mapping[str, str],
) -> LayerFit | None:
    layers = usable([r for r in rows if r.cell.kind in LAYER_KINDS])
    if len(layers) < 2:
        return None
    scored = scores(held_out(layers))
    return LayerFit(
        seconds_per=dict(named(fit_layer(layers))),
        cells=len(layers),
        holdout={
            region: RegionScore(
                cells=s.cells, median_abs_error=s.median_abs, p90_abs_error=s.p90_abs, noise=round(s.noise, 6)
            )
            for region, s in scored.items()
        },
        ended=dict(ended),
        against_steps={} if cost is None else _against_steps(layers, parts, host, cost, spec),
    )


def _against_steps(
    layers: Sequence[Row],
    parts: Mapping[str, Line | None],
    host: Mapping[str, Line | None],
    cost: StepCost,
    spec: ModelSpec,
) -> dict[str, float]:
    """By region: the median of parts added up over the price of a whole step of that shape at full depth, less 1; only
    shapes that the step costs cover.
    """
    ratios: dict[str, list[float]] = {}
    for row in layers:
        shape = step_shape(row, spec)
        if shape.rows > cost.max_rows or shape.longest > cost.max_context or shape.tokens > cost.max_tokens:
            continue
        emitting = shape.checked_rows
        beside = sum(_at(parts.get(kind), emitting) for kind in ("final_norm", "head", "check:max-prob"))
        beside += _at(parts.get("embedding"), shape.tokens)
        beside += sum(_at(host.get(kind), shape.rows) for kind in ("host_step", "host_prepare"))
        whole = cost.seconds(shape)
        if whole > 0:
            ratios.setdefault(row.cell.region, []).append((spec.layers * row.value + beside) / whole - 1.0)
    return {region: float(np.median(some)) for region, some in sorted(ratios.items())}


def _at(known: Line | None, count: int) -> float:
    return 0.0 if known is None else known.fixed_s + known.per_unit_s * count


def step_shape(row: Row, spec: ModelSpec) -> StepShape:
    """The whole step at full depth of which a layer cell is one layer."""
    s = shape_of(row.cell)
    rows = s.decode + (1 if s.count else 0)
    return StepShape(
        rows=rows,
        tokens=s.tokens,
        decode_rows=s.decode,
        gathered=s.decode * blocks_for(s.context) * BLOCK_TOKENS if s.decode else 0,
        prefill_rows=1 if s.count else 0,
        prefill_products=s.count * (s.prefix + s.count),
        layers=spec.layers,
        checks=1,
        checked_rows=rows,
        filled_layers=0,
        started=1 if s.count and not s.prefix else 0,
        ended=0,
        longest=max(s.context, s.prefix + s.count),
        context=s.decode * s.context,
    )
