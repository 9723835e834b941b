"""The page of runs says whose exits a replayed run has."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from pathlib import Path

from heliosim.replays import open_replay
from heliosim.runs import run_simulated, save
from tests.profiles import scenario, workload, write_synthetic_profile


def test_a_replayed_run_is_marked(tmp_path: Path) -> None:
    from streamlit.testing.v1 import AppTest

    profile = write_synthetic_profile(tmp_path / "profile")
    asked = scenario(profile, workload=workload(requests=8), controller={"kind": "vanilla", "model": "small"})
    replay = open_replay(str(profile.folder))
    for name, given in (("own", None), ("replayed", replay)):
        save(run_simulated(asked, profile, replay=given), tmp_path / name)
    for name in ("own", "replayed"):
        source = (
            "from pathlib import Path\nfrom heliosim.formats.results import load_run\n"
            f"from heliosim_app.views import runs\n"
            f"run = load_run(Path({str(tmp_path / name)!r}))\nruns._compare(['{name}'], [run])"
        )
        page = AppTest.from_string(source, default_timeout=60).run()
        assert not page.exception
        said = " ".join(c.value for c in page.caption)
        assert ("Exits replayed from profile" in said) == (name == "replayed")
