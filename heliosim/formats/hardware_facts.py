"""What a hardware calibration adds to a profile: single parts of a step, bytes, links, host work, drift.

All of it is optional (profiles of before have none) and beside the step costs that were measured in the serving loop,
which stay what a simulation charges. The raw cells are in ``hardware.parquet``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from heliosim.formats.files import Strict

Source = Literal["pinned", "pageable", "disk-warm", "disk-cold"]


class Quantity(Strict):
    """A median and how sure it is. ``spread``: relative interquartile range; ``repeats``: samples, 1 if exact."""

    value: float
    spread: float = 0.0
    repeats: int = 1


class RegionScore(Strict):
    """Relative errors on cells that the fit did not see; ``noise``: standard error of those cells' own medians."""

    cells: int
    median_abs_error: float
    p90_abs_error: float
    noise: float


class LayerFit(Strict):
    """One layer's time in its physical form: seconds per term, and its errors by region (``all``: of all cells).

    ``ended``: why a region needed no more cells. ``against_steps``: layers, head and host added up over the time that
    the costs of whole steps (measured in the loop) give, less 1, by region: median.
    """

    seconds_per: dict[str, float]
    cells: int
    holdout: dict[str, RegionScore]
    ended: dict[str, str] = Field(default_factory=dict)
    against_steps: dict[str, float] = Field(default_factory=dict)


class Line(Strict):
    """Seconds as a line through what a count costs."""

    fixed_s: float
    per_unit_s: float
    unit: str
    cells: int
    spread: float = Field(description="median over its cells of the relative interquartile range")


class ByteCheck(Strict):
    """Bytes that were measured, and what the byte model says."""

    measured_bytes: float
    formula_bytes: float | None


class BatchCheck(Strict):
    """Rows found by allocating until memory (``limit``: out of memory, or the arena's budget on a CPU) ended."""

    depth: int
    context_tokens: int
    budget_bytes: int
    rows: int
    formula_rows: int
    limit: str


class BlockCheck(Strict):
    """KV blocks that the engine really held for a placement, and those the server's pool counted on."""

    depth: int
    budget_bytes: int
    engine_blocks: int
    pool_blocks: int


class GraphFacts(Strict):
    """A decode step captured as a graph."""

    rows: int
    layers: int
    replay: Quantity
    eager_s: float
    capture_s: float
    memory_bytes: int


class LayerLoad(Strict):
    """From the decision to load layers to the first forward that has used them."""

    layers: int
    source: Literal["host", "disk"]
    bytes: int
    seconds: Quantity


class EnergyWindow(Strict):
    """Windows of energy above idle: ``per_call_j`` of one decode step, prompt or transfer, and the mean power."""

    phase: str
    per_call_j: Quantity
    call_s: float
    mean_w: float
    window_s: float


class ModelHardware(Strict):
    """Hardware facts of one model."""

    layer: LayerFit | None = None
    parts: dict[str, Line] = Field(default_factory=dict, description="embedding, final_norm, head, sampler:*, check:*")
    kv_fill: dict[str, Line] = Field(default_factory=dict, description="by method: seconds per skipped layer's tokens")
    host: dict[str, Line] = Field(default_factory=dict, description="host_step, host_prepare, ingress, detokenise")
    bytes: dict[str, ByteCheck] = Field(default_factory=dict)
    largest_batch: tuple[BatchCheck, ...] = ()
    kv_blocks: tuple[BlockCheck, ...] = ()
    graphs: tuple[GraphFacts, ...] = ()
    layer_loads: tuple[LayerLoad, ...] = ()
    energy: tuple[EnergyWindow, ...] = ()


class Link(Strict):
    """Bytes/s of one way to the device, alone and while decoding goes on, and what each does to the other: a decode
    step's time beside transfers over that alone, and the transfer's rate alone over that beside decoding.
    """

    alone: Quantity
    beside_decode: Quantity | None = None
    decode_slowdown: float | None = None
    transfer_slowdown: float | None = None


class Drift(Strict):
    """The reference cell, read all along. ``readings``; ``low`` and ``high``: extremes over its usual time; cells that
    were ``rejected`` because it was off, and those ``unsteady`` to the last.
    """

    tolerance: float
    readings: int
    low: float
    high: float
    rejected: int
    unsteady: int


class HardwareFacts(Strict):
    """Hardware facts of a profile. ``unavailable``: reasons by kind of cell; ``skipped``: cells that the budget had no
    time for; ``saved``: cells not needed because their regions were known well enough.
    """

    mode: Literal["quick", "full"]
    clock: Literal["cpu", "wall"]
    budget_s: float | None = None
    spent_s: float
    cells: int
    skipped: int = 0
    saved: int = 0
    decision: Quantity | None = Field(default=None, description="device-to-host decision: idle gap of the device, s")
    links: dict[Source, Link] = Field(default_factory=dict)
    idle_w: Quantity | None = None
    drift: Drift | None = None
    unavailable: dict[str, str] = Field(default_factory=dict)
    sensors: tuple[dict[str, float | int | str], ...] = Field(default=(), description="at the start and at the end")
    models: dict[str, ModelHardware]
