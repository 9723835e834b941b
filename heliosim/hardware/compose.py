"""Compose what a model costs on a device: sizes of one rank, curves and terms of a step, load times, and their range.

The kernels of a step are added up (``steps.py``) and brought into the form of a profile's costs:

- ``curves``: seconds of one layer's dense work (products, element-wise kernels, all-reduces) against the step's tokens,
  and of one check or final head against its rows, read linearly between the points;
- terms: attention linear in rows and in the context really held (decode), in prompts and token-context products
  (prefill), the host's work per step, row and starting request, and the KV fill per skipped layer.

The lines of attention are least squares of relative errors of whole layers over the range; how far the terms are from
the kernels they were made of is in ``line_errors``. That is no error against a running engine: see
docs/validation-composed.md for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from heliosim.errors import InputError, OutOfRangeError
from heliosim.hardware.architecture import Architecture, ExitHead
from heliosim.hardware.device import Device
from heliosim.hardware.steps import StepTimes
from heliosim.types import Bytes, Seconds

MAX_ROWS, MAX_TOKENS = 512, 8192
MAX_CONTEXT = 32_768
TOKEN_POINTS = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
ROW_POINTS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
CONTEXT_POINTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
LENGTH_POINTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TYPICAL = (8, 512)
"""Decode rows and context of the step whose share of waiting stands for all, where power is asked for."""
KV_SHARE = 0.9
"""Share of the device's memory that weights and KV may fill in the steps that the attention line is fitted to."""
WORKSPACE_BYTES = 32 * 2**20
"""Scratch memory of matrix products: a choice, about what frameworks give the libraries that do them."""

Points = tuple[tuple[float, Seconds], ...]


@dataclass(frozen=True)
class Exits:
    """Exit layers (the last layer is always one). ``fixed``: trained heads; ``anywhere``: the model's own."""

    layers: tuple[int, ...] = ()
    kind: str = "anywhere"
    head: ExitHead | None = None


@dataclass(frozen=True)
class LineErrors:
    """Relative errors of curves and terms against the kernels they were made of, over a region's layers."""

    points: int
    median_abs: float
    p90_abs: float
    mean_signed: float


@dataclass(frozen=True)
class ComposedModel:
    """Facts of one model on one device, of **one rank**. Seconds per unit of each term; names as in ``costs.TERMS``."""

    name: str
    architecture: str
    device: str
    dtype: str
    tensor_parallel: int
    host: str
    layers: int
    exits: tuple[int, ...]
    exit_kind: str
    layer_bytes: Bytes
    base_bytes: Bytes
    exit_head_bytes: Mapping[int, Bytes]
    kv_bytes_per_token_layer: Bytes
    hidden_bytes: Bytes
    activation_bytes_per_token: Bytes
    activation_source: str
    workspace_bytes: Bytes
    max_context: int
    vocabulary: str
    seconds_per: Mapping[str, Seconds]
    curves: Mapping[str, Points]
    load_seconds_per: Mapping[str, Seconds]
    disk_seconds_per_byte: Seconds
    watts: Mapping[str, float]
    fitted_rows: int
    fitted_context: int
    fitted_tokens: int
    line_errors: Mapping[str, LineErrors]
    assumptions: tuple[str, ...]

    def layer_seconds(self, tokens: float) -> Seconds:
        return _along(self.curves["layer"], tokens)

    def head_seconds(self, rows: float) -> Seconds:
        return _along(self.curves["head"], rows)

    def out_of_range(self, *, rows: float = 0, context: float = 0, tokens: float = 0) -> str | None:
        """What of a step lies outside the fitted range, in words; None if nothing does."""
        limits = (("rows", rows, self.fitted_rows), ("context", context, self.fitted_context))
        for what, value, limit in (*limits, ("tokens", tokens, self.fitted_tokens)):
            if value > limit:
                return f"{value:g} {what} in a step, fitted to {limit}"
        return None

    def step_seconds(
        self,
        *,
        decode_rows: int = 0,
        context: float = 0,
        prompts: Sequence[tuple[int, int]] = (),
        depth: int | None = None,
        allow_extrapolation: bool = False,
    ) -> Seconds:
        """One step: ``decode_rows`` rows over ``context`` tokens each, and prompt chunks (tokens, end of the chunk).

        Raises OutOfRangeError outside the fitted range unless ``allow_extrapolation``.
        """
        rows, tokens = decode_rows + len(prompts), decode_rows + sum(count for count, _ in prompts)
        longest = max([context * (decode_rows > 0), *(end for _, end in prompts)], default=0)
        outside = self.out_of_range(rows=rows, context=longest, tokens=tokens)
        if outside and not allow_extrapolation:
            where = f"{self.name} on {self.device}"
            raise OutOfRangeError(where, outside, "outside the fitted range", "Allow extrapolation, or ask for less.")
        per, depth = self.seconds_per, self.layers if depth is None else depth
        layer = self.layer_seconds(tokens)
        if decode_rows:
            layer += per["layer_decode"] + per["layer_decode_row"] * decode_rows
            layer += per["layer_decode_context"] * decode_rows * context
            layer += per["layer_decode_many"] * (decode_rows > 1)
        layer += per["layer_prefill_row"] * len(prompts)
        layer += per["layer_prefill_kv"] * sum(count * end for count, end in prompts)
        started = sum(count == end for count, end in prompts)
        host = per["step"] + per["row"] * rows + per["started"] * started
        return host + depth * layer + self.head_seconds(rows)


