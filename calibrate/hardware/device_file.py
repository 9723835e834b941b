"""A device file from a measured calibration, so that other models can be composed for the GPU at hand.

Matrix products, attention, element-wise kernels, links and idle power are those that were measured. What one device
alone cannot show (all-reduces, engines of other times, power while working where no counter could be read) is taken
from a ``base`` device, and each part says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heliosim.errors import InputError
from heliosim.formats.files import require_new_file, validate, write_json
from heliosim.formats.profile import Profile
from heliosim.hardware.architecture import ITEM_BYTES
from heliosim.hardware.device import SCHEMA_VERSION, Device, Origin, open_device

from .cell import Row, of_kind
from .kernels import KINDS
from .table import read_rows

ANY_BASE = "A100-80GB"
"""Taken for what is missing where no base is named and no shipped device is like the one measured."""


def write_device(profile: Profile, path: Path, base: str | None = None, *, overwrite: bool = False) -> Device:
    """Write the device file of a profile's machine. Raises InputError where kernels were not measured."""
    require_new_file(path, overwrite=overwrite)
    if path.suffix != ".json":
        raise InputError("--device-out", str(path), "a device file is JSON", "Name it like my-gpu.json.")
    device = device_of(profile, open_device(base or _like(profile)))
    write_json(path, device.model_dump(mode="json"))
    return device


def device_of(profile: Profile, base: Device) -> Device:
    """The device that a profile was measured on."""
    facts = profile.facts
    if not profile.is_measured:
        raise InputError(str(profile.folder), facts.kind, "only a measured profile is of a device", "Calibrate.")
    rows = read_rows(profile.folder)
    _require_kernels(rows, profile)
    dtype = next(iter(facts.models.values())).dtype
    name = str(facts.device.get("gpu") or facts.device.get("host_cpu")).strip()
    memory = facts.device.get("gpu_memory_bytes") or facts.device.get("host_memory_bytes")
    peak = {r.cell.where["of"]: r.value for r in of_kind(rows, "peak")}
    is_base = _is_like(name, base)
    content: dict[str, Any] = base.model_dump(mode="json")
    content |= {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "memory_bytes": int(memory or base.memory_bytes),
        "bytes_per_s": base.bytes_per_s if is_base else peak["bytes"],
        "flops": dict(base.flops) if is_base else _flops(base, dtype, peak["flops"]),
        "data_sheet": base.data_sheet.model_dump() if is_base else _own("fastest copy and product seen", rows),
    }
    sheet = Device.model_validate({**base.model_dump(mode="json"), **content})
    content["gemm"] = _gemm(rows, sheet, dtype)
    half = sheet.flops[sheet.gemm.dtype]
    content["decode"] = _attention(rows, "attention_decode", ("groups", "context"), wide=ITEM_BYTES[dtype] / 2)
    slow = max(1.0, half / sheet.flops[dtype])
    content["prefill"] = _attention(rows, "attention_prefill", ("prompts", "heads", "tokens"), slow=slow)
    content["elementwise"] = _elementwise(rows)
    content["gemm_2023"] = _taken(content["gemm_2023"], base)
    content["all_reduce"] = {k: _taken(v, base) for k, v in content["all_reduce"].items()}
    content["hosts"] = {k: _taken(v, base) for k, v in content["hosts"].items()}
    content["links"] = _links(profile, content["links"], base)
    content["power"] = _power(profile, content["power"], base)
    return validate(Device, content, f"device file of {profile.folder}")


def _require_kernels(rows: Sequence[Row], profile: Profile) -> None:
    """Raise InputError unless every kind of kernel was measured."""
    for kind in ("peak", "gemm", "attention_decode", "attention_prefill", "elementwise"):
        if not of_kind(rows, kind):
            problem = "the profile holds no cells of such kernels"
            remedy = "Calibrate with --hardware full or --device-out, and with a longer --budget if it had one."
            raise InputError(str(profile.folder), kind, problem, remedy)


def _like(profile: Profile) -> str:
    from heliosim.hardware.device import shipped_devices

    name = str(profile.facts.device.get("gpu") or "")
    return next((d for d in shipped_devices() if d.split("-")[0].upper() in name.upper()), ANY_BASE)


def _is_like(name: str, base: Device) -> bool:
    """Whether the data sheet of the base is that of the device itself."""
    return base.name.split("-")[0].upper() in name.upper()


def _flops(base: Device, dtype: str, seen: float) -> dict[str, float]:
    """Peaks in proportion to the base's, so that the measured dtype has what was seen."""
    return {d: seen * f / base.flops[dtype] for d, f in base.flops.items()}


