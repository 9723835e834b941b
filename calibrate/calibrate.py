"""`heliosim calibrate`: from checkpoints to a profile, one stage behind the other, in the real serving loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from heliosim.behaviour_report import write_behaviour_report
from heliosim.errors import InputError
from heliosim.formats.checkpoint import SHIPPED, CheckpointInfo, checkpoint_path, inspect_checkpoint
from heliosim.formats.files import new_folder, require_free, sha256_of
from heliosim.formats.hardware_facts import HardwareFacts
from heliosim.formats.profile import (
    NO_BEHAVIOUR,
    PROFILE_FOLDER,
    SCHEMA_VERSION,
    ClockName,
    CostFit,
    LargestBatch,
    LoadFit,
    MemoryFacts,
    ModelFacts,
    Profile,
    ProfileFile,
    load_profile,
    write_profile,
)
from heliosim.memory_model import STEP_TOKENS
from heliosim.premises import measure_premises
from heliosim.runs import engine_mode
from heliosim.streams import stream
from heliosim.types import ModelSpec, blocks_for

from .behaviour_alone import require_shared_vocabulary
from .behaviour_parts import Parts
from .behaviour_stage import BehaviourPlan, measure_behaviour, parts_folder
from .device import device_facts, resolve_device, version_facts
from .energy import energy_facts, find_meter, idle_watts
from .exit_costs import MethodSample, fit_methods, measure_methods
from .fit import fit_loads, fit_steps
from .hardware.facts import energy_facts as with_windows
from .hardware.facts import hardware_facts, memory_facts, with_hardware
from .hardware.journal import Journal
from .hardware.report import write_calibration_report
from .hardware.run import Measured
from .hardware.table import TABLE, write_rows
from .measure import LoadSample, StepSample, measure_loads
from .plan import method_modes
from .stages import Mode, budget_of, kept_loads, measure_all_steps, measure_cells, mode_of, settings_of

Progress = Callable[[str, float], None]
"""Called with what is going on and the share of the whole that is done."""


@dataclass(frozen=True)
class Request:
    """What to calibrate; of random weights no behaviour is recorded. ``pool_bytes``: memory for weights and KV while
    measuring; None: enough for the largest batch asked for. ``exit_methods``: exit methods, each
    ``batching+skipped_kv``, whose texts to record as well. ``prompts_file``, ``closed_loop_prompts``: see
    ``BehaviourPlan``. ``tensor_parallel``: GPUs that share each layer.

    ``hardware``: ``full``, ``quick`` or ``off``, cells of single parts to measure beside the steps; ``auto``: full on a
    GPU, quick on a CPU. ``budget_s``: seconds for steps and cells together. ``device_out``: device file to write,
    with what one GPU cannot show taken from ``device_base``.
    """

    models: Sequence[str]
    out: Path
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: int = 1
    tensor_parallel: int = 1
    max_batch: int = 32
    max_context: int = 256
    token_budget: int = 256
    rounds: int = 4
    tasks: Sequence[str] = field(default_factory=tuple)
    prompts_per_task: int = 24
    prompts_file: Path | None = None
    closed_loop_prompts: int = 24
    tokens_per_text: int = 48
    threshold: float = 0.8
    exit_methods: Sequence[str] = ()
    budgets_bytes: Sequence[int] = ()
    seed: int = 0
    overwrite: bool = False
    hardware: str = "auto"
    budget_s: float | None = None
    device_out: Path | None = None
    device_base: str | None = None

    @property
    def behaviour(self) -> BehaviourPlan:
        """Its part about behaviour."""
        return BehaviourPlan(
            tasks=self.tasks,
            prompts_per_task=self.prompts_per_task,
            prompts_file=self.prompts_file,
            closed_loop_prompts=self.closed_loop_prompts,
            tokens_per_text=self.tokens_per_text,
            threshold=self.threshold,
            exit_methods=self.exit_methods,
            rows=min(16, self.max_batch),
            seed=self.seed,
        )


def calibrate(request: Request, progress: Progress = lambda _what, _share: None) -> Profile:
    """Measure everything, write the profile folder in one piece, and return it loaded.

    Raises InputError for checkpoints that cannot be used together. What was measured in the serving loop and cell by
    cell is kept in ``OUT.partial`` until the profile is there: the same request goes on from it.
    """
    require_usable(request)
    device = resolve_device(request.device)
    mode = cell_mode(request, device)
    budget_s = budget_of(request.budget_s, device, len(request.models))
    require_free(request.out, PROFILE_FOLDER, overwrite=request.overwrite)
    journal = Journal(request.out, settings_of(request, device, mode, request.out))
    try:
        profile = _calibrate(request, device, mode, budget_s, journal, progress)
    except BaseException:
        journal.close()
        raise
    journal.remove()
    if request.device_out is not None:
        from .hardware.device_file import write_device

        write_device(profile, request.device_out, request.device_base, overwrite=request.overwrite)
    return profile


def require_usable(request: Request) -> None:
    """Raise InputError for what can be seen to be wrong before anything is read or measured, a dry run included."""
    if not request.models:
        raise InputError("--models", "", "names no model", "Give shipped names or checkpoint folders.")
    if twice := sorted({m for m in request.models if request.models.count(m) > 1}):
        raise InputError("--models", twice[0], "is named twice", "Name each model once.")
    if request.prompts_file is not None and not request.prompts_file.is_file():
        raise InputError("--prompts-file", str(request.prompts_file), "is no file", "Check the path.")
    require_free(request.out, PROFILE_FOLDER, overwrite=request.overwrite)
    if request.device_out is not None and request.hardware == "off":
        problem = "a device file is made of hardware cells"
        raise InputError("--hardware", request.hardware, problem, "Leave one of the two out.")


def cell_mode(request: Request, device: str) -> Mode:
    """Which hardware cells are measured. Raises InputError for cells of models whose layers several GPUs share."""
    if request.tensor_parallel == 1:
        return mode_of(request.hardware, device)
    if request.hardware not in ("auto", "off"):
        problem = "cells of single parts are those of one GPU"
        raise InputError("--hardware", request.hardware, problem, "Leave it out, or calibrate one GPU.")
    return "off"


def _calibrate(
    request: Request, device: str, mode: Mode, budget_s: float | None, journal: Journal, progress: Progress
) -> Profile:
    from heliosim.engines.parallel.cutting import rank_infos
    from heliosim.engines.torch import TorchEngine

    with new_folder(request.out, PROFILE_FOLDER, overwrite=request.overwrite) as folder:
        infos = rank_infos(inspect(request), 0, request.tensor_parallel)
        specs = {name: info.spec for name, info in infos.items()}
        has_behaviour = all(info.random is None for info in infos.values())
        engine = TorchEngine(
            {name: info.folder for name, info in infos.items()},
            device=device,
            dtype=request.dtype,
            threads=request.threads,
            mode=engine_mode("auto", device),
            tensor_parallel=request.tensor_parallel,
        )
        clocks: tuple[ClockName, ...] = ("wall",) if device.startswith("cuda") else ("cpu", "wall")
        max_context = min(request.max_context, *(s.max_context for s in specs.values()))
        coder = request.behaviour.coder(infos, max_context) if has_behaviour else None
        prompts = None if coder is None else request.behaviour.prompts(coder)
        given = [] if prompts is None else prompts.given
        ids = [token for p in given for token in p.ids]
        text = _at_least(ids, 2 * max_context) if ids else random_ids(request.seed, engine.vocab)

        meter, reason = find_meter(device)
        progress("idle power", 0.0)
        idle = idle_watts(meter, 2.0) if meter else None
        joules, started = (meter.read_j() if meter else 0.0), time.perf_counter()
        steps = measure_all_steps(
            request, engine, specs, text, _pools(request, specs, max_context), max_context, journal, budget_s,
            lambda what, share: progress(what, 0.45 * share),
        )  # fmt: skip
        spent_s = time.perf_counter() - started
        busy_j = meter.read_j() - joules if meter else 0.0
        energy = energy_facts(meter, reason, idle, busy_j, spent_s)
        methods = _measure_methods(request, engine, specs, text, max_context, progress)
        loads = kept_loads(journal, lambda: _measure_loads(request, engine, specs, progress))
        measured: Measured | None = None
        if mode != "off":
            measured = measure_cells(
                request, engine, infos, text, _texts(request), journal, mode=mode, max_context=max_context,
                budgets=_budgets(request, specs), budget_s=None if budget_s is None else max(0.0, budget_s - spent_s),
                meter=meter, no_meter=reason, progress=lambda what, share: progress(what, 0.5 + 0.1 * share),
            )  # fmt: skip
        memory = memory_facts(measured, specs) if device.startswith("cuda") and measured is not None else {}
        batches = {
            n: _largest_batches(engine, s, _budgets(request, specs), max_context, memory.get(n))
            for n, s in specs.items()
        }

        parts, behaviour = parts_folder(request.out), NO_BEHAVIOUR
        if coder is not None and prompts is not None:
            progress("behaviour", 0.6)
            behaviour = measure_behaviour(
                request.behaviour,
                engine,
                infos,
                coder,
                prompts,
                folder / "behaviour.parquet",
                parts,
                lambda what, share: progress(f"behaviour {what}", 0.6 + 0.36 * share),
            )
        engine.close()
        _write_steps(steps, folder / "steps.parquet")
        progress("fit", 0.98)
        models = {
            name: _facts(name, info, specs[name], steps, methods, loads, batches[name], clocks)
            for name, info in infos.items()
        }
        tables = ["behaviour.parquet", "steps.parquet"]
        hardware: HardwareFacts | None = None
        if measured is not None and mode != "off":
            write_rows(measured.rows, folder / TABLE)
            tables.append(TABLE)
            costs = {name: m.step[clocks[0]].cost() for name, m in models.items()}
            hardware = hardware_facts(measured, specs, costs, mode=mode, clock=clocks[0], budget_s=budget_s)
            models = {name: with_hardware(m, hardware, memory.get(name)) for name, m in models.items()}
            energy = with_windows(energy, hardware)
        facts = ProfileFile(
            schema_version=SCHEMA_VERSION,
            kind="measured",
            device=device_facts(device, request.threads),
            versions=version_facts(),
            seed=request.seed,
            models=models,
            energy=energy,
            behaviour=behaviour,
            files={path.name: sha256_of(path) for path in sorted(folder.glob("*.parquet"))},
            hardware=hardware,
        )
        write_profile(folder, facts)
        if has_behaviour:
            premises = measure_premises(load_profile(folder).behaviour, request.threshold)
            write_profile(folder, facts.model_copy(update={"premises": [p.row() for p in premises]}))
            progress("behaviour report", 0.99)
            write_behaviour_report(load_profile(folder), folder / "behaviour.html", name=request.out.name)
        write_calibration_report(load_profile(folder), folder)
    Parts.remove_at(parts)
    progress("done", 1.0)
    return load_profile(request.out)


def inspect(request: Request) -> dict[str, CheckpointInfo]:
    """Facts of the models by name. Raises InputError if two have one name, or if texts are asked of random weights."""
    infos: dict[str, CheckpointInfo] = {}
    for model in request.models:
        info = inspect_checkpoint(checkpoint_path(model), request.dtype)
        if info.spec.name in infos:
            raise InputError("--models", model, f"two models are called {info.spec.name}", "Calibrate them apart.")
        infos[info.spec.name] = info
    require_shared_vocabulary({name: info.spec for name, info in infos.items()})
    for info in infos.values():
        method_modes(info.spec, request.threshold, request.exit_methods)
    if request.exit_methods and any(info.random is not None for info in infos.values()):
        problem = "random weights say nothing, so no texts are recorded"
        raise InputError("--exit-methods", ",".join(request.exit_methods), problem, "Leave it out.")
    return infos


def random_ids(seed: int, vocab: int, count: int = 4096) -> list[int]:
    """Token ids for models that have no text: drawn evenly from the vocabulary."""
    ids: list[int] = stream(seed, "calibrate", "ids").integers(vocab, size=count).tolist()
    return ids


def _at_least(text: list[int], tokens: int) -> list[int]:
    """A text repeated until it has so many tokens: few prompts must do for steps of any length."""
    return text * -(-tokens // len(text)) if len(text) < tokens else text


def _texts(request: Request) -> list[str]:
    """Plain text of the built-in tasks, to tokenise."""
    from itertools import islice

    from heliosim.tasks import documents

    return [d.prompt for d in islice(documents("chat", "calibration", request.seed), 8)]


def _pools(request: Request, specs: Mapping[str, ModelSpec], max_context: int) -> dict[str, int]:
    """Bytes of a server's pool that holds the largest batch asked for."""
    rows, blocks = request.max_batch + 1, blocks_for(max_context) + 1
    return {n: s.weights_bytes(s.layers) + rows * blocks * s.block_bytes(s.layers) for n, s in specs.items()}


