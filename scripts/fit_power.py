"""Power of a device file: what a GPU draws idle and while kernels run, from Splitwise. Used by ``fit_devices.py``.

Splitwise's engine leaves the GPU waiting for its host a good part of the time, more so on 8 ranks than on 4. So power
is taken as idle power (a choice, no table holds it) plus a share of the time that kernels run: one unknown, fitted to
single requests, tested on batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fit_curves import SPLITWISE, digits, origin, scores

from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.device import Device
from heliosim.hardware.steps import StepTimes

WATTS = {"A100-40GB": 400, "A100-80GB": 400, "H100-80GB": 700, "H200-141GB": 700}
"""Power limits of the boards (data sheets)."""
IDLE_SHARE = {"A100-40GB": 0.125, "A100-80GB": 0.125, "H100-80GB": 0.1, "H200-141GB": 0.1}
"""Idle power over the limit: 50 W and 70 W, choices."""
LONGEST = 2048
"""Prompts up to here: longer ones stopped early, so their mean power holds idle time."""


def power(data: Path, device: Device, name: str) -> dict[str, Any]:
    """Watts of ``name``, from the shares fitted on ``device`` (A100-80GB)."""
    table = pd.read_csv(data / "splitwise/perf_model.csv").drop_duplicates()
    table = table[(table.hardware == "a100-80gb") & (table.average_power > 0) & (table.prompt_size <= LONGEST)]
    keys = ["tensor_parallel", "prompt_size", "batch_size"]
    table = table.groupby(keys, as_index=False)[["average_power", "peak_power", "token_time"]].median()
    busy = np.array([busy_share(device, r) for r in table.itertuples()])
    y = table.average_power.to_numpy()
    is_single = (table.batch_size == 1).to_numpy()
    idle = IDLE_SHARE["A100-80GB"]
    active = float(np.sum((y - idle)[is_single] * busy[is_single]) / np.sum(busy[is_single] ** 2))
    errors = (idle + active * busy) / y - 1
    regions = [f"{tp} ranks, {'fitted' if one else 'batches of 2-16'}"
               for tp, one in zip(table.tensor_parallel, is_single, strict=True)]  # fmt: skip
    prefill = table[table.prompt_size >= 512].peak_power.median()
    limit = WATTS[name]
    made = origin(
        "Splitwise, Llama-2-70B on A100-80GB, 4 and 8 ranks: mean power against the share of time that composed "
        "kernels run (single requests), peak power while reading prompts; idle power is a choice",
        "MIT",
        f"prompts 128-{LONGEST}, kernels running 40 to 70 % of the time; single requests",
        url=SPLITWISE,
        points=int(is_single.sum()),
        holdout=scores(regions, errors),
        derivation="" if name == "A100-80GB" else "A100-80GB's shares of the power limit",
    )
    return {
        "origin": made,
        "limit_w": limit,
        "idle_w": digits(IDLE_SHARE[name] * limit, 3),
        "decode_w": digits(min(1.0, idle + active) * limit, 3),
        "prefill_w": digits(min(1.0, prefill) * limit, 3),
    }


def busy_share(device: Device, row: Any) -> float:
    """Share of a measured token's time that kernels ran, as composed."""
    a = open_architecture("llama2-70b")
    times = StepTimes.of(a, device, dtype="fp16", tp=int(row.tensor_parallel), host="vllm-2024")
    context = row.prompt_size + 64
    waiting = 2 * times.host.sync_s * np.log2(row.tensor_parallel)
    dense = times.dense(row.batch_size) - waiting
    kernels = a.layers * (dense + times.decode_attention(row.batch_size, context))
    return min(1.0, (kernels + times.head(row.batch_size)) / (1e-3 * row.token_time))
