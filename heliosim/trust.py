"""Whether a profile can be trusted for a scenario: what lies outside what it knows, and how well it fits inside. Pure.

Three answers: ``yes``, ``with care``, ``no``. Each finding says what is so, and what to measure to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from heliosim.formats.profile import CAUTIONS, ClockName, Profile
from heliosim.formats.results import RunResults

Verdict = Literal["yes", "with care", "no"]
GOOD, POOR = 0.05, 0.15
"""Median held-out errors up to which a fit is good, and from which it is poor."""
ORDER: tuple[Verdict, ...] = ("yes", "with care", "no")


@dataclass(frozen=True)
class Asked:
    """The most a scenario asks of one step: rows, tokens of the longest context, tokens."""

    rows: int
    context: int
    tokens: int


@dataclass(frozen=True)
class Finding:
    """``weight``: what it alone would make of the verdict. ``remedy``: what to do about it; empty: nothing."""

    weight: Verdict
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Trust:
    """The verdict and every finding, the gravest first."""

    verdict: Verdict
    findings: tuple[Finding, ...]

    def sentence(self) -> str:
        """The verdict and its gravest reason, as a sentence."""
        said = {"yes": "Yes", "with care": "With care", "no": "No"}[self.verdict]
        return f"{said}: {self.findings[0].what}."


def asked_of(run: RunResults) -> Asked:
    """What a run asks at most: rows and tokens of its steps, and the longest prompt with its output."""
    steps = run.steps.to_pandas()
    ran, requests = steps[steps["kind"] == "run"], run.requests.to_pandas()
    if ran.empty:
        return Asked(0, 0, 0)
    context = int((requests["prompt_tokens"] + requests["output_tokens"]).max())
    return Asked(int(ran["rows"].max()), context, int((ran["prefill_tokens"] + ran["decode_rows"]).max()))


def trust(profile: Profile, models: Sequence[str], clock: ClockName, asked: Asked) -> Trust:
    """Whether the profile's step times and exits of some models can be trusted for what is asked."""
    findings = [f for model in models for f in _of_model(profile, model, clock, asked)]
    if profile.facts.kind != "measured":
        remedy = "Calibrate these models on this device: heliosim calibrate"
        findings.append(Finding("with care", CAUTIONS[profile.facts.kind].rstrip("."), remedy))
    if not profile.has_behaviour:
        remedy = "Measure behaviour: heliosim behaviour measure"
        findings.append(Finding("with care", "the profile has no exits, so nothing is known of early exit", remedy))
    worst: Verdict = max([f.weight for f in findings] or [ORDER[0]], key=ORDER.index)
    ordered = sorted(findings, key=lambda f: -ORDER.index(f.weight))
    return Trust(worst, tuple(ordered) or (Finding("yes", "nothing was asked"),))


def _of_model(profile: Profile, model: str, clock: ClockName, asked: Asked) -> list[Finding]:
    fits = profile.model(model).step
    fit = fits.get(clock) or next(iter(fits.values()))
    found = []
    for name, most, known, option in (
        ("rows in a step", asked.rows, fit.max_rows, "--max-batch"),
        ("tokens of context", asked.context, fit.max_context, "--max-context"),
        ("tokens in a step", asked.tokens, fit.max_tokens, "--token-budget"),
    ):
        if most > known:
            what = f"{model}: up to {most:,} {name} are asked, and step times are known to {known:,} (extrapolated)"
            weight: Verdict = "no" if most > 2 * known else "with care"
            found.append(Finding(weight, what, f"Measure further: heliosim calibrate {option} {most}"))
    error, cells = fit.holdout.median_abs_error, fit.holdout.cells
    said = f"{model}: step times miss {cells} held-out cells by {error:.1%} (median), nine of ten by less than "
    said += f"{fit.holdout.p90_abs_error:.1%}"
    weight = "yes" if error <= GOOD else "with care" if error <= POOR else "no"
    found.append(Finding(weight, said, "" if weight == "yes" else "Calibrate again with more --rounds."))
    return found
