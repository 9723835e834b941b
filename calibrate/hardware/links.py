"""Measures how fast bytes come to the device, from pinned and pageable host memory and from disk, alone and beside
decoding, and how long a load of layers takes from the decision to the first forward that can use them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heliosim.engines.models.host import HostModel

from .bench import Bench, Call, Shape
from .cell import AT_LEAST, Cell, Row, absent
from .grid import Extent

MOST_BYTES = {True: 1 << 30, False: 16 << 20}
"""Bytes moved at a time in a full and in a quick calibration."""
LOADS = 5
"""Loads of a cell."""
PIECE = 1 << 22
NO_LINK = "no device beside host memory: a copy within it stands under pageable"


def measure_link(bench: Bench, cell: Cell, extent: Extent) -> Row:
    """Bytes/s of one source. Beside decoding, ``decode_slowdown`` is a decode pass's time over that alone, and
    ``alone_over_beside`` what decoding costs the transfer.
    """
    source, is_beside = str(cell.where["source"]), cell.where["beside"] == "decode"
    with torch.inference_mode():
        found = mover(bench, source, MOST_BYTES[extent.is_full])
        if isinstance(found, str):
            return absent(cell, "B/s", found)
        move, moved = found
        move()
        if not is_beside:
            return Row(cell, "B/s", tuple(moved / _wall(move) for _ in range(5)), facts={"bytes": moved})
        return _beside(bench, cell, move, moved, window_s=0.5 if extent.is_full else 0.08)


def _beside(bench: Bench, cell: Cell, move: Call, moved: int, window_s: float) -> Row:
    """Decode passes in a loop, without and with transfers going on in another thread."""
    decode = bench.best(bench.through(Shape(decode=1, context=16), 0, bench.layers))
    rates: list[float] = []
    slowdowns: list[float] = []
    ratios: list[float] = []
    for _ in range(AT_LEAST):
        alone = _median_of(bench, decode, window_s)
        rate_alone = moved / float(np.median([_wall(move) for _ in range(AT_LEAST)]))
        done: list[float] = []
        stop = threading.Event()
        worker = threading.Thread(target=_keep_moving, args=(move, moved, stop, done), daemon=True)
        worker.start()
        beside = _median_of(bench, decode, window_s)
        stop.set()
        worker.join()
        if done:
            rates.append(float(np.median(done)))
            slowdowns.append(beside / alone)
            ratios.append(rate_alone / rates[-1])
    if len(rates) < AT_LEAST:
        return absent(cell, "B/s", "no transfer ended while decoding went on")
    facts = {
        "bytes": moved,
        "decode_slowdown": float(np.median(slowdowns)),
        "alone_over_beside": float(np.median(ratios)),
    }
    return Row(cell, "B/s", tuple(rates), facts=facts)


def _keep_moving(move: Call, moved: int, stop: threading.Event, done: list[float]) -> None:
    with torch.inference_mode():
        while not stop.is_set():
            done.append(moved / _wall(move))


def _median_of(bench: Bench, call: Call, window_s: float) -> float:
    """Median wall seconds of a call repeated for a while."""
    seen: list[float] = []
    end = time.perf_counter() + window_s
    while time.perf_counter() < end or len(seen) < AT_LEAST:
        seen.append(bench.timer.wall(call))
    return float(np.median(seen))


def _wall(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return max(1e-9, time.perf_counter() - began)


def mover(bench: Bench, source: str, most: int) -> tuple[Call, int] | str:
    """A call that brings bytes to the device and waits for them, and how many; or why there is none."""
    is_cuda = bench.timer.is_cuda
    if source == "pinned" and not is_cuda:
        return NO_LINK
    stream = torch.cuda.Stream(bench.device) if is_cuda else None
    if source in ("pinned", "pageable"):
        host = torch.ones(most, dtype=torch.uint8, pin_memory=source == "pinned")
        device = torch.empty(most, dtype=torch.uint8, device=bench.device)
        return lambda: _copy(device, host, stream), most
    files = weight_files(bench.host)
    if not files:
        return "random weights lie on no disk"
    path = max(files, key=lambda p: p.stat().st_size)
    size = min(most, path.stat().st_size)
    if source == "disk-cold" and not hasattr(os, "posix_fadvise"):
        return "this system cannot drop a file from its cache"
    staging = torch.empty(PIECE, dtype=torch.uint8, pin_memory=is_cuda)
    device = torch.empty(size, dtype=torch.uint8, device=bench.device)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            if source == "disk-cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            done, view = 0, memoryview(staging.numpy())
            while done < size:
                got = file.readinto(view[: min(PIECE, size - done)])
                _copy(device[done : done + got], staging[:got], stream)
                done += got

    return read, size


def _copy(device: torch.Tensor, host: torch.Tensor, stream: Any) -> None:
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        device.copy_(host, non_blocking=True)
    if stream is not None:
        stream.synchronize()


def weight_files(host: HostModel) -> list[Path]:
    """Files that hold a checkpoint's weights; none of one that was made up."""
    if host.info.random is not None:
        return []
    return sorted({s.file for s in host.info.tensors.values() if s.file.is_file()})


def measure_layer_load(bench: Bench, cell: Cell) -> Row:
    """Wall seconds from the decision to load ``layers`` more layers until a forward has used them, less what that
    forward takes anyway. From disk: host memory does not hold them (the system's own cache may).
    """
    count, source, spec, host = cell.number("layers"), cell.where["source"], bench.spec, bench.host
    if source == "disk" and not weight_files(host):
        return absent(cell, "s", "random weights lie on no disk")
    first = bench.layers - count
    if first < 0:
        return absent(cell, "s", f"{bench.layers} layers are measured here, {count} are asked for")
    values: list[float] = []
    resident = host.resident(bench.layers, bench.device)  # apart: graphs over the bench's own keep its addresses
    forward = bench.through(Shape(decode=1, context=16), 0, bench.layers)
    steady = float(np.median([bench.timer.wall(forward) for _ in range(2 * AT_LEAST)]))
    for _ in range(LOADS):
        resident.drop(first)
        if source == "disk":
            host.hold(max(1, first))
        began = time.perf_counter()
        resident.deepen(bench.layers)
        bench.through(Shape(decode=1, context=16), 0, bench.layers, resident=resident)()
        bench.timer.settle()
        values.append(max(0.0, time.perf_counter() - began - steady))
        host.hold(spec.layers)
        for i in range(spec.layers):
            host.flat("layer", i)
    moved = count * spec.layer_bytes
    return Row(cell, "s", tuple(values), facts={"bytes": moved, "forward_s": steady})
