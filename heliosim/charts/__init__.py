"""Figures: numbers first, then ink.

Each figure has a ``*_data`` function that computes a small table or dataclass, which tests and other front ends can
use, and a ``*_figure`` function that draws it with plotly and computes nothing. Every axis names its unit; every
subtitle says how many requests, runs and which seed stand behind the picture. Simulated is solid and filled, measured
dashed and hollow. ``Style`` carries what figures of one report share: colours, caption, light or dark paper.
"""

from heliosim.charts.agreement import agreement_data, agreement_figure
from heliosim.charts.exits import exit_data, exit_figure
from heliosim.charts.fit import FitData, fit_data, fit_figure
from heliosim.charts.latency import LATENCIES, latency_data, latency_figure
from heliosim.charts.look import MEASURED, SIMULATED, finish, log_axis, system_legend
from heliosim.charts.quality import quality_data, quality_figure
from heliosim.charts.style import Style, caption_of, placement_colours, run_caption, span, system_colours
from heliosim.charts.systems import COMPARED, systems_data, systems_figure
from heliosim.charts.theme import (
    ACCENT,
    DARK,
    FONT,
    GRID,
    INK,
    LIGHT,
    MODEL_RAMPS,
    MUTED,
    SYSTEM_PALETTE,
    THEMES,
    Theme,
)
from heliosim.charts.timeline import TimelineData, timeline_data
from heliosim.charts.timeline_ink import timeline_figure

__all__ = [
    "ACCENT", "COMPARED", "DARK", "FONT", "GRID", "INK", "LATENCIES", "LIGHT", "MEASURED", "MODEL_RAMPS", "MUTED",
    "SIMULATED", "SYSTEM_PALETTE", "THEMES", "FitData", "Style", "Theme", "TimelineData", "agreement_data",
    "agreement_figure", "caption_of", "exit_data", "exit_figure", "finish", "fit_data", "fit_figure", "latency_data",
    "latency_figure", "log_axis", "placement_colours", "quality_data", "quality_figure", "run_caption", "span",
    "system_colours", "system_legend", "systems_data", "systems_figure", "timeline_data", "timeline_figure",
]  # fmt: skip
