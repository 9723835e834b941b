"""Measures all cells of all models: cheap facts first, then layers where they are known worst, within a budget, checked
against drift, each on disk as soon as it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from heliosim.types import ModelSpec, Seconds, blocks_for

from ..energy import Meter
from . import grid
from .adaptive import Chooser
from .bench import Bench
from .cell import Cell, Row, of_kind, row_of
from .drift import MOST_TRIES, Reference, Sensors, sensors
from .grid import Extent
from .host import (
    measure_decision,
    measure_detokenise,
    measure_host_step,
    measure_ingress,
    measure_kv_blocks,
    measure_prepare,
)
from .journal import Journal
from .links import measure_layer_load, measure_link
from .memory import (
    measure_activations,
    measure_bytes,
    measure_graph,
    measure_largest_batch,
    measure_workspace,
)
from .passes import measure_layer, measure_part
from .power import measure_energy

Progress = Callable[[str, float], None]
REQUESTS = 30
"""Requests taken in, and tokens turned to text, for each cell of those kinds."""


@dataclass(frozen=True)
class Target:
    """A model to measure, and where its tokenizer is."""

    spec: ModelSpec
    host: Any
    tokenizer: Path | None


@dataclass(frozen=True)
class Setting:
    """What all cells share. ``budget_s``: seconds for all of them; None: no end. ``budgets``: memory budgets to find
    largest batches in, bytes. ``kernels``: whether to measure single kernels; ``kernels_first``: before layers, as a
    device file is wanted.
    """

    device: torch.device
    extent: Extent
    budget_s: Seconds | None
    budgets: Sequence[int]
    text: Sequence[int]
    texts: Sequence[str]
    meter: Meter | None = None
    no_meter: str = ""
    kernels: bool = False
    kernels_first: bool = False
    estimate: Callable[[Cell], Seconds] = lambda _cell: 0.0


@dataclass
class Measured:
    """``rows``: all that was measured or cannot be. ``skipped``: cells the budget had no time for. ``ended``: by model,
    regions that needed no more cells, and why, with ``saved`` cells.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: list[Cell] = field(default_factory=list)
    ended: dict[str, dict[str, str]] = field(default_factory=dict)
    saved: int = 0
    rejected: int = 0
    unsteady: int = 0
    references: list[float] = field(default_factory=list)
    sensors: list[Sensors] = field(default_factory=list)
    spent_s: Seconds = 0.0


