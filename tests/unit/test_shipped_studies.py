"""The comparison that is shipped is what would be computed."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from heliosim_app.comparisons import Comparison
from heliosim_app.shipped_studies import FOLDER, shipped_key, shipped_study, thinned

from heliosim.comparing import Plan, run_study
from heliosim.study_tables import plain_study, study_of


def test_it_is_kept_under_the_key_of_what_it_depends_on() -> None:
    asked_for = Comparison()
    assert shipped_key() == asked_for.key()
    assert shipped_key("fleet") == asked_for.key("fleet", asked_for.names[0], asked_for.most_replicas)


@pytest.mark.parametrize("rate_place", [0, 3])
def test_cells_computed_again_are_the_same(rate_place: int) -> None:
    study = shipped_study()
    asked_for = Comparison()
    rate = study["rates_per_s"][rate_place]
    names = [asked_for.names[0], asked_for.names[-1]]
    scenarios = {name: asked_for.scenarios()[name] for name in names}
    again = thinned(plain_study(run_study(Plan(scenarios, (), rate, asked_for.replications))))
    held = [c for c in study["cells"] if c["system"] in names and c["rate_per_s"] == rate]
    fresh = {(c["system"], c["replication"]): c for c in again["cells"]}
    for cell in held:
        other = fresh[cell["system"], cell["replication"]]
        assert cell["values"] == other["values"]
        assert (cell["seed"], cell["grew"], cell["drift"]) == (other["seed"], other["grew"], other["drift"])


def test_fleet_cells_computed_again_are_the_same() -> None:
    study = shipped_study("fleet")
    asked_for = Comparison()
    name, rate = study["fleet_of"], study["fleet_rates_per_s"][0]
    plan = Plan(
        {name: asked_for.scenarios()[name]}, (), study["focus_per_s"], 2,
        fleet_of=name, fleet_rates_per_s=(rate,), replicas=(2,),
    )  # fmt: skip
    again = thinned(plain_study(run_study(plan)))
    fresh = next(c for c in again["cells"] if c["replicas"] == 2)
    held = next(c for c in study["cells"] if c["replicas"] == 2 and c["rate_per_s"] == rate and c["replication"] == 0)
    assert held["values"] == fresh["values"]


def test_it_is_small_and_readable() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.json.gz")) < 150_000
    study = study_of(shipped_study())
    assert len(study.cells) == len(study.systems) * len(study.rates_per_s) * study.replications
    assert study.profile_kind == "derived"
