"""The machine: what it is, and how fast memory and the way to the device are. What shares of the ideal are of."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from heliosim_calibrate.device import device_facts, version_facts

from .book import Book
from .plan import Options

_QUERY = (
    "name,driver_version,temperature.gpu,clocks.sm,clocks.mem,power.limit,pcie.link.gen.current,pcie.link.width.current"
)


def facts(book: Book) -> None:
    """Device, host, versions, clocks: into ``machine/device.json`` of the work folder, and the report."""
    found: dict[str, Any] = device_facts(book.options.device, 1)
    found |= {f"version {k}": v for k, v in version_facts().items()}
    found["kernel"] = platform.release()
    found |= _smi() if book.options.is_gpu else {}
    (book.folder / "device.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if book.options.is_gpu and peak_bytes_per_s(book.options) is None:
        book.note("No data sheet of this GPU is shipped: shares of the ideal are of its measured copy bandwidth.")


def _smi() -> dict[str, str]:
    """What the driver says; empty where its tool is not there."""
    try:
        command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"driver": "nvidia-smi did not answer"}
    values = [v.strip() for v in done.stdout.splitlines()[0].split(",")]
    return dict(zip(_QUERY.split(","), values, strict=False))


def bandwidth(book: Book) -> None:
    """Copies of one large buffer; the median of several."""
    import torch

    device = torch.device(book.options.device)
    size = (1 << 30) if book.options.is_gpu else (1 << 26)
    wait = torch.cuda.synchronize if book.options.is_gpu else (lambda: None)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device).zero_() for _ in range(2))
    _put(book, "device", 2 * size, lambda: b.copy_(a), wait, note="read and written bytes")
    host = torch.empty(size // 4, dtype=torch.uint8).zero_()
    target = a[: size // 4]
    if not book.options.is_gpu:
        for key in ("pinned", "pageable"):
            book.cannot(key, "the CPU has no way to a device")
        return
    _put(book, "pageable", size // 4, lambda: target.copy_(host), wait)
    pinned = host.pin_memory()
    _put(book, "pinned", size // 4, lambda: target.copy_(pinned, non_blocking=True), wait)


def _put(book: Book, key: str, size: int, copy: Callable[[], Any], wait: Callable[[], None], note: str = "") -> None:
    rates = []
    for k in range(8):
        began = time.perf_counter()
        copy()
        wait()
        seconds = time.perf_counter() - began
        if k >= 2:
            rates.append(size / seconds / 1e9)
            book.row(key=key, bytes=size, seconds=seconds)
    book.put(key, median(rates), low=min(rates), high=max(rates), note=note)


def pinned_bytes_per_s(device: Any, seconds: float = 1.0) -> float:
    """Host-to-device bandwidth of pinned memory, or of a plain copy on a CPU, measured now, beside what it judges."""
    import torch

    size = 1 << 28 if device.type == "cuda" else 1 << 24
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda").zero_()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    rates, until = [], time.perf_counter() + seconds
    while len(rates) < 3 or (time.perf_counter() < until and len(rates) < 20):
        began = time.perf_counter()
        target.copy_(host, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(size / (time.perf_counter() - began))
    return median(rates[1:])


def peak_bytes_per_s(options: Options) -> float | None:
    """Memory bandwidth of the GPU by its data sheet; None: not among the shipped ones."""
    import torch

    from heliosim.hardware.device import open_device, shipped_devices

    if not options.is_gpu:
        return None
    properties: Any = torch.cuda.get_device_properties(options.device)
    kind = next((k for k in ("H200", "H100", "A100") if k in properties.name), None)
    fits = [n for n in shipped_devices() if kind is not None and n.startswith(kind)]
    if not fits:
        return None
    sizes = {name: open_device(name).memory_bytes for name in fits}
    nearest = min(sizes, key=lambda name: abs(sizes[name] - properties.total_memory))
    return open_device(nearest).bytes_per_s


def copy_bytes_per_s(device: Any) -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    import torch

    size = 1 << 29 if device.type == "cuda" else 1 << 25
    a, b = (torch.empty(size, dtype=torch.uint8, device=device).zero_() for _ in range(2))
    rates = []
    for _ in range(6):
        began = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(2 * size / (time.perf_counter() - began))
    return median(rates[1:])
