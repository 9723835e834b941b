"""The noise of a profile in a simulated run."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from heliosim.errors import InputError
from heliosim.formats.profile import Profile, load_profile
from heliosim.metrics import summarise
from heliosim.runs import run_simulated
from tests.profiles import scenario, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


def test_the_recording_is_measured_over_expected(profile: Profile) -> None:
    noise = profile.noise("cpu")
    assert set(round(r, 9) for r in noise.ratios) == {2.0, 0.8}
    assert len(noise.ratios) == 120
    assert profile.noise("cpu") is noise, "read once"
    assert set(round(r, 9) for r in profile.noise("wall").ratios) == {2.0, 0.8}


def test_steps_take_what_the_recording_says(profile: Profile) -> None:
    plain = scenario(profile, controller={"kind": "vanilla", "model": "large"}, models=("large",))
    quiet, noisy = (run_simulated(p, profile) for p in (plain, plain.model_copy(update={"step_noise": 0})))
    first_run = 1  # behind the first load
    ratio = noisy.steps["seconds"][first_run].as_py() / quiet.steps["seconds"][first_run].as_py()
    assert round(ratio, 3) in (0.8, 2.0)
    assert noisy.steps["seconds"][0] == quiet.steps["seconds"][0], "loads have no noise"


def test_draws_differ_in_time_and_meet_the_same_requests(profile: Profile) -> None:
    plan = scenario(profile)
    runs = [run_simulated(plan.model_copy(update={"step_noise": k}), profile) for k in (0, 0, 1)]
    assert runs[0].steps.equals(runs[1].steps)
    assert not runs[0].steps.equals(runs[2].steps)
    assert summarise(runs[0]).total_input_tokens == summarise(runs[2]).total_input_tokens


def test_a_profile_without_step_times_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    write_synthetic_profile(folder)
    table = pq.read_table(folder / "steps.parquet")
    pq.write_table(table.drop_columns(["gathered"]), folder / "steps.parquet")
    with pytest.raises(InputError, match=r"steps\.parquet.*no step times to replay"):
        load_profile(folder, verify=False).noise("cpu")
