"""What the profile says of the machine and software it was measured on."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from heliosim.errors import InputError

Facts = dict[str, str | int | float | None]


def resolve_device(asked: str) -> str:
    """``auto`` is CUDA if there is one, else the CPU. Raises InputError for a device that is none, or not here."""
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", asked):
        raise InputError("--device", asked, "is no device", "Say auto, cpu, cuda or cuda:N.")
    if asked != "cpu" and int(asked.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError("--device", asked, "is not there", "Say cpu, or auto for what there is.")
    return asked


def device_facts(device: str, threads: int) -> Facts:
    """Name, memory and clocks of the device, and of the host beside it."""
    facts: Facts = {
        "device": device,
        "host_cpu": _cpu_name(),
        "host_cores": os.cpu_count(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.startswith("cuda"):
        import torch

        properties: Any = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_multiprocessors": properties.multi_processor_count,
        }
    return facts


def version_facts() -> dict[str, str]:
    names = ("heliosim", "numpy", "scipy", "simpy", "torch", "transformers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
