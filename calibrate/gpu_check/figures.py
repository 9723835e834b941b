"""A figure: what was asked, the bar it is held against, and what came out. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Verdict = Literal["pass", "miss", "no bar", "not measured"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Bar:
    """``value`` at least, or at most either way from zero."""

    sense: Literal["at least", "at most"]
    value: float

    def is_met(self, value: float) -> bool:
        return value >= self.value if self.sense == "at least" else abs(value) <= self.value


@dataclass(frozen=True)
class Asked:
    """A figure that a measure should give. ``unit``: ``share`` is shown in per cent."""

    key: str
    what: str
    unit: str = "share"
    bar: Bar | None = None


@dataclass(frozen=True)
class Got:
    """What a measure found. ``low``, ``high``: spread over repeats. ``passes``: the measure's own judgement, where a
    bar alone does not say it. ``why``: nothing could be measured.
    """

    key: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    passes: bool | None = None
    why: str = ""


@dataclass(frozen=True)
class Figure:
    """An asked figure with its answer."""

    group: str
    measure: str
    asked: Asked
    got: Got

    @property
    def verdict(self) -> Verdict:
        if self.got.value is None:
            return "not measured"
        if self.got.passes is not None:
            return "pass" if self.got.passes else "miss"
        if self.asked.bar is None:
            return "no bar"
        return "pass" if self.asked.bar.is_met(self.got.value) else "miss"

    @property
    def shown(self) -> str:
        """Value with unit and spread."""
        if self.got.value is None:
            return "–"
        text = number(self.got.value, self.asked.unit)
        if self.got.low is not None and self.got.high is not None:
            text += f" ({number(self.got.low, self.asked.unit)} to {number(self.got.high, self.asked.unit)})"
        return text

    @property
    def bar_shown(self) -> str:
        bar = self.asked.bar
        return "–" if bar is None else f"{bar.sense} {number(bar.value, self.asked.unit)}"

    def row(self) -> dict[str, Any]:
        """For the JSON report."""
        got = asdict(self.got)
        bar = None if self.asked.bar is None else asdict(self.asked.bar)
        said = {"group": self.group, "measure": self.measure, "what": self.asked.what, "unit": self.asked.unit}
        return {**said, **got, "bar": bar, "verdict": self.verdict}


def number(value: float, unit: str) -> str:
    """A value as people read it: three significant digits, shares in per cent."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def without_bars(asked: Asked) -> Asked:
    """The same figure on a device its bar is not about."""
    return replace(asked, bar=None)
