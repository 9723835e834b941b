"""What the step costs of a profile might have been: fitted anew to steps drawn from those that were measured.

A profile keeps every measured step. Calibration measures in **visits**, small workloads of one model and one mode, one
behind the other; steps of one visit share the machine's mood, so whole visits are drawn: for each model and mode, as
many as there were, with replacement (a stratified cluster bootstrap; Davison and Hinkley, *Bootstrap Methods and their
Application*, 1997, section 3.8). The fit of calibration (``heliosim.fitting``) to the steps drawn gives one set of
coefficients. How much such sets differ is how well the measured steps determine the costs. What no step of the
calibration shows is not in it: a machine that runs at another speed later, the form of the cost model, load times,
behaviour.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from heliosim.costs import TERMS, StepShape
from heliosim.errors import InputError
from heliosim.fitting import by_cell, design_of, is_usual, step_cell, unbiased
from heliosim.formats.profile import ClockName, Profile, load_profile
from heliosim.streams import stream

LARGEST_MISMATCH = 0.01
"""A fit to all steps must predict their total time as the published one does, within this share, for the steps to be
those behind the published costs."""
_SHAPE = StepShape._fields[: StepShape._fields.index("context")]
"""What the costs of measured steps depend on; tables of older calibrations have no ``context``."""
_COLUMNS = ("model", "mode", "visit", *_SHAPE)


@dataclass(frozen=True)
class MeasuredSteps:
    """Steps of one model that its fit rests on: terms [n, terms], seconds [n], and each one's visit [n], numbered from
    0. ``strata``: the visits of each mode.
    """

    terms: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]
    visit: npt.NDArray[np.int64]
    strata: tuple[tuple[int, ...], ...]

    def fit(self) -> npt.NDArray[np.float64]:
        """Coefficients of all steps: the published ones."""
        return unbiased(self.terms, self.seconds)

    def resampled_fit(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Coefficients of the steps of visits drawn with replacement, mode by mode."""
        times = np.zeros(sum(len(s) for s in self.strata))
        for visits in self.strata:
            drawn = rng.integers(len(visits), size=len(visits))
            np.add.at(times, np.asarray(visits)[drawn], 1.0)
        weights = times[self.visit]
        kept = weights > 0
        return unbiased(self.terms[kept], self.seconds[kept], weights[kept])


def resampled_profile(profile: Profile, models: Sequence[str], clock: ClockName, seed: int) -> Profile:
    """The profile with step costs of these models as another calibration might have found them. What is drawn for a
    model depends on the seed and its name, not on which others there are.

    Raises InputError ("unavailable") if the profile does not hold the steps its costs were fitted to.
    """
    measured = measured_steps(profile.folder, profile.hash, tuple(models), clock)
    streams = {name: stream(seed, "profile uncertainty", name) for name in models}
    costs = {name: _named(measured[name].resampled_fit(rng)) for name, rng in streams.items()}
    return profile.with_step_costs(clock, costs)


def require_steps(profile: Profile, models: Sequence[str], clock: ClockName) -> None:
    """Raise InputError ("unavailable") if step costs cannot be resampled."""
    measured_steps(profile.folder, profile.hash, tuple(models), clock)


def _named(coefficients: npt.NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(TERMS, coefficients.tolist(), strict=True))


@lru_cache(maxsize=4)
def measured_steps(folder: Path, digest: str, models: tuple[str, ...], clock: ClockName) -> Mapping[str, MeasuredSteps]:
    """The steps behind the costs of these models; read once in each process. Raises as ``resampled_profile``."""
    profile = load_profile(folder, verify=False)
    found = {}
    columns = _read(folder / "steps.parquet", clock)
    for name in models:
        published = np.array(profile.step_cost(name, clock).coefficients)
        known = profile.model(name).step[clock].seconds_per
        found[name] = steps = _of_model(columns, name, clock, folder, known)
        mismatch = abs((steps.terms @ steps.fit()).sum() / (steps.terms @ published).sum() - 1)
        if not mismatch <= LARGEST_MISMATCH:
            problem = f"profile uncertainty is unavailable: the costs of {name} were not fitted to these steps"
            raise _unavailable(folder / "steps.parquet", f"fits differ by {mismatch:.1%}", problem)
    return found


def _read(path: Path, clock: ClockName) -> dict[str, list[object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise _unavailable(path, path.name, "profile uncertainty is unavailable: the profile keeps no measured steps")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise _unavailable(path, path.name, f"profile uncertainty is unavailable: {reason}") from None
    for name in (*_COLUMNS, f"{clock}_s"):
        if name not in table.column_names:
            raise _unavailable(path, name, "profile uncertainty is unavailable: a column is missing")
    return {name: table[name].to_pylist() for name in (*_COLUMNS, f"{clock}_s")}


def _of_model(
    columns: Mapping[str, Sequence[object]], model: str, clock: ClockName, folder: Path, known: Collection[str]
) -> MeasuredSteps:
    """``known``: terms that the published fit has; a refit has no others."""
    rows = [i for i, name in enumerate(columns["model"]) if name == model]
    fields = ([int(str(columns[n][i])) for i in rows] for n in _SHAPE)
    shapes = [StepShape(*values) for values in zip(*fields, strict=True)]
    modes = [str(columns["mode"][i]) for i in rows]
    seconds = np.array([float(str(columns[f"{clock}_s"][i])) for i in rows], dtype=np.float64)
    if not rows or not (seconds > 0).all():
        raise _unavailable(
            folder / "steps.parquet", model, "profile uncertainty is unavailable: no steps of this model"
        )
    usual = is_usual(seconds, by_cell([step_cell(m, s) for m, s in zip(modes, shapes, strict=True)]))
    visits = [(modes[k], columns["visit"][i]) for k, i in enumerate(rows)]
    number = {visit: k for k, visit in enumerate(dict.fromkeys(visits))}
    strata: dict[str, list[int]] = {}
    for (mode, _), k in number.items():
        strata.setdefault(mode, []).append(k)
    if max(len(v) for v in strata.values()) < 2:
        problem = "profile uncertainty is unavailable: one visit for each mode, nothing to draw from"
        raise _unavailable(folder / "steps.parquet", model, problem)
    return MeasuredSteps(
        terms=design_of(shapes, known)[usual],
        seconds=seconds[usual],
        visit=np.array([number[v] for v in visits])[usual],
        strata=tuple(tuple(v) for v in strata.values()),
    )


def _unavailable(path: Path, value: object, problem: str) -> InputError:
    return InputError(str(path), value, problem, "Calibrate again, or do without --profile-uncertainty.")
