"""Live: follow a live run by its progress log, predicted against measured as it goes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import streamlit as st
from heliosim_app import parts, state
from heliosim_app.views.runs import start_folder

from heliosim.errors import HelioSimError
from heliosim.progress_log import DRIFT_LIMIT, WINDOW, ProgressLog, has_drifted, read_log, rolling_ratio

QUIET_S = 10.0
"""A log without a new line for so long is said to be silent."""


def page() -> None:
    """Draw the page."""
    st.title("Is the live run as predicted?")
    folder = Path(state.value("folder") or start_folder())
    found = {str(p.relative_to(folder)): p for p in sorted(folder.glob("**/*.live.jsonl"))} if folder.is_dir() else {}
    if not found:
        st.info(
            f"No live run below {parts.plain(str(folder))}. `heliosim run SCENARIO --live --out {folder}/NAME` makes "
            "one; name another folder on the page Runs."
        )
        return
    names = sorted(found, key=lambda n: found[n].stat().st_mtime, reverse=True)
    _follow(found[st.selectbox("Live run", names, key="live-log")])


@st.fragment(run_every=1.0)
def _follow(path: Path) -> None:
    try:
        log = read_log(path)
        age_s = time.time() - path.stat().st_mtime
    except (HelioSimError, OSError) as error:
        st.error(parts.plain(str(error)))
        return
    parts.badges("live", *(["replayed"] if log.header.replayed_exits else []))
    if not log.lines:
        st.info("The run has begun; its first line comes within a second or so.")
        return
    _show(log, age_s)


def _show(log: ProgressLog, age_s: float) -> None:
    last, ratio = log.lines[-1], rolling_ratio(log.lines)
    if not log.has_ended and age_s > QUIET_S:
        st.warning(f"No line for {age_s:.0f} s and no end: the run was interrupted, or a step takes that long.")
    if has_drifted(ratio):
        st.warning(
            f"Drift: steps take {ratio.mean:.2f} times what the profile predicts, and the whole interval lies more "
            f"than {100 * DRIFT_LIMIT:g} % away from 1. Calibrate again before you trust predictions."
        )
    elif ratio.half_width is not None:
        st.success(
            f"No drift: the interval of measured over predicted step times comes within {100 * DRIFT_LIMIT:g} % of 1."
        )
    now = last.now_s or 1.0
    parts.tiles(
        [
            parts.tile("Measured / predicted step time", ratio, "", note=f"last {WINDOW} lines"),
            parts.Tile("Mean TTFT", _ms(last.mean_ttft_s), note=f"{last.finished:,} finished requests"),
            parts.Tile("Mean TPOT", _ms(last.mean_tpot_s)),
            parts.Tile("Throughput", f"{last.output_tokens / now:.4g} tokens/s"),
            parts.Tile("Placement", last.placement or "–", note=f"{last.running} running, {last.waiting} waiting"),
            parts.Tile("Weights", f"{last.weights_bytes / 1e6:.4g} MB"),
            parts.Tile(
                "KV in use", f"{last.kv_used_bytes / 1e6:.4g} MB", note=f"of {last.kv_total_bytes / 1e6:.4g} MB"
            ),
        ]
    )
    parts.chart(_figure(log), "Rolling ratio of measured to predicted step time over the run", key="live-ratio")
    how = "ended" if log.has_ended else "under way"
    parts.caption(
        f"{log.header.name}, {how}", f"{last.steps:,} steps, {last.priced_steps:,} of them priced",
        f"{log.header.clock} clock, {last.now_s:.1f} s", f"seed {log.header.seed}",
    )  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.4g} ms"


def _figure(log: ProgressLog) -> Any:
    import plotly.graph_objects as go

    first = max(1, len(log.lines) - 600)
    at = [(log.lines[k].now_s, rolling_ratio(log.lines[: k + 1])) for k in range(first, len(log.lines))]
    shown = [(t, r) for t, r in at if r.mean is not None]
    made = go.Figure(
        go.Scatter(
            x=[t for t, _ in shown], y=[r.mean for _, r in shown], mode="lines+markers", line={"color": "#0072B2"},
            error_y={"array": [r.half_width or 0.0 for _, r in shown]},
        )
    )  # fmt: skip
    made.add_hline(y=1.0, line_dash="dot")
    made.update_xaxes(title=f"time on the {log.header.clock} clock (s)")
    made.update_yaxes(title="measured / predicted step time")
    made.update_layout(height=320, margin={"t": 20})
    return made
