"""Composed profiles: shapes and a device's curves (or operator tables), and exits from elsewhere, in one folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heliosim import __version__
from heliosim.costs import TERMS
from heliosim.errors import InputError, OutOfRangeError
from heliosim.formats.files import new_folder, sha256_of
from heliosim.formats.profile import (
    NO_BEHAVIOUR,
    PROFILE_FOLDER,
    SCHEMA_VERSION,
    BehaviourFacts,
    Composition,
    CostFit,
    Curves,
    Derivation,
    Energy,
    HoldOut,
    LargestBatch,
    LoadFit,
    MemoryFacts,
    ModelFacts,
    ModelPower,
    Profile,
    ProfileFile,
    Source,
    load_profile,
    write_profile,
)
from heliosim.memory_model import STEP_TOKENS, largest_batch, needs_of
from heliosim.operators.tables import rising_at_the_end

if TYPE_CHECKING:
    from heliosim.hardware.architecture import Architecture
    from heliosim.hardware.compose import ComposedModel
    from heliosim.hardware.device import Device
    from heliosim.operators.tables import OperatorTables
    from heliosim.synthetic.spec import ExitSpec

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that weights and KV may fill, in the batches a profile names."""
CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class Wanted:
    """A model to compose: what it is called in the profile, its architecture, ranks, and exits (empty: the last)."""

    name: str
    architecture: Architecture
    tp: int
    exits: tuple[int, ...]
    kind: str = "anywhere"