def compose_model(
    architecture: Architecture,
    device: Device,
    *,
    dtype: str = "bf16",
    tp: int = 1,
    exits: Exits | Sequence[int] = (),
    host: str = "graph",
) -> ComposedModel:
    """Facts of ``architecture`` over ``tp`` ranks of ``device``, in ``dtype``, under an engine's ``host`` preset."""
    times = StepTimes.of(architecture, device, dtype=dtype, tp=tp, host=host)
    wanted = exits if isinstance(exits, Exits) else Exits(tuple(exits))
    layers = exit_layers(architecture, wanted)
    kv_bytes = architecture.kv_bytes(dtype, tp)
    context = min(architecture.max_context, MAX_CONTEXT)
    terms, errors = _lines(times, context)
    widths = times.host.activation_widths
    fitted = (round(widths * architecture.hidden_bytes(dtype)), f"{widths:g} hidden widths, of the preset {host}")
    activations, source = fitted if widths else (_activation_bytes(times), "by the model's shapes, buffers used again")
    own = {} if wanted.head is None else {e: wanted.head for e in layers if e < architecture.layers}
    return ComposedModel(
        name=architecture.name,
        architecture=architecture.family,
        device=device.name,
        dtype=times.dtype,
        tensor_parallel=tp,
        host=host,
        layers=architecture.layers,
        exits=layers,
        exit_kind=wanted.kind,
        layer_bytes=architecture.layer_bytes(dtype, tp),
        base_bytes=architecture.base_bytes(dtype, tp),
        exit_head_bytes={e: architecture.exit_head_bytes(head, dtype, tp) for e, head in own.items()},
        kv_bytes_per_token_layer=kv_bytes,
        hidden_bytes=architecture.hidden_bytes(dtype),
        activation_bytes_per_token=activations,
        activation_source=source,
        workspace_bytes=WORKSPACE_BYTES,
        max_context=architecture.max_context,
        vocabulary=architecture.vocabulary_name,
        seconds_per=terms,
        curves=_curves(times, terms),
        load_seconds_per={
            "load": 0.0,
            "layer": 0.0,
            "weights_byte": 1 / device.links.host_bytes_per_s,
            "kv_byte": 0.0,
            "extend_token_layer": (times.dense(MAX_TOKENS) - times.dense(MAX_TOKENS / 2)) / (MAX_TOKENS / 2),
        },
        disk_seconds_per_byte=1 / device.links.disk_bytes_per_s,
        watts=_watts(times, device),
        fitted_rows=MAX_ROWS,
        fitted_context=context,
        fitted_tokens=MAX_TOKENS,
        line_errors=errors,
        assumptions=_assumptions(architecture, device, times, wanted),
    )


