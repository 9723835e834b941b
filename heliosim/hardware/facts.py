"""Composed models in the form of a profile: ``ModelFacts`` with curves, terms and the range they were made over."""

from __future__ import annotations

from heliosim.costs import TERMS
from heliosim.formats.profile import CostFit, Curves, Energy, HoldOut, LoadFit, ModelFacts, Source
from heliosim.hardware.compose import ComposedModel
from heliosim.hardware.device import Device


def model_facts(model: ComposedModel) -> ModelFacts:
    """What a profile holds of a composed model. Hold-out errors are those of curves and lines against the kernels they
    were made of, not against a running engine.
    """
    return ModelFacts(
        architecture="opt" if model.architecture == "opt" else "llama",
        checkpoint="none (composed)",
        weights_sha256="none",
        dtype=model.dtype,
        layers=model.layers,
        exits=model.exits,
        exit_kind="fixed" if model.exit_kind == "fixed" else "anywhere",
        tensor_parallel=model.tensor_parallel,
        layer_bytes=model.layer_bytes,
        base_bytes=model.base_bytes,
        exit_head_bytes=dict(model.exit_head_bytes),
        kv_bytes_per_token_layer=model.kv_bytes_per_token_layer,
        hidden_bytes=model.hidden_bytes,
        max_context=model.max_context,
        vocabulary=model.vocabulary,
        step={"wall": cost_fit(model)},
        load={
            "wall": LoadFit(
                seconds_per=dict(model.load_seconds_per),
                loads=0,
                median_abs_error=None,
                seconds_per_byte={"disk": model.disk_seconds_per_byte},
            )
        },
        largest_batch=(),
    )


def cost_fit(model: ComposedModel) -> CostFit:
    """Terms, curves and range of a step. Terms that no kernel table holds cost nothing."""
    layers = {region: errors for region, errors in model.line_errors.items() if errors.points}
    points = sum(errors.points for errors in layers.values())

    def mean(name: str) -> float:
        return sum(errors.points * float(getattr(errors, name)) for errors in layers.values()) / points

    return CostFit(
        seconds_per={term: model.seconds_per.get(term, 0.0) for term in TERMS},
        curves=Curves(layer=model.curves["layer"], head=model.curves["head"]),
        steps=points,
        cell_spread=0.0,
        max_rows=model.fitted_rows,
        max_context=model.fitted_context,
        max_tokens=model.fitted_tokens,
        holdout=HoldOut(
            cells=points,
            median_abs_error=mean("median_abs"),
            p90_abs_error=mean("p90_abs"),
            mean_signed_error=mean("mean_signed"),
            by_region={region: errors.median_abs for region, errors in layers.items()},
        ),
    )


def energy_of(model: ComposedModel) -> Energy:
    """Power of **one** GPU of the group while it steps; decode steps stand for all."""
    return Energy(
        source="data-sheet",
        reason="shares of the board's limit from Splitwise's A100-80GB; idle power is a choice",
        idle_w=model.watts["idle"],
        joules_per_step_second=model.watts["decode"] - model.watts["idle"],
    )


def sources_of(device: Device, host: str) -> tuple[Source, ...]:
    """The publications a composed profile rests on, once each."""
    found: dict[str, Source] = {}
    for part, origin in device.origins().items():
        if part.startswith("host ") and part != f"host {host}":
            continue
        if part in ("all-reduce custom", "all-reduce nccl") and not part.endswith(device.host(host).all_reduce):
            continue
        held = found.get(origin.source)
        used = f"{held.used_for}, {part}" if held else part
        found[origin.source] = Source(name=origin.source, used_for=used, url=origin.url, licence=origin.licence)
    return tuple(found.values())