def compose_profile(
    out: Path,
    wanted: Sequence[Wanted],
    device: Device,
    *,
    dtype: str,
    host: str,
    behaviour: str = "none",
    seed: int = 0,
    allow_extrapolation: bool = False,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Profile:
    """Write the profile of models on a device. ``behaviour``: ``none``, ``synthetic``, an exit spec or a profile.

    ``files``: digests of what was read, by name. Raises InputError for models that cannot be cut, and
    OutOfRangeError where a model's own context goes beyond the curves, unless ``allow_extrapolation``.
    """
    from heliosim.hardware.compose import Exits, compose_model

    made = {
        w.name: compose_model(w.architecture, device, dtype=dtype, tp=w.tp, exits=Exits(w.exits, w.kind), host=host)
        for w in wanted
    }
    budget = int(MEMORY_SHARE * device.memory_bytes)
    models = {name: model_facts(model, budget) for name, model in made.items()}
    outside = _outside(wanted, device, allow_extrapolation)
    gpus = max(w.tp for w in wanted)
    composition = Composition(
        device=device.name,
        dtype=next(iter(made.values())).dtype,
        tensor_parallel={w.name: w.tp for w in wanted},
        host=host,
        behaviour=behaviour,
        files=dict(files or {}),
        extrapolated=tuple(outside),
    )
    origins = {
        name: o for name, o in device.origins().items() if not name.startswith("host ") or name == f"host {host}"
    }
    derivation = Derivation(
        method=f"Composed, not measured: kernel times of {device.name}'s efficiency curves added up over each model's "
        f"shapes, host preset {host}.",
        sources=tuple(
            Source(name=o.source, used_for=f"{part} ({o.fitted_range})", url=o.url, licence=o.licence)
            for part, o in origins.items()
        ),
        assumptions=(
            *(f"EXTRAPOLATED beyond the device's curves: {line}" for line in outside),
            *_wide_heads(wanted, device),
            *dict.fromkeys(line for model in made.values() for line in model.assumptions),
        ),
        synthetic=(),
    )
    power = device.power
    energy = Energy(
        source="published",
        reason=f"{power.origin.source}; {power.origin.derivation}",
        idle_w=power.idle_w,
        decode_w=power.decode_w,
        prefill_w=power.prefill_w,
        gpus=gpus,
        models={
            name: ModelPower(decode_w=model.watts["decode"], prefill_w=model.watts["prefill"])
            for name, model in made.items()
        },
    )
    return write_composed(
        out, models, composition, derivation, energy, device.name, device.memory_bytes, seed, overwrite=overwrite
    )


def _outside(wanted: Sequence[Wanted], device: Device, allow_extrapolation: bool) -> list[str]:
    """Matrices and numbers of ranks outside the device's curves, in words. Raises OutOfRangeError unless allowed.

    An output head may have more columns than the curves reach: its product falls into blocks (``_wide_heads``).
    """
    ranges = {axis.name: (axis.points[0], axis.points[-1]) for axis in device.gemm.efficiency.axes}
    gpus = {count for part in device.all_reduce.values() for count in part.gpus}
    found = []
    for w in wanted:
        for matrix in w.architecture.matrices(w.tp):
            for axis, value in (("n", matrix.n), ("k", matrix.k)):
                low, high = ranges.get(axis, (value, value))
                high = math.inf if axis == "n" else high  # wider ones are several products, see Kernels.gemm
                if not low <= value <= high:
                    found.append(f"{w.name}, {matrix.name}: {axis} = {value}, curves from {low:g} to {high:g}")
        if w.tp > 1 and not min(gpus) <= w.tp <= max(gpus):
            found.append(f"{w.name}: {w.tp} ranks, all-reduce of {min(gpus)} to {max(gpus)}")
    if found and not allow_extrapolation:
        remedy = "Pass --allow-extrapolation to compose it all the same; the profile will say so."
        raise OutOfRangeError(device.name, "; ".join(found), "outside the range of the device's curves", remedy)
    return found


def _wide_heads(wanted: Sequence[Wanted], device: Device) -> list[str]:
    """Output heads with more columns than the device's curves reach, in words."""
    most = next((axis.points[-1] for axis in device.gemm.efficiency.axes if axis.name == "n"), None)
    heads = [(w.name, w.architecture.head_matrix(w.tp).n) for w in wanted]
    return [
        f"{name}: output head of {n:,} columns, beyond the curves' {most:,.0f}: taken as blocks of that many"
        for name, n in heads
        if most is not None and n > most
    ]


def model_facts(model: ComposedModel, budget_bytes: int) -> ModelFacts:
    """Facts of a composed model in a profile's form. Its clock is ``wall``: GPU time is no processor time."""
    errors = model.line_errors
    cells = sum(e.points for e in errors.values())
    holdout = HoldOut(
        cells=cells,
        median_abs_error=sum(e.median_abs * e.points for e in errors.values()) / cells,
        p90_abs_error=max(e.p90_abs for e in errors.values()),
        mean_signed_error=sum(e.mean_signed * e.points for e in errors.values()) / cells,
        by_region={region: e.median_abs for region, e in errors.items()},
    )
    layer, head = (rising_at_the_end(tuple(model.curves[name])) for name in ("layer", "head"))
    step = CostFit(
        seconds_per=dict.fromkeys(TERMS, 0.0) | dict(model.seconds_per),
        curves=Curves(layer=layer, head=head),
        steps=cells,
        cell_spread=0.0,
        max_rows=min(model.fitted_rows, int(head[-1][0])),
        max_context=model.fitted_context,
        max_tokens=min(model.fitted_tokens, int(layer[-1][0])),
        holdout=holdout,
    )
    facts = ModelFacts(
        architecture=model.architecture,  # type: ignore[arg-type]
        checkpoint=model.name,
        weights_sha256="",
        dtype=model.dtype,
        tensor_parallel=model.tensor_parallel,
        layers=model.layers,
        exits=model.exits,
        exit_kind=model.exit_kind,  # type: ignore[arg-type]
        layer_bytes=model.layer_bytes,
        base_bytes=model.base_bytes,
        exit_head_bytes=dict(model.exit_head_bytes),
        kv_bytes_per_token_layer=model.kv_bytes_per_token_layer,
        hidden_bytes=model.hidden_bytes,
        max_context=model.max_context,
        vocabulary=model.vocabulary,
        step={"wall": step},
        load={
            "wall": LoadFit(
                seconds_per=dict(model.load_seconds_per),
                loads=0,
                median_abs_error=None,
                seconds_per_byte={"disk": model.disk_seconds_per_byte},
            )
        },
        largest_batch=(),
        memory=MemoryFacts(
            activation_bytes_per_token=model.activation_bytes_per_token,
            workspace_bytes=model.workspace_bytes,
            sources={
                "activation_bytes_per_token": model.activation_source,
                "workspace_bytes": "assumed",
            },
        ),
    )
    return facts.model_copy(update={"largest_batch": largest_batches(facts, budget_bytes)})


def largest_batches(facts: ModelFacts, budget_bytes: int) -> tuple[LargestBatch, ...]:
    """By the byte model: rows of ``CONTEXT_TOKENS`` beside each depth that fits, with steps of ``STEP_TOKENS``."""
    spec, needs, found = facts.spec("model"), needs_of(facts, STEP_TOKENS), []
    for depth in facts.exits:
        rows = largest_batch(spec, depth, CONTEXT_TOKENS, budget_bytes, needs)
        found.append(LargestBatch(depth=depth, context_tokens=CONTEXT_TOKENS, budget_bytes=budget_bytes, rows=rows))
    return tuple(found)


def operator_profile(
    out: Path,
    tables: OperatorTables,
    fit: CostFit,
    wanted: Wanted,
    *,
    device: str,
    memory_bytes: int,
    dtype: str,
    host: str,
    link_bytes_per_s: float,
    assumptions: Sequence[str] = (),
    behaviour: str = "none",
    seed: int = 0,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Profile:
    """Write the profile of one model whose operators were measured on one GPU."""
    from heliosim.hardware.architecture import dtype_name
    from heliosim.hardware.compose import Exits, exit_layers

    a, tp = wanted.architecture, wanted.tp
    facts = ModelFacts(
        architecture=a.family,
        checkpoint=a.name,
        weights_sha256="",
        dtype=dtype_name(dtype),
        tensor_parallel=tp,
        layers=a.layers,
        exits=exit_layers(a, Exits(wanted.exits, wanted.kind)),
        exit_kind=wanted.kind,  # type: ignore[arg-type]
        layer_bytes=a.layer_bytes(dtype, tp),
        base_bytes=a.base_bytes(dtype, tp),
        exit_head_bytes={},
        kv_bytes_per_token_layer=a.kv_bytes(dtype, tp),
        hidden_bytes=a.hidden_bytes(dtype),
        max_context=a.max_context,
        vocabulary=a.vocabulary_name,
        step={"wall": fit},
        load={
            "wall": LoadFit(
                seconds_per={
                    "load": 0.0, "layer": 0.0, "weights_byte": 1 / link_bytes_per_s, "kv_byte": 0.0,
                    "extend_token_layer": _slope(fit),
                },
                loads=0,
                median_abs_error=None,
            )
        },
        largest_batch=(),
    )  # fmt: skip
    budget = int(MEMORY_SHARE * memory_bytes)
    facts = facts.model_copy(update={"largest_batch": largest_batches(facts, budget)})
    composition = Composition(
        device=device,
        dtype=facts.dtype,
        tensor_parallel={wanted.name: tp},
        host=host,
        behaviour=behaviour,
        files=dict(files or {}),
    )
    derivation = Derivation(
        method=f"Composed, not measured as steps: operator times of {device} ({tables.source}) added up; attention "
        "is a line through its table.",
        sources=(Source(name=tables.source, used_for="operator times", url="", licence=tables.licence),),
        assumptions=tuple(assumptions),
        synthetic=(),
    )
    energy = Energy(source="unavailable", reason="operator tables hold no power")
    return write_composed(
        out, {wanted.name: facts}, composition, derivation, energy, device, memory_bytes, seed, overwrite=overwrite
    )


def _slope(fit: CostFit) -> float:
    assert fit.curves is not None
    (t0, s0), (t1, s1) = fit.curves.layer[-2:]
    return (s1 - s0) / (t1 - t0)


def write_composed(
    out: Path,
    models: Mapping[str, ModelFacts],
    composition: Composition,
    derivation: Derivation,
    energy: Energy,
    device: str,
    memory_bytes: int,
    seed: int,
    *,
    overwrite: bool = False,
) -> Profile:
    """Write the folder with the behaviour that the composition names."""
    from heliosim.premises import measure_premises

    exits = {name: facts.exits for name, facts in models.items()}
    with new_folder(out, PROFILE_FOLDER, overwrite=overwrite) as folder:
        behaviour, about = write_behaviour(folder / "behaviour.parquet", composition.behaviour, exits, seed)
        has_table = behaviour.rows > 0
        facts = ProfileFile(
            schema_version=SCHEMA_VERSION,
            kind="composed",
            composition=composition,
            derivation=derivation.model_copy(update={"synthetic": tuple(about)}),
            device={"device": "cuda", "gpu": device, "gpu_memory_bytes": memory_bytes},
            versions={"heliosim": __version__},
            seed=seed,
            models=dict(models),
            energy=energy,
            behaviour=behaviour,
            files={"behaviour.parquet": sha256_of(folder / "behaviour.parquet")} if has_table else {},
        )
        write_profile(folder, facts)
        if has_table:
            premises = measure_premises(load_profile(folder).behaviour, behaviour.threshold)
            write_profile(folder, facts.model_copy(update={"premises": [p.row() for p in premises]}))
    return load_profile(out)


def write_behaviour(
    path: Path, named: str, exits: Mapping[str, tuple[int, ...]], seed: int
) -> tuple[BehaviourFacts, Sequence[str]]:
    """Write the behaviour table that ``named`` stands for, and say what it is. Raises InputError for absent exits."""
    if named == "none":
        return NO_BEHAVIOUR, ["no exits: time alone can be simulated"]
    spec = _spec_of(named, exits)
    if spec is not None:
        from heliosim.synthetic.draw import behaviour_for

        table = behaviour_for(exits, spec, seed)
        table.write(path)
        return table.facts, [f"exits are synthetic, drawn from the spec {spec.name}", *table.about]
    from heliosim.formats.profile import load_behaviour
    from heliosim.profile_view import open_profile
    from heliosim.synthetic.table import FACTS, TABLE, load_table

    if (Path(named) / FACTS).is_file():
        said, _ = load_table(Path(named))
        load_behaviour(Path(named) / TABLE, exits)
        shutil.copyfile(Path(named) / TABLE, path)
        return said.facts, [f"exits are those of the table {Path(named).name} ({said.origin})", *said.about]
    other = open_profile(named)
    other.require_behaviour()
    source = other.folder / "behaviour.parquet"
    load_behaviour(source, exits)  # has every exit, or says which is missing
    shutil.copyfile(source, path)
    return other.facts.behaviour, [f"exits are those of the profile {other.folder.name} ({other.origin})"]


def _spec_of(named: str, exits: Mapping[str, tuple[int, ...]]) -> ExitSpec | None:
    """The exit spec that ``named`` stands for; None if it is a profile's name."""
    from heliosim.synthetic.spec import load_spec, shipped_specs

    shipped = shipped_specs()
    if named in shipped or Path(named).suffix in (".yaml", ".yml"):
        return load_spec(named)
    if named != "synthetic":
        return None
    for name in shipped:
        spec = load_spec(name)
        if all(
            model in spec.models and set(layers) <= set(spec.models[model].exits) for model, layers in exits.items()
        ):
            return spec
    wanted = "; ".join(f"{model} at {', '.join(map(str, layers))}" for model, layers in exits.items())
    remedy = f"Name a spec of your own (YAML), choose exits of a shipped one ({', '.join(shipped)}), or say none."
    raise InputError("--behaviour", "synthetic", f"no shipped exit spec knows {wanted}", remedy)
