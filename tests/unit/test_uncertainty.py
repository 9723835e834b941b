"""Step costs drawn anew: the spread is that of the measurements, the refit is the published fit, absence is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from heliosim.costs import TERMS, StepShape
from heliosim.engines.sim import SimEngine
from heliosim.errors import InputError
from heliosim.examples import pair_of, scenario_for
from heliosim.formats.files import sha256_of
from heliosim.formats.profile import Profile, load_profile, write_profile
from heliosim.formats.results import RunResults
from heliosim.profile_view import open_profile
from heliosim.replicate import WarmUp, replicate, run_replication
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.stats import StoppingRule
from heliosim.uncertainty import MeasuredSteps, measured_steps, require_steps, resampled_profile
from heliosim.workload import WorkloadSpec
from tests.profiles import scenario, write_synthetic_profile

DECODE = StepShape(8, 8, 8, 8 * 96, 0, 0, 6, 1, 8, 0, 0, 0, 96)


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return open_profile("tiny-opt-cpu")


def _measured(visits: int, noise: float, seed: int) -> MeasuredSteps:
    """Steps of 2 s per unit; the steps of one visit share one error of this relative size."""
    rng = np.random.default_rng(seed)
    visit = np.repeat(np.arange(visits), 20)
    terms = np.zeros((len(visit), len(TERMS)))
    terms[:, 0] = rng.uniform(1, 5, len(visit))
    seconds = 2 * terms[:, 0] * (1 + noise * rng.standard_normal(visits))[visit]
    half = visits // 2
    return MeasuredSteps(terms, seconds, visit, (tuple(range(half)), tuple(range(half, visits))))


def test_the_spread_is_what_theory_says_of_whole_visits() -> None:
    """A coefficient with errors of 10 % of each of 40 visits is known to 0.1 / sqrt(40), not 0.1 / sqrt(800)."""
    steps = _measured(40, 0.1, 1)
    rng = np.random.default_rng(2)
    found = np.array([steps.resampled_fit(rng)[0] for _ in range(120)])
    assert found.mean() == pytest.approx(steps.fit()[0], rel=0.01)
    assert found.std(ddof=1) / 2 == pytest.approx(0.1 / np.sqrt(40), rel=0.35)


def test_exact_measurements_leave_no_uncertainty() -> None:
    steps = _measured(10, 0.0, 1)
    assert steps.resampled_fit(np.random.default_rng(3))[0] == pytest.approx(2.0)


def test_the_shipped_profile_keeps_the_steps_behind_its_costs(shipped: Profile) -> None:
    for clock in ("cpu", "wall"):
        require_steps(shipped, list(shipped.facts.models), clock)  # refits, and compares totals
    small = pair_of(shipped)[0]
    published = shipped.step_cost(small, "cpu").coefficients
    assert _measured_steps(shipped, small).fit() == pytest.approx(published, rel=1e-6, abs=1e-15)


def _measured_steps(profile: Profile, model: str) -> MeasuredSteps:
    return measured_steps(profile.folder, profile.hash, (model,), "cpu")[model]


def test_drawn_costs_differ_a_little_and_the_rest_of_the_profile_not_at_all(shipped: Profile) -> None:
    small, large = pair_of(shipped)
    drawn = [resampled_profile(shipped, [small], "cpu", k) for k in (0, 0, 1, 2, 3)]
    seconds = [p.step_cost(small, "cpu").seconds(DECODE) for p in drawn]
    assert seconds[0] == seconds[1]
    assert len(set(seconds)) == 4
    published = shipped.step_cost(small, "cpu").seconds(DECODE)
    for one in seconds:
        assert one == pytest.approx(published, rel=0.2)
    assert drawn[0].step_cost(large, "cpu") == shipped.step_cost(large, "cpu")
    assert drawn[0].step_cost(small, "wall") == shipped.step_cost(small, "wall")
    assert drawn[0].behaviour is shipped.behaviour
    assert drawn[0].load_cost(small, "cpu") == shipped.load_cost(small, "cpu")


def test_a_draw_of_a_model_does_not_depend_on_the_others(shipped: Profile) -> None:
    small, large = pair_of(shipped)
    alone, before, behind = (
        resampled_profile(shipped, models, "cpu", 3).step_cost(small, "cpu")
        for models in ([small], [small, large], [large, small])
    )
    assert alone == before == behind


def test_drawn_costs_take_strides_as_published_ones_do(shipped: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def run(seeded: Scenario, profile: Profile, engine: SimEngine) -> RunResults:
        seen.append(engine.strides)
        return run_simulated(seeded, profile, engine=engine)

    monkeypatch.setattr("heliosim.replicate.run_simulated", run)
    task = {"task": sorted(shipped.facts.behaviour.tasks)[0], "prompt_tokens": 40, "output_tokens": 20}
    load = WorkloadSpec.model_validate(
        {"requests": 5, "arrivals": {"kind": "constant", "rate_per_s": 2}, "tasks": [task]}
    )
    chosen = scenario_for("plain", {"kind": "vanilla", "model": pair_of(shipped)[0]}, shipped, load)
    run_replication(chosen, WarmUp(0, "given"), True, 0)
    assert seen == [True]


def test_uncertainty_joins_the_interval(shipped: Profile) -> None:
    """The same requests in every replication: without it only exits differ, with it step times do, too."""
    task = {"task": sorted(shipped.facts.behaviour.tasks)[0], "prompt_tokens": 40, "output_tokens": 20}
    load = WorkloadSpec.model_validate(
        {"requests": 30, "arrivals": {"kind": "constant", "rate_per_s": 2}, "tasks": [task]}
    )
    chosen = scenario_for("plain", {"kind": "vanilla", "model": pair_of(shipped)[0]}, shipped, load)
    rule, none = StoppingRule.exactly(3), WarmUp(0, "given")
    known = replicate(chosen, rule, warm_up=none).interval("mean_tpot_ms")
    assert (known.half_width, known.reason) == (None, "the same every time")
    unsure = replicate(chosen, rule, warm_up=none, profile_uncertainty=True)
    assert unsure.profile_uncertainty
    half, mean = unsure.interval("mean_tpot_ms").half_width, unsure.interval("mean_tpot_ms").mean
    assert half is not None
    assert mean == pytest.approx(known.mean, rel=0.2)
    assert 0 < half < mean
    assert run_replication(chosen, none, True, 1) == unsure.replications[1]


# --- unavailable --------------------------------------------------------------------------------------------


def unavailable(profile: Profile) -> str:
    with pytest.raises(InputError, match="profile uncertainty is unavailable") as found:
        replicate(scenario(profile), profile_uncertainty=True)
    assert "steps.parquet" in found.value.where
    assert "do without --profile-uncertainty" in found.value.remedy
    return str(found.value)


def test_costs_that_were_not_fitted_to_the_steps(tmp_path: Path) -> None:
    assert "were not fitted to these steps" in unavailable(write_synthetic_profile(tmp_path / "p"))


def test_no_steps(tmp_path: Path) -> None:
    profile = write_synthetic_profile(tmp_path / "p")
    files = {name: digest for name, digest in profile.facts.files.items() if name != "steps.parquet"}
    write_profile(profile.folder, profile.facts.model_copy(update={"files": files}))
    (profile.folder / "steps.parquet").unlink()
    assert "keeps no measured steps" in unavailable(load_profile(profile.folder))


def test_no_visits(shipped: Profile, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(shipped.folder, folder)
    table = pq.read_table(folder / "steps.parquet").drop_columns(["visit"])
    pq.write_table(table, folder / "steps.parquet")
    digests = {**shipped.facts.files, "steps.parquet": sha256_of(folder / "steps.parquet")}
    write_profile(folder, shipped.facts.model_copy(update={"files": digests}))
    with pytest.raises(InputError, match="a column is missing") as found:
        require_steps(load_profile(folder), list(shipped.facts.models), "cpu")
    assert found.value.value == "visit"
