"""Devices: how well a GPU does what a transformer step is made of. A strict JSON file of curves, each with its origin.

Every curve says where it comes from, under which licence, over what range, and how far it was off on points it was not
fitted to (one in five, chosen by hash), by region. Curves are tables; between their points

- a matrix product's **efficiency** (roofline seconds over real seconds) is linear in log m, log n, log k;
- attention seconds are linear in context and in log-log of everything else;
- element-wise and all-reduce seconds are log-log in bytes.

What a file does not hold (float32, other head sizes) is derived by the roofline: see ``kernels.py``.
"""

from __future__ import annotations

from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import Strict, read_json, validate

SCHEMA_VERSION = 1
Backend = Literal["custom", "nccl"]
ELEMENTWISE = ("norm", "rope", "activation", "add")
PRESETS = ("graph", "compiled", "eager")
"""Host presets that every device has."""


class Finite(Strict):
    """Part of a device file, in which every number is finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class Errors(Finite):
    """Relative errors on points held out of the fit."""

    points: int
    median_abs: float
    p90_abs: float
    mean_signed: float


class Origin(Finite):
    """Where a curve comes from and how well it fits."""

    source: str
    url: str = ""
    licence: str
    fitted_range: str
    points: int = 0
    holdout: dict[str, Errors] = Field(default_factory=dict, description="by region")
    derivation: str = Field(default="", description="how it was derived, where it was not fitted to this device")


class Curve(Finite):
    """Values over one quantity, both positive, ascending."""

    at: tuple[float, ...]
    value: tuple[float, ...]

    @model_validator(mode="after")
    def _is_a_curve(self) -> Curve:
        if len(self.at) != len(self.value) or len(self.at) < 2:
            raise ValueError("a curve has two or more points, each with a value")
        if any(a >= b for a, b in pairwise(self.at)) or min(self.at) <= 0:
            raise ValueError("the points of a curve must be positive and ascending")
        if min(self.value) <= 0:
            raise ValueError("the values of a curve must be positive")
        return self


class Axis(Finite):
    """One axis of a grid: what it counts, and its points."""

    name: str
    points: tuple[float, ...]


class Grid(Finite):
    """Values on a grid, the last axis innermost."""

    axes: tuple[Axis, ...]
    values: tuple[float, ...]

    @model_validator(mode="after")
    def _is_full(self) -> Grid:
        size = 1
        for axis in self.axes:
            points = axis.points
            if len(points) < 2 or any(a >= b for a, b in pairwise(points)) or points[0] <= 0:
                raise ValueError(f"axis {axis.name} must be two or more positive, ascending points")
            size *= len(points)
        if size != len(self.values):
            raise ValueError(f"the axes make {size} cells, but there are {len(self.values)} values")
        if min(self.values) <= 0:
            raise ValueError("the values of a grid must be positive")
        return self


class Gemm(Finite):
    """Efficiency of matrix products by tokens m, output features n, input features k."""

    origin: Origin
    dtype: str
    efficiency: Grid


class OlderGemm(Finite):
    """Seconds of products with the libraries of 2023 over those of the curves, against tokens."""

    origin: Origin
    stretch: Curve


class Attention(Finite):
    """Seconds of one layer's attention. ``mha``: as many KV heads as heads; ``gqa``: fewer.

    Decode: by KV groups (rows times KV heads of 128) and context. Prefill: by prompts, query heads of 128 and tokens.
    """

    origin: Origin
    mha: Grid
    gqa: Grid


class Elementwise(Finite):
    """Seconds of one kernel by bytes read and written."""

    origin: Origin
    curves: dict[str, Curve]

    @field_validator("curves")
    @classmethod
    def _known(cls, value: dict[str, Curve]) -> dict[str, Curve]:
        if set(value) != set(ELEMENTWISE):
            raise ValueError(f"curves must be exactly {', '.join(ELEMENTWISE)}")
        return value


class AllReduce(Finite):
    """Seconds by bytes, for each number of GPUs of one node."""

    origin: Origin
    gpus: dict[int, Curve] = Field(min_length=1)


class Host(Finite):
    """What an engine's host side adds: a preset of an engine and its era.

    A layer takes no less than ``layer_s`` (launches, which the device's work hides); ``step_s`` per step, ``row_s`` per
    row and ``prompt_s`` per request that starts come on top, as the device waits meanwhile. ``sync_s``: what an
    all-reduce takes beyond its kernel for each doubling of the ranks (launched apart, ranks wait for the slowest).
    ``activation_widths``: hidden widths per prompt token that its buffers hold at once, beside weights and KV; 0 where
    nothing is known. ``is_fused`` False: prefill attention writes its scores to memory, and biases and transposes are
    kernels of their own. ``copies_kv``: each decode step writes all KV anew (a cache that is concatenated).
    ``has_older_gemm``: its matrix products are those of the libraries of 2023.
    """

    origin: Origin
    all_reduce: Backend
    step_s: float = Field(ge=0)
    layer_s: float = Field(ge=0)
    row_s: float = Field(default=0.0, ge=0)
    prompt_s: float = Field(default=0.0, ge=0)
    sync_s: float = Field(default=0.0, ge=0)
    activation_widths: float = Field(default=0.0, ge=0)
    is_fused: bool = True
    has_older_gemm: bool = False
    copies_kv: bool = False


class Links(Finite):
    """Bytes per second on the ways weights come to the device."""

    origin: Origin
    host_bytes_per_s: float = Field(gt=0, description="pinned host memory to device")
    disk_bytes_per_s: float = Field(gt=0, description="local disk to device, a loader made for it")
    disk_plain_bytes_per_s: float = Field(gt=0, description="local disk to device, plain safetensors")


class Power(Finite):
    """Watts of one GPU: idle, while the kernels of decode steps run, and while it reads prompts."""

    origin: Origin
    limit_w: float = Field(gt=0)
    idle_w: float = Field(ge=0)
    decode_w: float = Field(gt=0)
    prefill_w: float = Field(gt=0)

    @property
    def decode_share(self) -> float:
        """Share of the limit while the kernels of decode steps run."""
        return self.decode_w / self.limit_w


class Device(Finite):
    """One GPU model, as a file holds it."""

    schema_version: Literal[1]
    name: str
    memory_bytes: int = Field(gt=0)
    bytes_per_s: float = Field(gt=0, description="data-sheet memory bandwidth")
    flops: dict[str, float] = Field(description="data-sheet peak by dtype, without sparsity; float32 without TF32")
    data_sheet: Origin
    gemm: Gemm
    gemm_2023: OlderGemm
    decode: Attention
    prefill: Attention
    elementwise: Elementwise
    all_reduce: dict[Backend, AllReduce]
    hosts: dict[str, Host]
    links: Links
    power: Power

    @field_validator("flops")
    @classmethod
    def _known_dtypes(cls, value: dict[str, float]) -> dict[str, float]:
        if set(value) != {"float32", "float16", "bfloat16"} or min(value.values()) <= 0:
            raise ValueError("peaks must be given for float32, float16 and bfloat16")
        return value

    @field_validator("hosts")
    @classmethod
    def _has_presets(cls, value: dict[str, Host]) -> dict[str, Host]:
        if absent := [p for p in PRESETS if p not in value]:
            raise ValueError(f"the host preset {absent[0]} is missing")
        return value

    @model_validator(mode="after")
    def _has_all_reduces(self) -> Device:
        for name, host in self.hosts.items():
            if host.all_reduce not in self.all_reduce:
                raise ValueError(f"host {name} uses the all-reduce {host.all_reduce}, which is missing")
        return self

    def host(self, preset: str) -> Host:
        if preset not in self.hosts:
            raise UnknownNameError(f"device {self.name}: host", preset, self.hosts)
        return self.hosts[preset]

    def origins(self) -> dict[str, Origin]:
        """Where each part comes from, by name."""
        parts: dict[str, Origin] = {"data sheet": self.data_sheet, "gemm": self.gemm.origin}
        parts |= {"gemm, libraries of 2023": self.gemm_2023.origin}
        parts |= {"decode attention": self.decode.origin, "prefill attention": self.prefill.origin}
        parts |= {"element-wise": self.elementwise.origin}
        parts |= {f"all-reduce {name}": part.origin for name, part in self.all_reduce.items()}
        parts |= {f"host {name}": host.origin for name, host in self.hosts.items()}
        return parts | {"links": self.links.origin, "power": self.power.origin}


def shipped_devices() -> dict[str, Path]:
    """Devices in the package, by name."""
    root = Path(str(resources.files("heliosim.devices")))
    return {path.stem: path for path in sorted(root.glob("*.json"))}


def open_device(name_or_path: str | Path) -> Device:
    """A device by shipped name (in any case) or by file."""
    shipped = {name.lower(): path for name, path in shipped_devices().items()}
    text = str(name_or_path)
    if text.lower() in shipped:
        return read_device(shipped[text.lower()])
    path = Path(name_or_path).expanduser()
    if path.suffix == ".json" or len(path.parts) > 1:
        return read_device(path)
    raise UnknownNameError("device", text, shipped_devices())


def read_device(path: Path) -> Device:
    """Read and check a device file. Raises InputError naming file, field and remedy."""
    if not path.is_file():
        raise InputError(str(path), path.name, "no such device file", "Give a shipped name or a device file.")
    raw = read_json(path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        remedy = "Make the file again with scripts/fit_devices.py."
        raise InputError(f"{path}: schema_version", version, f"this version reads {SCHEMA_VERSION}", remedy)
    return validate(Device, raw, str(path))
