"""Profiles side by side: signed differences, what one of them lacks, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heliosim.cli import app
from heliosim.formats.profile import Profile, load_profile
from heliosim.profile_diff import compare_profiles
from tests.profiles import STEP_SECONDS, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "one")


def changed(profile: Profile, folder: Path) -> Profile:
    """Twice the time for everything a step of ``small`` does, and no model ``large``."""
    folder.mkdir()
    values = json.loads((profile.folder / "profile.json").read_text(encoding="utf-8"))
    del values["models"]["large"]
    for fit in values["models"]["small"]["step"].values():
        fit["seconds_per"] = {name: 2 * seconds for name, seconds in fit["seconds_per"].items()}
    for name in ("behaviour.parquet", "steps.parquet"):
        (folder / name).write_bytes((profile.folder / name).read_bytes())
    (folder / "profile.json").write_text(json.dumps(values), encoding="utf-8")
    return load_profile(folder)


def test_differences_are_signed_and_by_region(profile: Profile, tmp_path: Path) -> None:
    diff = compare_profiles(profile, changed(profile, tmp_path / "two"))
    assert diff.only_a == ("large",)
    assert diff.only_b == ()
    steps = [line for line in diff.lines if line.group.startswith("steps")]
    assert {line.group for line in steps} == {"steps, decode", "steps, prefill", "steps, mixed", "steps, first exit"}
    assert all(line.difference == pytest.approx(1.0) for line in steps)
    assert all(line.difference == 0 for line in diff.lines if line.group in ("sizes", "exits", "loads"))
    back = compare_profiles(changed(profile, tmp_path / "three"), profile)
    assert {round(x.difference or 0, 9) for x in back.lines if x.group.startswith("steps")} == {-0.5}


def test_a_grid_point_by_hand(profile: Profile) -> None:
    """One row of 128 tokens through six layers on the wall clock, in milliseconds."""
    line = next(x for x in compare_profiles(profile, profile).lines if (x.model, x.what) == ("small", "1 x 128"))
    s = STEP_SECONDS
    layer = s["layer"] + s["layer_token"] + s["layer_decode"] + s["layer_decode_row"] + 128 * s["layer_decode_kv"]
    once = s["step"] + s["row"] + s["token"] + 128 * s["gathered"] + s["check"] + s["check_row"]
    assert line.a == pytest.approx(1.5 * 1e3 * (once + 6 * layer))


def test_the_exit_code_says_whether_they_differ(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    other = changed(profile, tmp_path / "two")
    same = CliRunner().invoke(app, ["profile", "diff", str(profile.folder), str(profile.folder)])
    assert (same.exit_code, "the same in everything compared" in same.output) == (0, True)
    differ = CliRunner().invoke(app, ["profile", "diff", str(profile.folder), str(other.folder)])
    assert (differ.exit_code, "only in A: large" in differ.output) == (1, True)
