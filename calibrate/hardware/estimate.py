"""How long a calibration will take: every cell from the shapes of the model and the speed of the device.

On a GPU whose device file is shipped, layers and heads take what a composed profile says (``heliosim.hardware``); on
others, and on CPUs, a roofline of nominal speeds. An estimate to plan by, no measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heliosim.hardware.architecture import Architecture, dtype_name
from heliosim.hardware.device import Device
from heliosim.hardware.steps import StepTimes
from heliosim.types import ModelSpec, Seconds

from ..plan import points
from . import grid
from .bench import GPU_LAYERS, Shape
from .cell import AT_LEAST, Cell
from .grid import LAYER_KINDS, Extent
from .links import LOADS, MOST_BYTES
from .passes import shape_of
from .power import WINDOW_S

SETUP_S = {True: 0.25, False: 0.004}
"""Around the samples of a cell: tensors, capture, warm-up; on a GPU and on a CPU."""
REFERENCE = 1.08
"""Share of readings of the reference and of cells measured again, on top."""


@dataclass(frozen=True)
class Nominal:
    """A CPU thread, about: bytes/s, flop/s, seconds a layer takes for its calls."""

    bytes_per_s: float = 10e9
    flops: float = 60e9
    layer_s: float = 50e-6
    link_bytes_per_s: float = 8e9
    disk_bytes_per_s: float = 1e9


@dataclass(frozen=True)
class Speed:
    """Seconds of parts of a step of one model. ``attend``: a layer's attention of decode rows over context."""

    layer: Callable[[Shape], Seconds]
    head: Callable[[int], Seconds]
    link_bytes_per_s: float
    disk_bytes_per_s: float
    memory_bytes_per_s: float
    is_gpu: bool
    layers: int
    step_s: Seconds


def speed_on(device: Device, architecture: Architecture, dtype: str) -> Speed:
    """By the device's efficiency curves."""
    times = StepTimes.of(architecture, device, dtype=dtype_name(dtype))

    def layer(s: Shape) -> Seconds:
        attention = times.decode_attention(s.decode, s.context) if s.decode else 0.0
        attention += times.prefill_attention(1, s.prefix + s.count) if s.count else 0.0
        return times.layer(max(1, s.tokens), attention)

    links = device.links
    return Speed(
        layer,
        times.head,
        links.host_bytes_per_s,
        links.disk_plain_bytes_per_s,
        device.bytes_per_s,
        True,
        min(architecture.layers, GPU_LAYERS),
        times.host.step_s,
    )


def nominal_speed(spec: ModelSpec, dtype_bytes: int, cpu: Nominal | None = None) -> Speed:
    """By a roofline of a nominal CPU thread."""
    c = cpu or Nominal()

    def layer(s: Shape) -> Seconds:
        flops = 2.0 * spec.layer_bytes / dtype_bytes * s.tokens
        kv = spec.kv_bytes_per_token_layer * (s.decode * s.context + s.prefix + s.count)
        return c.layer_s + max(flops / c.flops, spec.layer_bytes / c.bytes_per_s) + 4 * kv / c.bytes_per_s

    def head(rows: int) -> Seconds:
        return 20e-6 + spec.base_bytes / c.bytes_per_s + 2.0 * spec.base_bytes / dtype_bytes * rows / c.flops

    return Speed(layer, head, c.link_bytes_per_s, c.disk_bytes_per_s, c.bytes_per_s, False, spec.layers, 1e-4)


