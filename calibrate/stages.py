"""Stages of a calibration that can be taken up again: points and loads measured in the serving loop, hardware cells."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from heliosim.costs import StepShape
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.checkpoint import CheckpointInfo
from heliosim.streams import stream
from heliosim.types import ModelSpec, Seconds

from .energy import Meter
from .fit import fit_steps
from .hardware.journal import Journal
from .measure import LoadSample, StepSample, measure_steps
from .plan import Point, points

if TYPE_CHECKING:
    from .calibrate import Request
    from .hardware.cell import Cell
    from .hardware.estimate import Estimator
    from .hardware.grid import Extent
    from .hardware.run import Measured, Setting

Progress = Callable[[str, float], None]
Mode = Literal["full", "quick", "off"]
MODES = ("auto", "full", "quick", "off")
STEPS_SHARE = 0.5
"""Share of the budget for steps in the serving loop; hardware cells may take what is left."""
GPU_BUDGET_S = 540.0
"""Budget of each model on a GPU where none is given: below ten minutes."""
BETTER = 0.95
"""Another visit of every situation must bring the hold-out error below this share of what it was, or it is the last."""


def mode_of(asked: str, device: str) -> Mode:
    """What ``auto`` means: full on a GPU, quick on a CPU."""
    if asked not in MODES:
        raise UnknownNameError("--hardware", asked, MODES)
    if asked == "auto":
        return "full" if device.startswith("cuda") else "quick"
    return asked  # type: ignore[return-value]


def budget_of(asked: float | None, device: str, models: int) -> Seconds | None:
    """Seconds for steps and hardware cells; None: no end (the default on a CPU)."""
    if asked is None:
        return GPU_BUDGET_S * models if device.startswith("cuda") else None
    if not asked > 0:
        raise InputError("--budget", asked, "must be more than 0 seconds", "Leave it out for no end.")
    return asked


# --- steps -----------------------------------------------------------------------------------------------------------


def todo_of(request: Request, specs: Mapping[str, ModelSpec], max_context: int) -> list[tuple[ModelSpec, Point, int]]:
    """All points of all models with the number of the visit each is."""
    found: list[tuple[ModelSpec, Point, int]] = []
    for spec in specs.values():
        visits: dict[tuple[str, int, bool], int] = {}
        limits = (request.threshold, request.max_batch, request.token_budget, max_context, request.rounds)
        for point in points(spec, *limits, request.seed):
            key = (point.mode.name, point.rows, len(set(point.prompts)) == 1 and point.rows == request.max_batch)
            visit = visits.get(key, 0)
            visits[key] = visit + 1
            found.append((spec, point, visit))
    return found


def measure_all_steps(
    request: Request,
    engine: Any,
    specs: Mapping[str, ModelSpec],
    text: Sequence[int],
    pools: Mapping[str, int],
    max_context: int,
    journal: Journal,
    budget_s: Seconds | None,
    progress: Progress,
) -> list[StepSample]:
    """Points in one shuffled order: what else happens on the machine meets all models alike.

    With a budget every situation is visited once before any is visited again, and visits end when their share of the
    budget is used, or when another visit of all no longer lowers the hold-out error.
    """
    todo = todo_of(request, specs, max_context)
    order = [int(k) for k in stream(request.seed, "calibrate", "order").permutation(len(todo))]
    if budget_s is not None:
        order.sort(key=lambda k: todo[k][2])
    samples: list[StepSample] = []
    end = None if budget_s is None else time.perf_counter() + STEPS_SHARE * budget_s
    errors: list[float] = []
    for i, k in enumerate(order):
        spec, point, visit = todo[k]
        is_next = i > 0 and visit > todo[order[i - 1]][2]
        if budget_s is not None and is_next and not _goes_on(samples, specs, errors, end):
            break
        if end is not None and visit and time.perf_counter() > end:
            break
        samples += _point(engine, spec, point, text, pools[spec.name], k, i, journal)
        progress(f"steps of {spec.name}, {point.mode.name}, batch {point.rows}", i / len(order))
    return samples


def _goes_on(
    samples: Sequence[StepSample], specs: Mapping[str, ModelSpec], errors: list[float], end: Seconds | None
) -> bool:
    """Whether another visit of everything is worth it."""
    clock = "cpu" if "cpu" in samples[0].clocks else "wall"
    fits = [fit_steps([s for s in samples if s.model == name], clock).holdout for name in specs]
    scored = [f.median_abs_error for f in fits if f.cells]
    if not scored:
        return True
    errors.append(float(np.mean(scored)))
    if end is not None and time.perf_counter() > end:
        return False
    return len(errors) < 2 or errors[-1] < BETTER * errors[-2]


def _point(
    engine: Any,
    spec: ModelSpec,
    point: Point,
    text: Sequence[int],
    pool: int,
    number: int,
    visit: int,
    journal: Journal,
) -> list[StepSample]:
    name = f"steps:{number}"
    if name in journal:
        return [
            StepSample(spec.name, point.mode.name, StepShape(*shape), dict(clocks), visit)
            for shape, clocks in journal.get(name)
        ]
    made = measure_steps(engine, spec, point, text, pool, visit=visit)
    journal.add(name, [[list(s.shape), dict(s.clocks)] for s in made])
    return made


def kept_loads(journal: Journal, measure: Callable[[], list[LoadSample]]) -> list[LoadSample]:
    """Loads an earlier call measured, or those ``measure`` measures now."""
    if "loads" in journal:
        return [LoadSample(model, tuple(terms), dict(clocks)) for model, terms, clocks in journal.get("loads")]
    made = measure()
    journal.add("loads", [[s.model, list(s.terms), dict(s.clocks)] for s in made])
    return made


# --- hardware cells --------------------------------------------------------------------------------------------------


def extent_of(request: Request, mode: Mode, max_context: int) -> Extent:
    """How far cells reach: as far as steps do, so that the one can be held against the other."""
    from .hardware.grid import Extent

    is_full = mode == "full"
    return Extent(
        request.max_batch,
        max_context,
        max(request.token_budget, request.max_batch),
        is_full,
        repeats=30,
        cell_s=1.0 if is_full else 0.03,
    )


def measure_cells(
    request: Request,
    engine: Any,
    infos: Mapping[str, CheckpointInfo],
    text: Sequence[int],
    texts: Sequence[str],
    journal: Journal,
    *,
    mode: Mode,
    max_context: int,
    budgets: Sequence[int],
    budget_s: Seconds | None,
    meter: Meter | None,
    no_meter: str,
    progress: Progress,
) -> Measured:
    """All hardware cells of all models, on the engine's device and with its weights."""
    from .hardware.run import HardwareRun, Setting, Target

    extent = extent_of(request, mode, max_context)
    estimators = estimators_of(request, infos, extent, str(engine.device))
    first = next(iter(estimators.values()))
    setting = Setting(
        engine.device,
        extent,
        budget_s,
        budgets,
        text,
        texts,
        meter,
        no_meter,
        kernels=mode == "full" or request.device_out is not None,
        kernels_first=request.device_out is not None,
        estimate=lambda cell: estimators.get(cell.model, first)(cell),
    )
    targets = [Target(info.spec, engine.hosts[name], info.tokenizer_file) for name, info in infos.items()]
    return HardwareRun(targets, engine, setting, journal, progress).go()


