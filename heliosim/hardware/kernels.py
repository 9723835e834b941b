"""Seconds of single kernels on a device: the curves of a device file, read between their points, and the roofline.

Derived rather than fitted: **float32** products run without TF32, so the efficiency of half precision is read where it
is as far from the ridge of the roofline (m scaled by the ratio of the ridges, k doubled: the same bytes) and applied to
float32's roofline; attention over float32 or over heads of other than 128 counts as that of as many bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from heliosim.hardware.architecture import ITEM_BYTES
from heliosim.hardware.device import Curve, Device, Grid
from heliosim.types import Seconds

HEAD_DIM = 128
"""Width of a head in the attention tables."""


class Kernels:
    """Kernel times of one device in one dtype. Outside a curve its end's efficiency (or slope) holds."""

    def __init__(self, device: Device, dtype: str) -> None:
        self.device, self.dtype, self.item = device, dtype, ITEM_BYTES[dtype]
        self._peak, self._base_peak = device.flops[dtype], device.flops[device.gemm.dtype]
        self.ridge = max(1.0, self._base_peak / self._peak * ITEM_BYTES[dtype] / ITEM_BYTES[device.gemm.dtype])

    def roofline(self, m: float, n: float, k: int) -> Seconds:
        """Data-sheet seconds of a product: whichever is more, arithmetic or one pass over its three matrices."""
        moved = self.item * (n * k + m * (n + k))
        return max(2.0 * m * n * k / self._peak, moved / self.device.bytes_per_s)

    def gemm(self, m: float, n: float, k: int) -> Seconds:
        """``m`` tokens times an ``n`` by ``k`` matrix. One with more outputs than the table has (a head over a large
        vocabulary) is taken as several equal ones.
        """
        m, widest = max(1.0, m), self.device.gemm.efficiency.axes[1].points[-1]
        if n > widest:
            pieces = math.ceil(n / widest)
            return pieces * self.gemm(m, n / pieces, k)
        at = (m * self.ridge, n, k * self.item / 2)
        return self.roofline(m, n, k) / on_grid(self.device.gemm.efficiency, at, logs=(True, True, True), values=False)

    def decode_attention(self, rows: float, context: float, heads: int, kv_heads: int, head_dim: int) -> Seconds:
        """One layer: ``rows`` queries over ``context`` tokens each."""
        table = self.device.decode.mha if heads == kv_heads else self.device.decode.gqa
        groups = rows * kv_heads * head_dim * self.item / (2 * HEAD_DIM)
        return on_grid(table, (groups, max(1.0, context)), logs=(True, False), values=True)

    def prefill_attention(self, prompts: float, tokens: float, heads: int, kv_heads: int, head_dim: int) -> Seconds:
        """One layer: ``prompts`` whole prompts of ``tokens`` each. Arithmetic-bound: float32 by the peaks' ratio."""
        table = self.device.prefill.mha if heads == kv_heads else self.device.prefill.gqa
        equal = max(1.0, heads * head_dim / HEAD_DIM)
        seconds = on_grid(table, (prompts, equal, max(1.0, tokens)), logs=(True, True, True), values=True)
        return seconds * max(1.0, self._base_peak / self._peak)

    def elementwise(self, kind: str, moved_bytes: float) -> Seconds:
        return on_curve(self.device.elementwise.curves[kind], moved_bytes)

    def all_reduce(self, backend: str, gpus: int, moved_bytes: float) -> Seconds:
        """One all-reduce among ``gpus`` of a node; degrees between those known are interpolated."""
        if gpus == 1:
            return 0.0
        curves = self.device.all_reduce[backend].gpus  # type: ignore[index]
        known = sorted(curves)
        low = max((g for g in known if g <= gpus), default=known[0])
        high = min((g for g in known if g >= gpus), default=known[-1])
        first = on_curve(curves[low], moved_bytes)
        if low == high:
            return first
        return first + (on_curve(curves[high], moved_bytes) - first) * (gpus - low) / (high - low)


def on_curve(curve: Curve, at: float) -> float:
    """Log-log between points; level below the first, proportional beyond the last."""
    if at >= curve.at[-1]:
        return curve.value[-1] * at / curve.at[-1]
    return math.exp(float(np.interp(math.log(max(at, curve.at[0])), np.log(curve.at), np.log(curve.value))))


def on_grid(grid: Grid, at: Sequence[float], *, logs: Sequence[bool], values: bool) -> float:
    """Multilinear in the coordinates (in logarithms where ``logs``), of logarithms of the values.

    The axis without logarithm is read linearly in the plain values. ``values`` False: level outside the grid (an
    efficiency). True (seconds): level below the first point, proportional beyond the last.
    """
    sizes = [len(axis.points) for axis in grid.axes]
    corners: list[list[tuple[int, float]]] = []
    beyond = 1.0
    for axis_points, x, is_log in zip(grid.axes, at, logs, strict=True):
        points = axis_points.points
        if x > points[-1] and values:
            beyond *= x / points[-1]
        x = min(max(x, points[0]), points[-1])
        high = min(max(1, int(np.searchsorted(points, x))), len(points) - 1)
        a, b = points[high - 1], points[high]
        share = math.log(x / a) / math.log(b / a) if is_log else (x - a) / (b - a)
        corners.append([(high - 1, 1.0 - share), (high, share)])
    plain = [axis for axis, is_log in enumerate(logs) if not is_log]
    total = 0.0
    for line in product(*(corners[axis] for axis in plain)):
        logarithm = 0.0
        for rest in product(*(corners[axis] for axis in range(len(sizes)) if axis not in plain)):
            index, weight, others, lines = 0, 1.0, iter(rest), iter(line)
            for axis, size in enumerate(sizes):
                position, share = next(lines) if axis in plain else next(others)
                index = index * size + position
                weight *= 1.0 if axis in plain else share
            if weight:
                logarithm += weight * math.log(grid.values[index])
        total += math.prod(share for _, share in line) * math.exp(logarithm)
    return total * beyond
