"""Energy meters on a made-up powercap tree, and honesty where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from heliosim_calibrate.energy import Rapl, energy_facts, find_meter, idle_watts


def package(root: Path, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


def set_energy(folder: Path, energy_uj: int) -> None:
    (folder / "energy_uj").write_text(f"{energy_uj}\n")


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    one, two = package(tmp_path, "intel-rapl:0", 100), package(tmp_path, "intel-rapl:1", 900_000)
    core = package(tmp_path, "intel-rapl:0:0", 50)
    package(tmp_path, "intel-rapl-mmio:0", 7)
    meter, reason = find_meter("cpu", tmp_path)
    assert isinstance(meter, Rapl)
    assert (meter.source, reason) == ("rapl", "")
    assert meter.read_j() == 0.0
    set_energy(one, 500_100)
    set_energy(two, 950_000)
    set_energy(core, 400_000)
    assert meter.read_j() == pytest.approx(0.55)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    folder = package(tmp_path, "intel-rapl:0", 900_000, range_uj=1_000_000)
    meter, _ = find_meter("cpu", tmp_path)
    assert meter is not None
    set_energy(folder, 100_000)
    assert meter.read_j() == pytest.approx(0.2)
    set_energy(folder, 50_000)
    assert meter.read_j() == pytest.approx(0.2 + 0.95)
    assert meter.read_j() == pytest.approx(1.15), "reading twice adds nothing"


def test_idle_power(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 5)
    meter, _ = find_meter("cpu", tmp_path)
    assert meter is not None
    assert idle_watts(meter, 0.01) == 0.0


@pytest.mark.parametrize("exists", [True, False])
def test_no_counter_is_said(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "absent"
    assert find_meter("cpu", folder) == (None, "this processor exposes no RAPL counter")


def test_an_unreadable_counter_is_said(tmp_path: Path) -> None:
    (package(tmp_path, "intel-rapl:0", 5) / "energy_uj").write_text("locked")
    meter, reason = find_meter("cpu", tmp_path)
    assert meter is None
    assert reason.startswith("RAPL counter not readable")


def test_a_gpu_without_its_library_is_said() -> None:
    meter, reason = find_meter("cuda:99")
    assert meter is None
    assert reason.startswith("NVML: ")


def test_facts(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 5)
    meter, _ = find_meter("cpu", tmp_path)
    facts = energy_facts(meter, "", idle_w=10.0, busy_j=300.0, busy_s=20.0)
    assert (facts.source, facts.idle_w, facts.joules_per_step_second) == ("rapl", 10.0, 5.0)
    assert energy_facts(meter, "", idle_w=10.0, busy_j=100.0, busy_s=20.0).joules_per_step_second == 0.0
    none = energy_facts(None, "this processor exposes no RAPL counter", None, 0.0, 20.0)
    assert none.source == "unavailable"
    assert none.reason == "this processor exposes no RAPL counter"
    assert none.idle_w is none.joules_per_step_second is None
