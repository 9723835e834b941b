"""Where a run's energy went, and what an answer cost in joules: pure functions of its tables.

The energy of a step that reads and decodes is shared by its tokens. Idle energy is what servers draw in the run's
duration while no step and no load is going on; it is told apart, since whether it is charged is a choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from heliosim.fleet_metrics import replica_codes
from heliosim.types import Seconds

if TYPE_CHECKING:
    import pyarrow as pa

    from heliosim.formats.results import Deployed

Floats = npt.NDArray[np.float64]
CAUSES = ("prefill", "decode", "load", "probe")
"""What steps and loads are for: reading, decoding, loads, and everything that evaluates a candidate."""


def energy_by_cause(steps: pa.Table, after_s: Seconds) -> dict[str, float | None]:
    """Joules of steps and loads that started at or after ``after_s``, by cause; None where any of them is unknown."""
    unknown: dict[str, float | None] = dict.fromkeys((f"{cause}_energy_j" for cause in CAUSES), None)
    keep = steps["start_s"].to_numpy() >= after_s
    if steps["energy_j"].null_count or not keep.any():
        return unknown
    joules: Floats = steps["energy_j"].to_numpy()[keep]
    kind = np.asarray(steps["kind"].to_pylist(), dtype=object)[keep]
    is_probe = steps["is_probe"].to_numpy(zero_copy_only=False)[keep]
    read, decoded = (steps[name].to_numpy()[keep].astype(np.float64) for name in ("prefill_tokens", "decode_rows"))
    is_load = (kind == "load") | (kind == "fetch") | (read + decoded == 0)
    share = read / np.maximum(read + decoded, 1)
    serving = np.where(is_load | is_probe, 0.0, joules)
    found = {
        "prefill": serving * share,
        "decode": serving * (1 - share),
        "load": np.where(is_load, joules, 0.0),
        "probe": np.where(is_probe & ~is_load, joules, 0.0),
    }
    return {f"{cause}_energy_j": math.fsum(values.tolist()) for cause, values in found.items()}


def idle_energy(
    steps: pa.Table, window: tuple[Seconds, Seconds] | None, deployed: Mapping[str, Deployed]
) -> float | None:
    """Joules drawn in the window by servers that did nothing, those that are down included; None: not known."""
    if window is None or not deployed or any(d.idle_w is None for d in deployed.values()):
        return None
    start = steps["start_s"].to_numpy()
    end = start + steps["seconds"].to_numpy()
    inside = np.clip(np.minimum(end, window[1]) - np.maximum(start, window[0]), 0, None)
    codes, names = replica_codes(steps)
    busy_s = np.bincount(codes[codes >= 0], weights=inside[codes >= 0], minlength=len(names))
    idle_w = {group: d.idle_w or 0.0 for group, d in deployed.items()}
    total = sum(d.count * idle_w[group] for group, d in deployed.items()) * (window[1] - window[0])
    spent: float = sum(idle_w[group_of(name)] * s for name, s in zip(names, busy_s.tolist(), strict=True))
    return total - spent


def group_of(replica: str) -> str:
    """The group a replica belongs to, by its name."""
    return replica.rpartition("-")[0]


def energy_figures(
    steps: pa.Table,
    window: tuple[Seconds, Seconds] | None,
    after_s: Seconds,
    deployed: Mapping[str, Deployed],
    totals: Mapping[str, Any],
) -> dict[str, Any]:
    """Energy by cause, and joules per token and per prompt. ``totals``: ``energy_j``, tokens and prompts completed."""
    joules, tokens, prompts = (totals[name] for name in ("energy_j", "total_output_tokens", "completed"))
    idle_j = idle_energy(steps, window, deployed)
    with_idle = None if joules is None or idle_j is None else joules + idle_j

    def per(total: float | None, count: int) -> float | None:
        return None if total is None or not count else total / count

    def wh(total: float | None) -> float | None:
        each = per(total, prompts)
        return None if each is None else each / 3600

    return {
        **energy_by_cause(steps, after_s),
        "idle_energy_j": idle_j,
        "joules_per_token": per(joules, tokens),
        "joules_per_prompt": per(joules, prompts),
        "wh_per_prompt": wh(joules),
        "joules_per_token_with_idle": per(with_idle, tokens),
        "wh_per_prompt_with_idle": wh(with_idle),
    }