def estimators_of(
    request: Request, infos: Mapping[str, CheckpointInfo], extent: Extent, device: str, like: str | None = None
) -> dict[str, Estimator]:
    """By model. ``like``: a shipped device to estimate for; None: the GPU at hand, if it is one of those."""
    from heliosim.hardware.architecture import open_architecture
    from heliosim.hardware.device import open_device

    from .hardware.estimate import Estimator, nominal_speed, speed_on

    named = like or (_shipped_like(device) if device.startswith("cuda") else None)
    found = {}
    for name, info in infos.items():
        item = 4 if request.dtype == "float32" else 2
        if named is None:
            speed = nominal_speed(info.spec, item)
        else:
            speed = speed_on(open_device(named), open_architecture(architecture_of(info)), request.dtype)
        found[name] = Estimator(info.spec, extent, speed)
    return found


def architecture_of(info: CheckpointInfo) -> str:
    """What ``open_architecture`` knows a checkpoint by: its folder, or the configuration that random weights are of."""
    return str(info.folder if info.random is None else info.random.config)


def _shipped_like(device: str) -> str | None:
    """The shipped device file of the GPU at hand."""
    import torch

    from heliosim.hardware.device import shipped_devices

    name = torch.cuda.get_device_properties(device).name.upper().replace("-", " ")
    memory = torch.cuda.get_device_properties(device).total_memory
    near = [d for d in shipped_devices() if d.split("-")[0].upper() in name]
    return min(near, key=lambda d: abs(int(d.split("-")[1].removesuffix("GB")) * 1e9 - memory), default=None)


def cells_of(
    request: Request, infos: Mapping[str, CheckpointInfo], mode: Mode, max_context: int, budgets: Sequence[int]
) -> tuple[Extent, list[Cell]]:
    """All cells that may be measured, for a dry run."""
    import torch

    from .hardware.run import Setting, all_cells

    extent = extent_of(request, mode, max_context)
    device = torch.device("cuda" if mode == "full" else "cpu")
    kernels = mode == "full" or request.device_out is not None
    setting: Setting = Setting(device, extent, None, budgets, (), (), kernels=kernels)
    return extent, all_cells([info.spec for info in infos.values()], setting)


def settings_of(request: Request, device: str, mode: Mode, path: Path) -> dict[str, Any]:
    """What must be the same for a calibration to be taken up again."""
    from .device import device_facts, version_facts

    facts = device_facts(device, request.threads)
    return {
        "models": list(request.models),
        "device": device,
        "processor": str(facts.get("gpu") or facts["host_cpu"]),
        "versions": version_facts(),
        "dtype": request.dtype,
        "threads": request.threads,
        "max_batch": request.max_batch,
        "max_context": request.max_context,
        "token_budget": request.token_budget,
        "rounds": request.rounds,
        "threshold": request.threshold,
        "seed": request.seed,
        "hardware": mode,
        "tensor_parallel": request.tensor_parallel,
        "kernels": mode == "full" or request.device_out is not None,
        "budgets_bytes": list(request.budgets_bytes),
        "tasks": list(request.tasks),
        "prompts_per_task": request.prompts_per_task,
        "tokens_per_text": request.tokens_per_text,
        "prompts_file": str(request.prompts_file) if request.prompts_file else None,
    }