class HardwareRun:
    """One hardware calibration; ``go`` does it."""

    def __init__(
        self, targets: Sequence[Target], engine: Any, setting: Setting, journal: Journal, progress: Progress
    ) -> None:
        self.targets, self.engine, self.setting = targets, engine, setting
        self.journal, self.progress = journal, progress
        self.found = Measured()
        self._known = {row.cell.key: row for row in (row_of(v) for v in journal.named("cell:"))}
        self.found.spent_s = sum(float(v["took_s"]) for v in journal.named("cell:"))
        self._reference: Reference | None = None
        self._pending: list[tuple[Cell, Row, Callable[[], Row], float]] = []
        self._limit_s: Seconds | None = None
        self._learn: Callable[[Cell, Row], None] = lambda _cell, _row: None

    def go(self) -> Measured:
        """Measure; KeyboardInterrupt leaves the journal with everything that counts so far."""
        setting = self.setting
        self.found.sensors.append(sensors(str(setting.device)))
        with torch.inference_mode():
            for k, target in enumerate(self.targets):
                self._limit_s = self._share(len(self.targets) - k)
                self._by_engine(target)
                self.engine.reset()
                self._by_bench(target, first=k == 0)
                self._by_allocation(target)
        self.found.sensors.append(sensors(str(setting.device)))
        return self.found

    def _share(self, models: int) -> Seconds | None:
        """Up to where the next of ``models`` models may use the budget: an even share of what is left."""
        budget = self.setting.budget_s
        return None if budget is None else self.found.spent_s + max(0.0, budget - self.found.spent_s) / models

    # --- parts -------------------------------------------------------------------------------------------------------

    def _by_engine(self, target: Target) -> None:
        """Cells that need the whole serving engine."""
        spec, s = target.spec, self.setting
        for cell in grid.host_cells(spec, s.extent):
            if cell.kind == "host_step":
                self._now(cell, lambda c: measure_host_step(self.engine, spec, c, s.text))
            elif cell.kind == "ingress":
                self._now(cell, lambda c: measure_ingress(self.engine, spec, c, s.texts, target.tokenizer, REQUESTS))
            elif cell.kind == "detokenise":
                self._now(cell, lambda c: measure_detokenise(c, s.text, target.tokenizer, REQUESTS))
        for cell in grid.fact_cells(spec, s.extent, s.budgets):
            if cell.kind == "kv_blocks":
                self._now(cell, lambda c: measure_kv_blocks(self.engine, spec, c))

    def _by_bench(self, target: Target, *, first: bool) -> None:
        """Cells of parts of a step, on weights and KV of their own."""
        spec, extent = target.spec, self.setting.extent
        layers = grid.layer_cells(spec, extent)
        singles = [*self._facts(target, first=first), *grid.part_cells(spec, extent)]
        energy = grid.energy_cells(spec) if self._has_energy else []
        kernels = self._kernel_cells() if first and self.setting.kernels else []
        wanted = [*singles, *(c for some in layers.values() for c in some), *energy, *kernels]
        if all(cell.key in self._known for cell in wanted):
            for cell in wanted:
                self.found.rows.append(self._known[cell.key])
            return
        bench = self._bench(target)
        self._reference = Reference(bench)
        self._reference.read()
        for cell in singles:
            self._measure(cell, lambda c: self._single(bench, c))
        self._settle()
        if self.setting.kernels_first:
            self._kernels(bench, kernels)
        self._layers(bench, layers)
        for cell in energy:
            self._now(cell, lambda c: self._energy(bench, c))
        if not self.setting.kernels_first:
            self._kernels(bench, kernels)
        self.found.references += [r / self._reference.usual_s for r in self._reference.readings]
        self._reference = None

    def _kernels(self, bench: Bench, cells: Sequence[Cell]) -> None:
        from .kernels import measure_kernel

        for cell in cells:
            self._measure(cell, lambda c: measure_kernel(bench, c, self.setting.extent))
        self._settle()

    def _by_allocation(self, target: Target) -> None:
        """Cells that fill the device's memory; nothing else is on it then."""
        spec, s = target.spec, self.setting
        for cell in grid.fact_cells(spec, s.extent, s.budgets):
            if cell.kind == "largest_batch":
                self._now(cell, lambda c: measure_largest_batch(target.host, spec, s.device, c))

    def _facts(self, target: Target, *, first: bool) -> list[Cell]:
        extent = self.setting.extent
        own = [
            c
            for c in grid.fact_cells(target.spec, extent, self.setting.budgets)
            if c.kind not in ("kv_blocks", "largest_batch")
        ]
        prepare = [c for c in grid.host_cells(target.spec, extent) if c.kind == "host_prepare"]
        return [*(grid.machine_cells(extent) if first else []), *own, *prepare]

    @property
    def _has_energy(self) -> bool:
        """Windows of energy take long: a quick calibration has none where there is a meter, and says why where not."""
        return self.setting.extent.is_full or self.setting.meter is None

    def _kernel_cells(self) -> list[Cell]:
        from .kernels import kernel_cells

        return kernel_cells(self.setting.extent, str(self.setting.device))

    def _bench(self, target: Target) -> Bench:
        e = self.setting.extent
        context = min(e.max_context, target.spec.max_context)
        rows = e.max_rows + 1
        return Bench(target.host, target.spec, self.setting.device, most_blocks=rows * (blocks_for(context) + 1))

    def _single(self, bench: Bench, cell: Cell) -> Row:
        """A cell by its kind."""
        extent = self.setting.extent
        by_kind: dict[str, Callable[[], Row]] = {
            "bytes": lambda: measure_bytes(bench, cell),
            "activations": lambda: measure_activations(bench, cell, extent.max_tokens),
            "workspace": lambda: measure_workspace(bench, cell),
            "graph": lambda: measure_graph(bench, cell, extent.max_context),
            "layer_load": lambda: measure_layer_load(bench, cell),
            "link": lambda: measure_link(bench, cell, extent),
            "decision": lambda: measure_decision(bench, cell, extent),
            "host_prepare": lambda: measure_prepare(bench, cell, extent),
        }
        return by_kind[cell.kind]() if cell.kind in by_kind else measure_part(bench, cell, extent)

    def _layers(self, bench: Bench, cells: dict[str, list[Cell]]) -> None:
        chooser = Chooser(cells)
        for some in cells.values():
            for cell in some:
                if cell.key in self._known:
                    chooser.learn(cell, self._known[cell.key])
                    self.found.rows.append(self._known[cell.key])
        self._learn = chooser.learn
        while (cell := chooser.next()) is not None:
            self._measure(cell, lambda c: measure_layer(bench, c, self.setting.extent))
        self._settle()
        self._learn = lambda _cell, _row: None
        self.found.ended[bench.spec.name] = dict(chooser.ended)
        self.found.saved += chooser.saved

    def _energy(self, bench: Bench, cell: Cell) -> Row:
        idle = of_kind(self.found.rows, "energy")
        watts = next((r.value for r in idle if r.cell.where["phase"] == "idle"), None)
        return measure_energy(bench, cell, self.setting.meter, self.setting.no_meter, watts)

    @property
    def _spent_s(self) -> Seconds:
        """Seconds of cells so far, those that are pending included."""
        return self.found.spent_s + sum(took for *_, took in self._pending)

    # --- one cell ----------------------------------------------------------------------------------------------------

    def _measure(self, cell: Cell, how: Callable[[Cell], Row]) -> None:
        """Measure a cell; it counts once the reference behind it is as usual."""
        if not self._may(cell):
            return
        began = time.perf_counter()
        row = how(cell)
        self._pending.append((cell, row, lambda: how(cell), time.perf_counter() - began))
        if self._reference is None or self._reference.is_due:
            self._settle()

    def _now(self, cell: Cell, how: Callable[[Cell], Row]) -> None:
        """Measure a cell that no reference can stand beside."""
        if not self._may(cell):
            return
        began = time.perf_counter()
        self._keep(cell, how(cell), time.perf_counter() - began)

    def _may(self, cell: Cell) -> bool:
        """Whether a cell is still to be measured; takes what is known, notes what the budget has no time for."""
        if cell.key in self._known:
            if self._known[cell.key] not in self.found.rows:
                self.found.rows.append(self._known[cell.key])
            return False
        limit = self._limit_s
        if limit is not None and self._spent_s + self.setting.estimate(cell) >= limit:
            self.found.skipped.append(cell)
            return False
        return True

    def _settle(self) -> None:
        """Look at the reference: keep what is pending, or measure it again."""
        tries = 1
        while self._pending:
            ratio = 1.0 if self._reference is None else self._reference.read()
            is_usual = self._reference is None or self._reference.is_usual(ratio)
            if is_usual or tries >= MOST_TRIES:
                for cell, row, _how, took in self._pending:
                    self.found.unsteady += not is_usual
                    self._keep(cell, replace(row, drift=ratio, is_steady=is_usual, tries=tries), took)
                self._pending = []
                return
            self.found.rejected += len(self._pending)
            again = []
            for cell, _row, how, took in self._pending:
                began = time.perf_counter()
                row = how()
                again.append((cell, row, how, took + time.perf_counter() - began))
            self._pending, tries = again, tries + 1

    def _keep(self, cell: Cell, row: Row, took: Seconds) -> None:
        self.found.rows.append(row)
        self.found.spent_s += took
        self.journal.add(f"cell:{cell.key}", {**row.plain(), "took_s": took})
        self._learn(cell, row)
        budget = self.setting.budget_s
        share = min(0.99, self.found.spent_s / budget) if budget else min(0.99, len(self.found.rows) / self.expected)
        self.progress(f"{cell.kind.replace('_', ' ')} {cell.model}", share)

    @property
    def expected(self) -> int:
        """Cells in all, if no region ends early."""
        return max(1, len(all_cells([t.spec for t in self.targets], self.setting)))


def all_cells(specs: Sequence[ModelSpec], setting: Setting) -> list[Cell]:
    """Every cell that a calibration may measure, in about its order."""
    extent, found = setting.extent, []
    for k, spec in enumerate(specs):
        found += grid.host_cells(spec, extent)
        found += grid.fact_cells(spec, extent, setting.budgets)
        found += grid.machine_cells(extent) if k == 0 else []
        found += grid.part_cells(spec, extent)
        found += [c for cells in grid.layer_cells(spec, extent).values() for c in cells]
        found += grid.energy_cells(spec) if extent.is_full or setting.meter is None else []
    if setting.kernels:
        from .kernels import kernel_cells

        found += kernel_cells(extent, str(setting.device))
    return found


def missing(measured: Measured) -> dict[str, str]:
    """Why kinds of cells have no value, by kind; kinds that have some are left out."""
    some = {r.cell.kind for r in measured.rows if r.is_measured}
    reasons: dict[str, str] = {}
    for row in measured.rows:
        if row.cell.kind not in some and row.reason:
            reasons.setdefault(row.cell.kind, row.reason)
    for cell in measured.skipped:
        if cell.kind not in some:
            reasons.setdefault(cell.kind, "the budget had no time for it")
    return reasons
