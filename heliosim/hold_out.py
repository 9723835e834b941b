"""What to say of a fit's error on steps it never saw: whether it meets the bar, and if not, whether noise is why."""

from __future__ import annotations

from typing import Literal

from heliosim.formats.profile import HoldOut

BAR = 0.05
"""Median relative error of held-out step times to be met, 5 %."""
Verdict = Literal["met", "within noise", "missed", "not scored"]


def verdict(holdout: HoldOut, bar: float = BAR) -> Verdict:
    """``within noise``: above the bar, but not above what the cells' own visits differ by (upper end of that floor's
    95 % interval), which a perfect prediction would show too.
    """
    if not holdout.cells:
        return "not scored"
    if holdout.median_abs_error <= bar:
        return "met"
    floor = holdout.repeat_error_high if holdout.repeat_error_high is not None else holdout.repeat_error
    return "within noise" if floor is not None and holdout.median_abs_error <= floor else "missed"


def sentence(holdout: HoldOut) -> str:
    """The verdict in words, with its figures."""
    said = verdict(holdout)
    if said == "not scored":
        return "no cell was visited often enough to be scored"
    error, bar = f"median error {holdout.median_abs_error:.1%}", f"bar {BAR:.0%}"
    floor = ""
    if holdout.repeat_error is not None:
        high = "" if holdout.repeat_error_high is None else f", up to {holdout.repeat_error_high:.1%}"
        floor = f", noise floor {holdout.repeat_error:.1%}{high}"
    words = {"met": "met", "within noise": "above it, but within measured noise", "missed": "missed"}
    return f"{error} on {holdout.cells} held-out cells{floor}: {bar} {words[said]}"
