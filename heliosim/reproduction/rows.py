"""What a row of the reproduction is: a claim, what it rests on, and a function that gives our value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from heliosim.stats import paired_difference, t_interval

DEFAULTS, CALIBRATED = "defaults", "calibrated"
"""Names of the two set-ups that rows are shown under."""
Kind = Literal["exact", "calibrated", "shape", "input"]
Metrics = Mapping[str, float]
"""What one simulated run showed, by name."""


@dataclass(frozen=True)
class Experiment:
    """One simulated system under one set of changes, run once per replication.

    ``setting``: which set-up (``settings.py``); ``system``: its controller by name; ``changes``: controller or scenario
    fields by dotted path, as (path, value) pairs. Replication k of every experiment of a setting meets the same
    requests and the same exits. ``setup``: of a setting that has several (``setups.py``), which.
    """

    setting: str
    system: str
    changes: tuple[tuple[str, object], ...] = ()
    setup: str = ""

    @property
    def name(self) -> str:
        changed = ", ".join(f"{path}={value}" for path, value in self.changes)
        setup = f", {self.setup}" if self.setup else ""
        return f"{self.setting}{setup}: {self.system}" + (f" ({changed})" if changed else "")

    def under(self, setup: str) -> Experiment:
        """The same under another set-up; itself where the setting has no set-ups."""
        return replace(self, setup=setup) if self.setup == DEFAULTS else self


Runs = Mapping[Experiment, Sequence[Metrics]]
"""Metrics of every replication of the experiments a row asked for."""


@dataclass(frozen=True)
class Value:
    """Our value of one part of a claim, with its interval where it was simulated or an input has a range."""

    part: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Check:
    """A sign or an order that a shape row claims. ``low``, ``high``: 95 % interval of the mean difference, which the
    check holds if it lies on the right side of zero as a whole (``is_flat``: inside ``within`` of zero as a whole).
    ``share``: of the replications in which it holds one by one; ``scale``: what the difference is compared with.
    """

    says: str
    mean: float
    low: float
    high: float
    share: float
    holds: bool


@dataclass(frozen=True)
class Series:
    """Values along an axis, for a plot: mean, low and high of each point."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Plot:
    """Series that share axes; axes name their units. ``is_log``: of the upright one."""

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    is_log: bool = False


@dataclass(frozen=True)
class Answer:
    """What a row computed. ``beside``: figures that belong to the row and are not compared with the paper."""

    values: tuple[Value, ...] = ()
    checks: tuple[Check, ...] = ()
    plots: tuple[Plot, ...] = ()
    beside: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Row:
    """A claim. ``inputs`` and ``assumptions`` by their names in ``inputs.py``; ``remark``: what a reader must know to
    read the row, a miss explained included; ``why``: that in one line, for the summary. ``compute`` gets the runs of
    ``needs`` and nothing else; ``compute_calibrated`` stands for it under the calibrated set-up if another function
    is needed. ``fitted``: parts that the calibrated set-up was fitted to, or that follow from those ("*": all).
    """

    id: str
    claim: str
    kind: Kind
    unit: str
    compute: Callable[[Runs], Answer]
    inputs: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    needs: tuple[Experiment, ...] = ()
    remark: str = ""
    is_ours: bool = field(default=False)
    """Not in the paper: what it left out."""
    why: str = ""
    fitted: tuple[str, ...] = ()
    compute_calibrated: Callable[[Runs], Answer] | None = None

    @property
    def has_setups(self) -> bool:
        """Whether it is shown under both set-ups; what the paper does not have is shown under the defaults."""
        return self.compute_calibrated is not None or (
            not self.is_ours and any(x.setup == DEFAULTS for x in self.needs)
        )

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """What has to be run for it, under either set-up."""
        return (*self.needs, *(x.under(CALIBRATED) for x in self.needs if self.has_setups))

    def calibrated(self, runs: Runs) -> Answer | None:
        """The answer under the calibrated set-up, from runs of either; None where there is only one set-up."""
        if not self.has_setups:
            return None
        compute = self.compute_calibrated or self.compute
        return compute({x: runs[x.under(CALIBRATED)] for x in self.needs})

    def is_fitted(self, part: str) -> bool:
        return part in self.fitted or "*" in self.fitted


def samples(runs: Runs, experiment: Experiment, metric: str) -> list[float]:
    """A metric of every replication; a metric that a run does not have (an exit nobody took) is 0."""
    return [float(run.get(metric, 0.0)) for run in runs[experiment]]


def value_of(part: str, values: Sequence[float]) -> Value:
    """Mean and 95 % interval over replications."""
    interval = t_interval(list(values))
    mean = sum(values) / len(values)
    return Value(part, mean, interval.low, interval.high)


def series_of(name: str, points: Sequence[tuple[float, Sequence[float]]]) -> Series:
    """A series from (x, values of the replications)."""
    found = [(x, value_of("", values)) for x, values in points]
    return Series(
        name,
        tuple(x for x, _ in found),
        tuple(v.value for _, v in found),
        tuple(v.value if v.low is None else v.low for _, v in found),
        tuple(v.value if v.high is None else v.high for _, v in found),
    )


def greater(says: str, a: Sequence[float], b: Sequence[float]) -> Check:
    """Whether ``a`` lies above ``b``, replication by replication."""
    difference = [x - y for x, y in zip(a, b, strict=True)]
    mean, low, high = _interval(a, b)
    share = sum(d > 0 for d in difference) / len(difference)
    return Check(says, mean, low, high, share, low > 0)


def flatter(says: str, a: Sequence[float], b: Sequence[float]) -> Check:
    """Whether the change ``a`` is smaller in size than the change ``b``, replication by replication."""
    return greater(says, [abs(x) for x in b], [abs(x) for x in a])


def _interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    found = paired_difference(list(a), list(b)).interval
    mean = sum(a) / len(a) - sum(b) / len(b)
    low, high = found.low, found.high
    return mean, mean if low is None else low, mean if high is None else high