def _measure_methods(
    request: Request,
    engine: Any,
    specs: Mapping[str, ModelSpec],
    text: list[int],
    max_context: int,
    progress: Progress,
) -> list[MethodSample]:
    """Steps whose rows part ways, and steps that copy KV."""
    progress("exit methods", 0.49)
    samples: list[MethodSample] = []
    for spec in specs.values():
        pool = _pools(request, specs, max_context)[spec.name]
        samples += measure_methods(engine, spec, request.threshold, request.max_batch, text, pool, request.rounds)
    return samples


def _measure_loads(
    request: Request, engine: Any, specs: Mapping[str, ModelSpec], progress: Progress
) -> list[LoadSample]:
    progress("loads and switches", 0.5)
    return measure_loads(engine, specs, max(_budgets(request, specs)), max(2, request.rounds), request.seed)


def _budgets(request: Request, specs: Mapping[str, ModelSpec]) -> list[int]:
    """Memory budgets to try largest batches in: those asked for, else 2 and 4 times the largest model's weights."""
    if request.budgets_bytes:
        return sorted(request.budgets_bytes)
    largest = max(s.weights_bytes(s.layers) for s in specs.values())
    return [2 * largest, 4 * largest]


def _largest_batches(
    engine: Any, spec: ModelSpec, budgets: Sequence[int], context: int, memory: MemoryFacts | None
) -> list[LargestBatch]:
    """Allocate weights and KV for each depth and count the rows that the blocks the engine then holds can carry, beside
    what steps need (``memory``), if that is known.
    """
    from heliosim.types import Load, Placement

    found = []
    m = memory or MemoryFacts()
    fixed = m.workspace_bytes + m.graph_bytes + m.activation_bytes_per_token * STEP_TOKENS
    for budget in budgets:
        for depth in spec.exits:
            free = budget - spec.weights_bytes(depth) - fixed
            blocks = free // spec.block_bytes(depth)
            rows = 0
            if blocks >= 1:
                engine.perform(Load(Placement(spec.name, depth), blocks, "calibrate"))
                books = engine.books()
                held = books["weights_bytes"] + books["kv_bytes"]
                if held > budget:
                    raise AssertionError(f"{spec.name}@{depth} holds {held} B of {budget} B")
                rows = blocks // blocks_for(context)
            found.append(LargestBatch(depth=depth, context_tokens=context, budget_bytes=budget, rows=rows))
    return found