def exit_layers(architecture: Architecture, exits: Exits) -> tuple[int, ...]:
    """The exit layers, checked, with the last layer."""
    layers = architecture.layers
    for layer in exits.layers:
        if not 1 <= layer <= layers:
            raise InputError("exits", layer, f"{architecture.name} has {layers} layers", f"Give 1 to {layers}.")
    if exits.kind not in ("fixed", "anywhere"):
        raise InputError("exits.kind", exits.kind, "unknown kind of exits", "Use fixed or anywhere.")
    return tuple(sorted({*exits.layers, layers}))


def _activation_bytes(times: StepTimes) -> Bytes:
    """Bytes per token that one rank holds at most while a layer is computed: the residual and the normed hidden states,
    and either QKV with the output of attention or the MLP's inner widths (what is activated, the result, and the gate
    if there is one). Layers use the same buffers one after the other. Logits are left out: few rows have any.
    """
    a, tp = times.architecture, times.tp
    q, kv = a.rank_heads(tp) * a.head_dim, a.rank_kv_heads(tp) * a.head_dim
    inner = (3 if a.is_gated else 2) * (a.mlp // tp)
    return times.kernels.item * (2 * a.hidden + max(2 * q + 2 * kv, inner))


def _watts(times: StepTimes, device: Device) -> dict[str, float]:
    """Mean watts of **one** GPU of the group: idle, in decode steps, and while reading prompts. While it waits for the
    host between kernels it draws idle power; shares are those of decode steps of ``TYPICAL``, prompts of 512.
    """
    power, layers, (rows, context) = device.power, times.architecture.layers, TYPICAL
    kernels = layers * (times.dense(rows) + times.decode_attention(rows, context)) + times.head(rows)
    busy = min(1.0, kernels / times.decode_step(rows, context))
    reading = layers * (times.dense(512) + times.prefill_attention(1, 512)) + times.head(1)
    read = min(1.0, reading / times.prefill_step(1, 512))
    return {
        "idle": power.idle_w,
        "decode": power.idle_w + busy * (power.decode_w - power.idle_w),
        "prefill": power.idle_w + read * (power.prefill_w - power.idle_w),
    }


# --- curves and lines ------------------------------------------------------------------------------------------------


def _curves(times: StepTimes, terms: Mapping[str, Seconds]) -> dict[str, Points]:
    """Launches hide behind the device's work: a layer's curve holds what they take beyond the least attention."""
    least = _least_dense(times, terms)
    layer = tuple((float(t), max(least, times.dense(t))) for t in TOKEN_POINTS)
    return {"layer": layer, "head": tuple((float(r), times.head(r)) for r in ROW_POINTS)}


def _least_dense(times: StepTimes, terms: Mapping[str, Seconds]) -> Seconds:
    """Below this no layer's curve goes, because of its launches. Attention adds to it, although launches would hide
    some of that too: ``line_errors`` show by how much that is too long.
    """
    return times.host.layer_s - min(terms["layer_decode"] + terms["layer_decode_row"], terms["layer_prefill_row"])


def _lines(times: StepTimes, max_context: int) -> tuple[dict[str, Seconds], dict[str, LineErrors]]:
    a = times.architecture
    room = KV_SHARE * times.device.memory_bytes - a.weights_bytes(times.dtype, tp=times.tp)
    tokens = max(MAX_TOKENS, room / (a.layers * a.kv_bytes(times.dtype, times.tp)))
    contexts = [c for c in CONTEXT_POINTS if c < max_context] + [max_context]
    decode = [(r, c) for r, c in product(ROW_POINTS, contexts) if r * c <= tokens]
    lengths = [n for n in LENGTH_POINTS if n <= max_context]
    prefill = [(p, n) for p, n in product((1, 2, 4, 8, 16, 32, 64), lengths) if p * n <= MAX_TOKENS]
    y = np.array([times.decode_attention(r, c) for r, c in decode])
    base = np.array([times.dense(r) for r, _ in decode])
    x = np.array([[1.0, r > 1, r, r * c] for r, c in decode])
    first = relative_nnls(x, y, base + y)
    y2 = np.array([times.prefill_attention(p, n) for p, n in prefill])
    base2 = np.array([times.dense(p * n) for p, n in prefill])
    x2 = np.array([[float(p), float(p * n * n)] for p, n in prefill])
    second = relative_nnls(x2, y2, base2 + y2)
    counts = np.array(TOKEN_POINTS[:15], float)
    fills = np.array([times.fill(t) for t in counts])
    fill = relative_nnls(np.stack([np.ones_like(counts), counts], axis=1), fills, fills)
    host = times.host
    terms = {
        "step": host.step_s,
        "row": host.row_s,
        "started": host.prompt_s,
        "layer_decode": first[0],
        "layer_decode_many": first[1],
        "layer_decode_row": first[2],
        "layer_decode_context": first[3],
        "layer_prefill_row": second[0],
        "layer_prefill_kv": second[1],
        "fill_layer": fill[0],
        "fill_layer_token": fill[1],
    }
    least = _least_dense(times, terms)
    errors = {
        "decode layers": _errors((np.maximum(least, base) + x @ first) / np.maximum(host.layer_s, base + y) - 1),
        "prefill layers": _errors((np.maximum(least, base2) + x2 @ second) / np.maximum(host.layer_s, base2 + y2) - 1),
        "KV fill": _errors(np.stack([np.ones_like(counts), counts], axis=1) @ fill / fills - 1),
    }
    return {name: float(value) for name, value in terms.items()}, errors


def relative_nnls(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Non-negative least squares of (prediction - y) / scale."""
    from scipy.optimize import nnls

    widths = np.maximum(np.abs(x).max(axis=0), 1e-300)
    return np.asarray(nnls(x / widths / scale[:, None], y / scale)[0] / widths)


def _errors(errors: np.ndarray) -> LineErrors:
    size = np.abs(errors)
    return LineErrors(len(errors), float(np.median(size)), float(np.percentile(size, 90)), float(errors.mean()))


def _along(points: Points, at: float) -> float:
    """Linear between the points, level below the first, straight on beyond the last."""
    x, y = zip(*points, strict=True)
    if at > x[-1]:
        return float(y[-1] + (y[-1] - y[-2]) / (x[-1] - x[-2]) * (at - x[-1]))
    return float(np.interp(at, x, y))


def _assumptions(architecture: Architecture, device: Device, times: StepTimes, exits: Exits) -> tuple[str, ...]:
    found = [
        "kernel times are added up: none overlap but the launches that the device's work hides",
        "attention is linear in rows and context (decode) and in prompts and products (prefill)",
        f"weights come from pinned host memory at {device.links.host_bytes_per_s / 1e9:g} GB/s for each rank",
    ]
    found.append(
        f"beside weights and KV a step holds its activations and {WORKSPACE_BYTES >> 20} MiB of workspace (assumed); "
        "CUDA graphs, logits and what the driver keeps are not counted: a budget leaves room for them"
    )
    if times.dtype == "float32":
        found.append("float32 is derived from half precision: no TF32, the same share of the roofline, twice the bytes")
    if architecture.head_dim != 128:
        found.append(f"attention over heads of {architecture.head_dim} counts as that of as many bytes in heads of 128")
    if exits.kind == "fixed" and exits.head is not None and exits.head.mlp_width:
        found.append("an exit check costs a norm and the output head; the MLP of an exit head is counted in bytes only")
    for part, origin in device.origins().items():
        if origin.derivation and (not part.startswith("host ") or part == f"host {times.host}"):
            found.append(f"{part}: {origin.derivation}")
    return tuple(found)
