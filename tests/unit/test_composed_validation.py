"""The committed validation of composed profiles: its books add up, its targets are met, and the data say it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder ../shared/data is not here")


def committed() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads((ROOT / "docs/validation-composed.json").read_text("utf-8"))
    return found


def test_totals_are_those_of_the_tested_rows() -> None:
    found = committed()
    for total in (s for s in found["sets"] if s["group"] == "all"):
        rows = [r for r in found["rows"] if r["source"] == total["source"]]
        assert sum(r["was_fitted"] for r in rows) == total["fitted"]
        tested = [r for r in rows if not r["was_fitted"] and r["group"] != "beyond the window"]
        assert len(tested) == total["rows"]
        mape = sum(abs(r["composed"] / r["measured"] - 1) for r in tested) / len(tested)
        assert mape == pytest.approx(total["mape"], abs=0.001)


def test_targets_are_met_on_rows_that_fitted_nothing() -> None:
    found = committed()
    sets = {s["source"]: s for s in found["sets"] if s["group"] == "all"}
    for source, target in (("FasterTransformer", 0.15), ("TensorRT-LLM", 0.2), ("Splitwise", 0.2),
                           ("DistServe, vllm", 0.15), ("DistServe, distserve", 0.15)):  # fmt: skip
        assert sets[source]["mape"] <= target
    for model in ("gpt-6.7b", "gpt-20b"):
        part = next(s for s in found["sets"] if s["group"] == model)
        assert part["mape"] <= 0.15
    (slope,) = [m for m in found["memory_per_request"] if not m["was_fitted"]]
    assert abs(slope["error"]) <= 0.1
    assert all(abs(c["error"]) <= 0.02 for c in found["kv_capacity"])


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("published", "fit_curves", "fit_hosts", "validate_composed"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@needs_data
@pytest.mark.usefixtures("scripts")
def test_the_data_give_the_committed_rows_again() -> None:
    import published
    import validate_composed

    rows = published.tensorrt(DATA) + published.splitwise(DATA)[::7]
    for row in rows:
        checked = validate_composed.check(row)
        same = {"source": row.source, "device": row.device, "model": row.model, "tp": row.tp, "what": row.what}
        (held,) = [r for r in committed()["rows"] if (same | row.conditions).items() <= r.items()]
        assert checked.composed == pytest.approx(held["composed"], rel=1e-3)
        assert checked.was_fitted == held["was_fitted"]


@needs_data
@pytest.mark.usefixtures("scripts")
def test_the_data_give_the_shipped_host_presets_again() -> None:
    import fit_hosts

    from heliosim.hardware.device import Host, open_device

    a100, h100 = open_device("A100-80GB"), open_device("H100-80GB")
    for name in ("A100-80GB", "H200-141GB"):
        fitted = fit_hosts.hosts(DATA, a100, h100, name)
        assert {n: Host.model_validate(h) for n, h in fitted.items()} == open_device(name).hosts


@needs_data
@pytest.mark.usefixtures("scripts")
def test_the_data_give_the_shipped_curves_again() -> None:
    import fit_curves

    from heliosim.hardware.device import Attention, open_device

    root = DATA / "aiconfigurator/a100_sxm/attention/vllm/0.14.0"
    fitted = fit_curves.decode(root / "generation_attention_perf.parquet")
    assert Attention.model_validate(fitted) == open_device("A100-80GB").decode