def _write_steps(samples: Sequence[StepSample], path: Path) -> None:
    """Every measured step: model, mode, shape, seconds on each clock."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "model": s.model,
            "mode": s.mode,
            "visit": s.visit,
            **s.shape._asdict(),
            **{f"{c}_s": t for c, t in s.clocks.items()},
        }
        for s in samples
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def _facts(
    name: str,
    info: CheckpointInfo,
    spec: ModelSpec,
    steps: Sequence[StepSample],
    methods: Sequence[MethodSample],
    loads: Sequence[LoadSample],
    batches: list[LargestBatch],
    clocks: tuple[ClockName, ...],
) -> ModelFacts:
    mine = [s for s in steps if s.model == spec.name]
    my_loads = [s for s in loads if s.model == spec.name]
    step_fits: dict[ClockName, CostFit] = {c: fit_steps(mine, c) for c in clocks}
    my_methods = [s for s in methods if s.model == spec.name]
    for c, fit in step_fits.items():
        step_fits[c] = fit.model_copy(update={"exit_methods": fit_methods(my_methods, fit.cost(), c)})
    load_fits: dict[ClockName, LoadFit] = {c: fit_loads(my_loads, c) for c in clocks}
    return ModelFacts(
        architecture=info.architecture,
        checkpoint=name if name in SHIPPED else str(info.folder if info.random is not None else info.folder.resolve()),
        weights_sha256=info.weights_sha256(),
        weights="checkpoint" if info.random is None else "random",
        weights_seed=None if info.random is None else info.random.seed,
        dtype=info.dtype,
        tensor_parallel=getattr(info, "ranks", 1),
        layers=spec.layers,
        exits=spec.exits,
        exit_kind=spec.kind,
        layer_bytes=spec.layer_bytes,
        base_bytes=spec.base_bytes,
        exit_head_bytes=dict(spec.exit_head_bytes),
        kv_bytes_per_token_layer=spec.kv_bytes_per_token_layer,
        hidden_bytes=spec.hidden_bytes,
        max_context=spec.max_context,
        vocabulary=spec.vocabulary,
        step=step_fits,
        load=load_fits,
        largest_batch=tuple(batches),
    )