class Estimator:
    """Seconds of cells of one model (or of the machine, measured with its weights)."""

    def __init__(self, spec: ModelSpec, extent: Extent, speed: Speed) -> None:
        self.spec, self.extent, self.speed = spec, extent, speed
        self.setup_s = SETUP_S[speed.is_gpu]

    def __call__(self, cell: Cell) -> Seconds:
        return REFERENCE * self._seconds(cell)

    def _seconds(self, cell: Cell) -> Seconds:
        speed, spec, n = self.speed, self.spec, cell.number
        forward = speed.layers * speed.layer(Shape(decode=1, context=64))
        if cell.kind in LAYER_KINDS:
            both = (speed.layers + 1) * speed.layer(shape_of(cell))
            return 2 * self.setup_s + self._repeated(both)
        if cell.kind == "host_step":
            return 20 * (spec.layers * speed.layer(Shape(n("rows"), 32)) + speed.head(n("rows")) + speed.step_s)
        if cell.kind == "energy":
            return AT_LEAST * WINDOW_S if self.extent.is_full else 0.0
        if cell.kind == "link":
            return self._link(cell, forward)
        if cell.kind == "layer_load":
            rate = speed.link_bytes_per_s if cell.where["source"] == "host" else speed.disk_bytes_per_s
            again = n("layers") * spec.layer_bytes / speed.disk_bytes_per_s if cell.where["source"] == "disk" else 0.0
            return LOADS * (n("layers") * spec.layer_bytes / rate + again) + 20 * forward
        if cell.kind in ("largest_batch", "kv_blocks"):
            weights = spec.weights_bytes(n("depth")) / speed.link_bytes_per_s
            return weights + 3 * n("budget_bytes") / speed.memory_bytes_per_s + self.setup_s
        if cell.kind == "activations":
            return 2 * AT_LEAST * speed.layers * speed.layer(Shape(count=512)) + self.setup_s
        if cell.kind in ("head", "check", "sampler", "exit_head", "final_norm"):
            return self.setup_s + self._repeated(2 * speed.head(max(1, n("rows"))))
        if cell.kind == "kv_fill":
            return 2 * self.setup_s + self._repeated((speed.layers + 1) * speed.layer(Shape(count=n("tokens") + 1)))
        if cell.kind == "gemm":
            return self.setup_s + self._repeated(8.0 * n("n") * n("k") * 4 / speed.memory_bytes_per_s)
        return self.setup_s + self._repeated(forward)

    def _repeated(self, once: Seconds) -> Seconds:
        repeats = max(AT_LEAST, min(self.extent.repeats, int(self.extent.cell_s / max(once, 1e-6))))
        return once * (repeats + 4)

    def _link(self, cell: Cell, forward: Seconds) -> Seconds:
        if cell.where["source"] == "pinned" and not self.speed.is_gpu:
            return 0.0
        is_disk = str(cell.where["source"]).startswith("disk")
        rate = self.speed.disk_bytes_per_s if is_disk else self.speed.link_bytes_per_s
        size = min(MOST_BYTES[self.extent.is_full], self.spec.weights_bytes(self.spec.layers) if is_disk else 1 << 40)
        window = 0.5 if self.extent.is_full else 0.08
        times = 6 if cell.where["beside"] == "nothing" else 3 * AT_LEAST
        return times * size / rate + (2 * AT_LEAST * max(window, 3 * forward) if times > 6 else 0.0)


def steps_seconds(
    spec: ModelSpec, speed: Speed, threshold: float, max_batch: int, token_budget: int, context: int, rounds: int
) -> tuple[int, Seconds]:
    """Points of the serving loop and about how long their steps take."""
    count, seconds = 0, 0.0
    for point in points(spec, threshold, max_batch, token_budget, context, rounds, 0):
        decoding = sum(point.outputs) / point.rows
        middle = int(sum(point.prompts) / len(point.prompts))
        reading = sum(point.prompts) / max(1, point.token_budget)
        decode = point.mode.depth * speed.layer(Shape(decode=point.rows, context=middle)) + speed.head(point.rows)
        read = point.mode.depth * speed.layer(Shape(count=min(point.token_budget, middle)))
        seconds += decoding * (decode + speed.step_s) + reading * (read + speed.step_s)
        count += 1
    return count, seconds


@dataclass(frozen=True)
class Line:
    """A group of cells: how many, and their seconds."""

    group: str
    cells: int
    seconds: Seconds


def by_group(cells: Sequence[Cell]) -> list[Line]:
    """Cells with estimates by what they are of, in order of first mention."""
    found: dict[str, list[Seconds]] = {}
    for cell in cells:
        found.setdefault(GROUPS.get(cell.kind, cell.kind), []).append(cell.estimate_s)
    return [Line(group, len(some), sum(some)) for group, some in found.items()]


GROUPS = {
    **{kind: f"layers, {kind.partition('_')[0]}" for kind in LAYER_KINDS},
    **dict.fromkeys(("embedding", "final_norm", "head", "exit_head", "sampler", "check", "kv_fill"), "parts of a step"),
    **dict.fromkeys(("host_step", "host_prepare", "ingress", "detokenise", "decision"), "host"),
    **dict.fromkeys(("bytes", "activations", "workspace", "kv_blocks", "largest_batch"), "memory"),
    **dict.fromkeys(("link", "layer_load"), "links and loads"),
    **dict.fromkeys(("gemm", "attention_decode", "attention_prefill", "elementwise", "peak"), "kernels"),
    "graph": "graphs",
    "energy": "energy windows",
}


def estimated(cells: Sequence[Cell], estimators: dict[str, Estimator]) -> list[Cell]:
    """The cells with estimates; those of the machine by the first model's."""
    first = next(iter(estimators.values()))
    return grid.with_estimates(cells, lambda cell: estimators.get(cell.model, first)(cell))
