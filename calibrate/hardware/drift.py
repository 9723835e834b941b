"""Notices when the machine is not what it was: a reference cell read again and again, and what the sensors say.

Clocks fall when a device gets hot, and neighbours come and go. The reference is one pass that never changes; while it
takes longer or shorter than usual by more than ``tolerance``, what was measured since it was last as usual is thrown
away and measured again.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .bench import Bench, Shape

TOLERANCE = {True: 0.05, False: 0.20}
"""By whether the device is a GPU: how far the reference may be from its usual time."""
READS = 9
EVERY_S = 0.4
MOST_TRIES = 3

Sensors = Mapping[str, float | int | str]


@dataclass
class Reference:
    """The reference pass of one bench. ``usual_s``: the median of its readings so far."""

    bench: Bench
    readings: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._call = self.bench.best(self.bench.through(Shape(decode=1, context=16), 0, self.bench.layers))
        self.tolerance = TOLERANCE[self.bench.timer.is_cuda]
        self.read_at = 0.0

    @property
    def usual_s(self) -> float:
        return float(np.median(self.readings))

    @property
    def is_due(self) -> bool:
        return time.perf_counter() - self.read_at > EVERY_S

    def read(self) -> float:
        """Take a reading; returns it over the usual time (1: as always)."""
        seconds = float(np.median(self.bench.timer.repeated(self._call, READS, warm_up=3)))
        self.readings.append(seconds)
        self.read_at = time.perf_counter()
        return seconds / self.usual_s

    def is_usual(self, ratio: float) -> bool:
        return abs(ratio - 1.0) <= self.tolerance


def sensors(device: str) -> Sensors:
    """Clocks, temperature, power limit and driver of a GPU, or what a CPU shows of the kind; nothing where nothing can
    be read.
    """
    return _gpu(device) if device.startswith("cuda") else _cpu()


def _gpu(device: str) -> Sensors:
    fields = {
        "clocks.sm": "sm_clock_mhz", "clocks.mem": "memory_clock_mhz", "clocks.max.sm": "max_sm_clock_mhz",
        "temperature.gpu": "temperature_c", "power.draw": "power_w", "power.limit": "power_limit_w",
        "driver_version": "driver", "clocks_throttle_reasons.active": "throttle_reasons",
    }  # fmt: skip
    index = device.partition(":")[2] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [part.strip() for part in said.strip().split(",")]
    return {name: _number(value) for name, value in zip(fields.values(), values, strict=False)}


def _cpu() -> Sensors:
    found: dict[str, float | int | str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        clocks = [float(x.partition(":")[2]) for x in lines if x.startswith("cpu MHz")]
        if clocks:
            found["clock_mhz"] = round(float(np.mean(clocks)), 1)
    if hasattr(os, "getloadavg"):
        found["load_1min"] = round(os.getloadavg()[0], 2)
    zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))
    temperatures = [_temperature(path) for path in zones]
    if known := [t for t in temperatures if t is not None]:
        found["temperature_c"] = max(known)
    return found


def _temperature(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1000
    except (OSError, ValueError):
        return None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
