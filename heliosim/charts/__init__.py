"""Figures: numbers first, then ink.

Each figure has a ``*_data`` function that computes a small table or dataclass, which tests and other front ends can
use, and a ``*_figure`` function that draws it with plotly and computes nothing. Every axis names its unit; every
subtitle says how many requests, runs and which seed stand behind the picture. Simulated is solid and filled, measured
dashed and hollow. ``Style`` carries what figures of one report share: colours, caption, light or dark paper.
"""

from heliosim.charts.agreement import agreement_data, agreement_figure
from heliosim.charts.alt import agreement_alt, exit_alt, fit_alt, latency_alt, quality_alt, systems_alt, timeline_alt
from heliosim.charts.attainment import attainment_alt, attainment_data, attainment_figure
from heliosim.charts.cdf import cdf_alt, cdf_figure, limits_of, study_cdf_data, tried_cdf_data
from heliosim.charts.differences import GAINED, difference_alt, difference_figure, difference_text, gain_data
from heliosim.charts.exits import exit_data, exit_figure
from heliosim.charts.fit import FitData, fit_data, fit_figure
from heliosim.charts.ghost import course_alt, course_data, course_figure, mix_alt, mix_data, mix_figure
from heliosim.charts.latency import LATENCIES, latency_data, latency_figure
from heliosim.charts.look import MEASURED, SIMULATED, finish, limit_line, log_axis, system_legend
from heliosim.charts.pareto import GOALS, pareto_alt, pareto_data, pareto_figure
from heliosim.charts.quality import quality_data, quality_figure
from heliosim.charts.rates import knee_of, rates_alt, rates_data, rates_figure
from heliosim.charts.saturation import saturation_alt, saturation_data, saturation_figure
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
    "ACCENT",
    "COMPARED",
    "DARK",
    "FONT",
    "GAINED",
    "GOALS",
    "GRID",
    "INK",
    "LATENCIES",
    "LIGHT",
    "MEASURED",
    "MODEL_RAMPS",
    "MUTED",
    "SIMULATED",
    "SYSTEM_PALETTE",
    "THEMES",
    "FitData",
    "Style",
    "Theme",
    "TimelineData",
    "agreement_alt",
    "agreement_data",
    "agreement_figure",
    "attainment_alt",
    "attainment_data",
    "attainment_figure",
    "caption_of",
    "cdf_alt",
    "cdf_figure",
    "course_alt",
    "course_data",
    "course_figure",
    "difference_alt",
    "difference_figure",
    "difference_text",
    "exit_alt",
    "exit_data",
    "exit_figure",
    "finish",
    "fit_alt",
    "fit_data",
    "fit_figure",
    "gain_data",
    "knee_of",
    "latency_alt",
    "latency_data",
    "latency_figure",
    "limit_line",
    "limits_of",
    "log_axis",
    "mix_alt",
    "mix_data",
    "mix_figure",
    "pareto_alt",
    "pareto_data",
    "pareto_figure",
    "placement_colours",
    "quality_alt",
    "quality_data",
    "quality_figure",
    "rates_alt",
    "rates_data",
    "rates_figure",
    "run_caption",
    "saturation_alt",
    "saturation_data",
    "saturation_figure",
    "span",
    "study_cdf_data",
    "system_colours",
    "system_legend",
    "systems_alt",
    "systems_data",
    "systems_figure",
    "timeline_alt",
    "timeline_data",
    "timeline_figure",
    "tried_cdf_data",
]
