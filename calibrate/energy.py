"""Energy meters: NVML on NVIDIA devices, RAPL on processors that expose it, and an honest "unavailable" elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from heliosim.formats.profile import Energy

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A cumulative energy counter."""

    source: Literal["nvml", "rapl"]

    def read_j(self) -> float: ...


@dataclass
class Rapl:
    """Sum of the package counters under the Linux powercap tree. Each wraps at its own ``max_energy_range_uj``."""

    folders: list[Path]
    source: Literal["nvml", "rapl"] = "rapl"

    def __post_init__(self) -> None:
        self._last = [self._read(f) for f in self.folders]
        self._total_uj = 0

    def read_j(self) -> float:
        for i, folder in enumerate(self.folders):
            now = self._read(folder)
            step = now - self._last[i]
            if step < 0:
                step += int((folder / "max_energy_range_uj").read_text())
            self._total_uj += step
            self._last[i] = now
        return self._total_uj / 1e6

    @staticmethod
    def _read(folder: Path) -> int:
        return int((folder / "energy_uj").read_text())


class Nvml:
    """Total energy of one GPU since the driver was loaded (Volta and later)."""

    source: Literal["nvml", "rapl"] = "nvml"

    def __init__(self, index: int) -> None:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        self.read_j()

    def read_j(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000.0


def find_meter(device: str, powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """The meter of a device, or None and the reason."""
    if device.startswith("cuda"):
        try:
            return Nvml(int(device.partition(":")[2] or 0)), ""
        except Exception as error:  # pynvml raises its own hierarchy, absent when it is not installed
            return None, f"NVML: {type(error).__name__}: {error}"
    folders = sorted(powercap.glob("intel-rapl:[0-9]*")) if powercap.is_dir() else []
    folders = [f for f in folders if f.name.count(":") == 1]
    if not folders:
        return None, "this processor exposes no RAPL counter"
    try:
        return Rapl(folders), ""
    except (OSError, ValueError) as error:
        return None, f"RAPL counter not readable: {error}"


def idle_watts(meter: Meter, seconds: float) -> float:
    """Mean power while this process sleeps."""
    start, at = meter.read_j(), time.perf_counter()
    time.sleep(seconds)
    return (meter.read_j() - start) / (time.perf_counter() - at)


def energy_facts(meter: Meter | None, reason: str, idle_w: float | None, busy_j: float, busy_s: float) -> Energy:
    """Facts for the profile from an idle window and a busy window (joules, seconds)."""
    if meter is None or idle_w is None or busy_s <= 0:
        return Energy(source="unavailable", reason=reason or "no meter")
    above = max(0.0, busy_j / busy_s - idle_w)
    return Energy(source=meter.source, idle_w=round(idle_w, 3), joules_per_step_second=round(above, 3))