def _own(what: str, rows: Sequence[Row], holdout: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return Origin(
        source=f"measured by heliosim calibrate: {what}",
        licence="your own",
        fitted_range=f"{len(rows)} cells",
        points=len(rows),
        holdout=dict(holdout or {}),
    ).model_dump()


def _taken(part: dict[str, Any], base: Device) -> dict[str, Any]:
    """A part of the base, marked as such."""
    origin = dict(part["origin"])
    said = f"taken from {base.name}, not measured here"
    origin["derivation"] = f"{said}; {origin['derivation']}" if origin["derivation"] else said
    return {**part, "origin": origin}


def _full(rows: Sequence[Row], names: Sequence[str], value: Callable[[Row], float]) -> dict[str, Any]:
    """A grid of all combinations; a cell that could not be measured takes its nearest neighbour's value, scaled by
    work where that is smaller.
    """
    known = {tuple(r.cell.number(n) for n in names): value(r) for r in rows}
    points = [sorted({key[i] for key in known}) for i in range(len(names))]
    values = []
    for index in np.ndindex(*(len(p) for p in points)):
        at = tuple(points[i][k] for i, k in enumerate(index))
        values.append(known[at] if at in known else known[min(known, key=lambda key: _apart(key, at))])
    axes = [{"name": n, "points": [float(x) for x in p]} for n, p in zip(names, points, strict=True)]
    return {"axes": axes, "values": [float(f"{v:.4g}") for v in values]}


def _apart(a: Sequence[int], b: Sequence[int]) -> float:
    return math.dist([math.log2(x + 1) for x in a], [math.log2(x + 1) for x in b])


def _gemm(rows: Sequence[Row], sheet: Device, dtype: str) -> dict[str, Any]:
    """Efficiency: roofline seconds over measured ones. In the half precision the curves are read in: float32 products
    are put where ``kernels.py`` looks for them.
    """
    from heliosim.hardware.kernels import Kernels

    mine = of_kind(rows, "gemm")
    kernels = Kernels(sheet, dtype)
    item = kernels.item

    def efficiency(row: Row) -> float:
        m, n, k = (row.cell.number(x) for x in ("m", "n", "k"))
        return max(1e-6, kernels.roofline(m, n, k) / max(row.value, 1e-9))  # beyond 1 where a cache holds all of it

    grid = _full(mine, ("m", "n", "k"), efficiency)
    ridge = kernels.ridge
    grid["axes"][0]["points"] = [x * ridge for x in grid["axes"][0]["points"]]
    grid["axes"][2]["points"] = [x * item / 2 for x in grid["axes"][2]["points"]]
    base_dtype = sheet.gemm.dtype
    return {"origin": _own(f"matrix products in {dtype}", mine), "dtype": base_dtype, "efficiency": grid}


def _attention(
    rows: Sequence[Row], kind: str, names: Sequence[str], *, wide: float = 1.0, slow: float = 1.0
) -> dict[str, Any]:
    """``wide``: half-precision heads that one measured head has the bytes of; ``slow``: how much longer than in half
    precision the measured dtype takes by its peak. Both as ``kernels.py`` undoes them.
    """
    mine = of_kind(rows, kind)
    grids = {
        form: _named(
            _full([r for r in mine if r.cell.where["form"] == form], names, lambda r: max(r.value, 1e-9) / slow)
        )
        for form in ("mha", "gqa")
    }
    for grid in grids.values():
        if grid["axes"][0]["name"] == "groups":
            grid["axes"][0]["points"] = [x * wide for x in grid["axes"][0]["points"]]
    return {"origin": _own("attention of torch, heads of 128", mine), **grids}


AXES = {"prompts": "batch_size", "heads": "num_heads", "tokens": "isl"}
"""What axes are called in device files, where that differs."""


def _named(grid: dict[str, Any]) -> dict[str, Any]:
    for axis in grid["axes"]:
        axis["name"] = AXES.get(axis["name"], axis["name"])
    return grid


def _elementwise(rows: Sequence[Row]) -> dict[str, Any]:
    mine = of_kind(rows, "elementwise")
    curves = {}
    for kind in KINDS:
        some = sorted((r.cell.number("bytes"), r.value) for r in mine if r.cell.where["kernel"] == kind)
        curves[kind] = {"at": [float(b) for b, _ in some], "value": [float(f"{max(s, 1e-9):.4g}") for _, s in some]}
    return {"origin": _own("element-wise kernels of torch", mine), "curves": curves}


def _links(profile: Profile, links: dict[str, Any], base: Device) -> dict[str, Any]:
    """Measured bandwidths; where one is missing, the base's."""
    hardware = profile.facts.hardware
    assert hardware is not None
    seen = hardware.links
    host = seen.get("pinned") or seen.get("pageable")
    disk = seen.get("disk-cold") or seen.get("disk-warm")
    made = dict(links)
    if host is not None:
        made["host_bytes_per_s"] = host.alone.value
    if disk is not None:
        made |= {"disk_bytes_per_s": disk.alone.value, "disk_plain_bytes_per_s": disk.alone.value}
    if host is None and disk is None:
        return _taken(made, base)
    origin = Origin(
        source=f"measured by heliosim calibrate: {', '.join(seen)}",
        licence="your own",
        fitted_range="one device loading",
        derivation="" if host is not None and disk is not None else f"the rest is taken from {base.name}",
    )
    return {**made, "origin": origin.model_dump()}


def _power(profile: Profile, power: dict[str, Any], base: Device) -> dict[str, Any]:
    hardware = profile.facts.hardware
    assert hardware is not None
    windows = {w.phase: w.mean_w for model in hardware.models.values() for w in model.energy}
    if hardware.idle_w is None or "decode" not in windows:
        return _taken(power, base)
    made = {**power, "idle_w": hardware.idle_w.value, "decode_w": windows["decode"]}
    made["prefill_w"] = windows.get("prefill", windows["decode"])
    made["limit_w"] = max(made["limit_w"], made["prefill_w"], made["decode_w"])
    origin = Origin(
        source="measured by heliosim calibrate: energy windows", licence="your own", fitted_range="5 s each"
    )
    return {**made, "origin": origin.model_dump()}
