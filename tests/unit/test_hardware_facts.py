"""What a profile keeps of hardware cells, what is said of a fit, and the device file made of single kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from heliosim_calibrate.hardware import grid
from heliosim_calibrate.hardware.cell import Cell, Row, absent
from heliosim_calibrate.hardware.device_file import device_of, write_device
from heliosim_calibrate.hardware.facts import energy_facts, hardware_facts, load_facts, step_shape
from heliosim_calibrate.hardware.kernels import kernel_cells
from heliosim_calibrate.hardware.report import as_markdown, sections_of, write_calibration_report
from heliosim_calibrate.hardware.run import Measured, missing
from heliosim_calibrate.hardware.table import TABLE, write_rows

from heliosim.charts import DARK, Style
from heliosim.charts.calibration import (
    Point,
    Residual,
    drift_alt,
    drift_data,
    drift_figure,
    layer_alt,
    layer_data,
    layer_figure,
    residual_alt,
    residual_data,
    residual_figure,
    spread_alt,
    spread_data,
    spread_figure,
)
from heliosim.errors import InputError
from heliosim.formats.files import sha256_of
from heliosim.formats.hardware_facts import HardwareFacts
from heliosim.formats.profile import Energy, HoldOut, ModelPower, Profile, load_profile, write_profile
from heliosim.hardware.device import open_device
from heliosim.hardware.kernels import Kernels
from heliosim.hardware_view import hardware_problems, show_hardware
from heliosim.hold_out import sentence, verdict
from tests.profiles import MODELS, write_synthetic_profile
from tests.unit.test_hardware_cells import FULL, timed

HOLD_OUT = HoldOut(cells=40, median_abs_error=0.06, p90_abs_error=0.1, mean_signed_error=0.0, by_region={})


def rows_of() -> list[Row]:
    """Cells of two models, as a GPU might give them."""
    rows: list[Row] = []
    for spec in MODELS.values():
        rows += [timed(c, 0.01) for cells in grid.layer_cells(spec, FULL).values() for c in cells]
        for cell in grid.part_cells(spec, FULL):
            count = cell.number("rows") or cell.number("tokens")
            rows.append(Row(cell, "s", tuple((1e-6 + 1e-7 * count) * x for x in (0.9, 1.0, 1.1))))
        for cell in grid.host_cells(spec, FULL):
            rows.append(Row(cell, "s", (5e-5,) * 3))
        at = {"depth": spec.layers, "budget_bytes": 1000}
        facts = {"formula_rows": 7, "limit": "out of memory"}
        rows.append(Row(Cell.of(spec.name, "largest_batch", context=64, **at), "rows", (7.0,), facts=facts))
        rows.append(Row(Cell.of(spec.name, "kv_blocks", **at), "blocks", (3.0,), facts={"pool_blocks": 3}))
        rows.append(
            Row(Cell.of(spec.name, "activations"), "B", (100.5,) * 3, facts={"formula_bytes": 100, "fixed_bytes": 9})
        )
        load = Cell.of(spec.name, "layer_load", layers=2, source="host")
        rows.append(Row(load, "s", (1e-3, 1.1e-3, 1.2e-3), facts={"bytes": 1000}))
        graph = {"layers": 6, "eager_s": 2e-3, "capture_s": 0.2, "memory_bytes": 1 << 20}
        rows.append(Row(Cell.of(spec.name, "graph", rows=8), "s", (1e-3,) * 3, facts=graph))
    rows.append(Row(Cell.of("", "link", source="pinned", beside="nothing"), "B/s", (40e9, 50e9, 60e9)))
    beside = {"decode_slowdown": 1.2, "alone_over_beside": 1.1}
    rows.append(Row(Cell.of("", "link", source="pinned", beside="decode"), "B/s", (45e9,) * 3, facts=beside))
    rows.append(Row(Cell.of("", "link", source="pageable", beside="nothing"), "B/s", (10e9,) * 3))
    rows.append(Row(Cell.of("", "link", source="disk-cold", beside="nothing"), "B/s", (2e9,) * 3))
    rows.append(Row(Cell.of("", "decision"), "s", (2e-5,) * 3))
    rows.append(absent(Cell.of("small", "energy", phase="idle"), "W", "no counter"))
    rows += [Row(c, "s", (_kernel_seconds(c),) * 3) for c in kernel_cells(FULL, "cuda")]
    return rows


def _kernel_seconds(cell: Cell) -> float:
    """Kernels at half of A100's roofline; peaks as they are."""
    kernels, n = Kernels(open_device("A100-80GB"), "float32"), cell.number
    if cell.kind == "gemm":
        return 2 * kernels.roofline(n("m"), n("n"), n("k"))
    if cell.kind == "attention_decode":
        return 1e-5 + 1e-9 * n("groups") * n("context")
    if cell.kind == "attention_prefill":
        return 1e-5 + 1e-12 * n("prompts") * n("heads") * n("tokens") ** 2
    return 1e-6 + n("bytes") / 1e12


def facts_of(rows: list[Row]) -> HardwareFacts:
    measured = Measured(rows=rows, references=[0.98, 1.0, 1.2], rejected=3, spent_s=12.0, saved=5)
    return hardware_facts(measured, MODELS, {}, mode="full", clock="wall", budget_s=60.0)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A made-up profile with hardware cells."""
    folder = tmp_path_factory.mktemp("p") / "profile"
    made = write_synthetic_profile(folder)
    rows = rows_of()
    write_rows(rows, folder / TABLE)
    files = {**made.facts.files, TABLE: sha256_of(folder / TABLE)}
    device = {**made.facts.device, "gpu": "NVIDIA A100-SXM4-80GB", "gpu_memory_bytes": 80 * 10**9}
    write_profile(folder, made.facts.model_copy(update={"hardware": facts_of(rows), "files": files, "device": device}))
    return load_profile(folder)


def test_facts_say_what_the_cells_say(profile: Profile) -> None:
    hardware = profile.facts.hardware
    assert hardware is not None
    small = hardware.models["small"]
    assert small.layer is not None
    assert small.layer.holdout["all"].median_abs_error < 0.03
    assert small.parts["head"].per_unit_s == pytest.approx(1e-7, rel=0.01)
    assert small.parts["head"].fixed_s == pytest.approx(1e-6, rel=0.05)
    assert set(small.kv_fill) == {"none", "copy", "propagate", "recompute"}
    assert small.largest_batch[0].rows == small.largest_batch[0].formula_rows == 7
    assert small.kv_blocks[0].engine_blocks == 3
    assert small.bytes["activations per token"].measured_bytes == 100.5
    assert small.graphs[0].memory_bytes == 1 << 20
    assert hardware.links["pinned"].alone.value == 50e9
    assert hardware.links["pinned"].decode_slowdown == 1.2
    assert hardware.unavailable == {"energy": "no counter"}
    assert hardware.drift is not None
    assert (hardware.drift.rejected, hardware.drift.high) == (3, 1.2)


def test_a_profile_without_cells_is_written_as_before(tmp_path: Path) -> None:
    made = write_synthetic_profile(tmp_path / "p")
    assert made.facts.hardware is None
    assert '"hardware"' not in (tmp_path / "p" / "profile.json").read_text()


def test_loads_learn_of_other_sources_and_of_decoding_beside_them(profile: Profile) -> None:
    hardware = profile.facts.hardware
    assert hardware is not None
    fit = load_facts(profile.model("small").load["cpu"], hardware)
    assert fit.seconds_per_byte == {"pageable": 1 / 10e9, "disk": 1 / 2e9}
    assert fit.step_slowdown == 1.2


def test_windows_of_energy_give_the_power_of_each_phase(profile: Profile) -> None:
    rows = rows_of()
    window = {"call_s": 0.01, "window_s": 5.0, "calls": 500}
    for phase, watts in (("decode", 300.0), ("prefill", 400.0), ("load", 150.0)):
        cell = Cell.of("small", "energy", phase=phase)
        rows.append(Row(cell, "J", (2.0,) * 3, facts={**window, "mean_w": watts}))
    rows.append(Row(Cell.of("small", "energy", phase="idle"), "W", (90.0, 100.0, 110.0)))
    measured = Energy(source="nvml", idle_w=95.0, joules_per_step_second=200.0)
    energy = energy_facts(measured, facts_of(rows))
    assert (energy.idle_w, energy.load_w) == (100.0, 150.0)
    assert energy.models["small"] == ModelPower(decode_w=300.0, prefill_w=400.0)
    assert energy_facts(measured, facts_of(rows_of())) == measured
    assert energy_facts(Energy(source="unavailable", reason="no counter"), facts_of(rows)).source == "unavailable"


def test_a_layer_cell_is_one_layer_of_this_step() -> None:
    row = Row(Cell.of("small", "mixed_layer", rows=4, context=100, tokens=32, prefix=16), "s", (1.0,))
    shape = step_shape(row, MODELS["small"])
    assert (shape.rows, shape.tokens, shape.decode_rows, shape.prefill_rows) == (5, 36, 4, 1)
    assert shape.gathered == 4 * 112
    assert shape.prefill_products == 32 * 48
    assert shape.context == 400


def test_kinds_without_a_value_give_their_reason_and_others_none() -> None:
    some = absent(Cell.of("m", "graph", rows=1), "s", "too large")
    other = Row(Cell.of("m", "graph", rows=2), "s", (1.0,))
    skipped = Cell.of("m", "energy", phase="idle")
    assert missing(Measured(rows=[some, other], skipped=[skipped])) == {"energy": "the budget had no time for it"}
    assert missing(Measured(rows=[some])) == {"graph": "too large"}


def test_a_check_finds_batches_that_the_byte_model_forbids(profile: Profile) -> None:
    assert hardware_problems(profile) == []
    rows = rows_of()
    cell = Cell.of("small", "largest_batch", depth=2, context=64, budget_bytes=1000)
    rows.append(Row(cell, "rows", (8.0,), facts={"formula_rows": 7, "limit": "out of memory"}))
    rows.append(
        Row(Cell.of("small", "kv_blocks", depth=2, budget_bytes=1000), "blocks", (4.0,), facts={"pool_blocks": 3})
    )
    wrong = replace(profile, facts=profile.facts.model_copy(update={"hardware": facts_of(rows)}))
    assert [p.split(":")[1].strip() for p in hardware_problems(wrong)] == [
        "8 rows were allocated, the byte model says 7",
        "the engine holds 4 KV blocks, the pool 3",
    ]


# --- what is said of a fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "floor", "high", "said"),
    [
        (0.05, None, None, "met"),
        (0.06, 0.04, 0.07, "within noise"),
        (0.06, 0.04, 0.05, "missed"),
        (0.06, 0.07, None, "within noise"),
        (0.06, None, None, "missed"),
    ],
)
def test_the_bar_is_met_or_missed_or_noise_is_why(error: float, floor: float, high: float, said: str) -> None:
    update = {"median_abs_error": error, "repeat_error": floor, "repeat_error_high": high}
    holdout = HOLD_OUT.model_copy(update=update)
    assert verdict(holdout) == said
    assert f"{error:.1%}" in sentence(holdout)


def test_a_fit_without_cells_is_not_scored() -> None:
    assert verdict(HOLD_OUT.model_copy(update={"cells": 0})) == "not scored"


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_has_every_section_and_names_what_is_missing(profile: Profile, tmp_path: Path) -> None:
    write_calibration_report(profile, tmp_path)
    page, text = (tmp_path / "calibration.html").read_text(), (tmp_path / "calibration.md").read_text()
    titles = [s.title for s in sections_of(profile)]
    assert titles[:3] == ["At a glance", "Steps in the serving loop", "Layers"]
    assert all(f"## {title}" in text and title in page for title in titles)
    assert "energy: no counter." in text
    assert "3 were rejected" in text
    assert "50.00 GB/s" in text


def test_a_report_without_cells_has_the_steps_alone(tmp_path: Path) -> None:
    made = write_synthetic_profile(tmp_path / "p")
    assert [s.title for s in sections_of(made)] == ["At a glance", "Steps in the serving loop"]
    assert as_markdown("t", sections_of(made), {}).startswith("# t\n")


def test_the_terminal_shows_the_cells(profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    from heliosim.console import console

    console.cache_clear()
    show_hardware(profile)
    said = capsys.readouterr().out
    console.cache_clear()
    assert "3 cells measured again" in " ".join(said.split())
    assert "pinned" in said
    assert "not measured: energy (no counter)" in said


def test_drift_tells_usual_readings_from_others() -> None:
    data = drift_data([1.0, 1.04, 1.2, 0.9], 0.05)
    assert list(data["is_usual"]) == [True, True, False, False]
    figure = drift_figure(data, 0.05, Style({}))
    assert [len(trace.x) for trace in figure.data] == [2, 2]
    assert drift_alt(data) == "The reference lay between 0.90 and 1.20; 2 cells outside."


def test_a_layers_cells_stand_beside_their_fit_in_both_themes() -> None:
    points = [Point("decode", rows, c, 1e-5 * rows, 0.1, 1.1e-5 * rows) for rows in (1, 4) for c in (32, 64)]
    data = layer_data([*points, Point("prefill", 0, 16, 4e-5, 0.0, 4e-5)])
    assert list(data["fitted_us"] / data["measured_us"]) == pytest.approx([1.1] * 4 + [1.0])
    assert data["high_us"][0] - data["low_us"][0] == pytest.approx(1.0)
    for style in (Style({}, "5 cells"), Style({}, "5 cells", DARK)):
        figure = layer_figure(data, style)
        assert len(figure.data) == 6
        assert {a.title.text for a in figure.select_xaxes()} == {"context of each row (tokens)", "tokens of the chunk"}
    assert layer_alt(data).startswith("5 cells of one layer from 10 to 40 µs")


def test_residuals_and_spreads_are_grouped_and_told_in_words() -> None:
    residuals = residual_data([Residual("prefill", 0.02), Residual("prefill", -0.04), Residual("mixed", 0.1)])
    assert residual_alt(residuals) == "Median absolute error: mixed 10.0 %, prefill 3.0 %."
    assert [len(trace.y) for trace in residual_figure(residuals, Style({})).data] == [1, 2]
    spreads = spread_data(["head", "head", "link"], [0.1, 0.3, 2.0])
    figure = spread_figure(spreads, Style({}))
    assert [trace.name for trace in figure.data] == ["head (2)", "link (1)"]
    assert max(figure.data[1].x) == 100
    assert spread_alt(spreads).startswith("3 cells")


def test_empty_tables_of_figures_have_their_columns_and_words() -> None:
    assert list(layer_data([]).columns)[:3] == ["panel", "series", "count"]
    said = [layer_alt(layer_data([])), residual_alt(residual_data([])), drift_alt(drift_data([], 0.1))]
    assert all(text.startswith("No ") for text in [*said, spread_alt(spread_data([], []))])


# --- the device file -------------------------------------------------------------------------------------------------


def test_a_device_file_gives_back_the_kernels_it_was_made_of(profile: Profile, tmp_path: Path) -> None:
    device = write_device(profile, tmp_path / "mine.json", "A100-80GB")
    again = open_device(tmp_path / "mine.json")
    assert again == device
    kernels = Kernels(again, "float32")
    for m, n, k in ((1, 4096, 4096), (64, 1024, 12_288), (4096, 32_768, 4096)):
        assert kernels.gemm(m, n, k) == pytest.approx(2 * kernels.roofline(m, n, k), rel=1e-3)
    assert kernels.decode_attention(8, 512, 8, 8, 128) == pytest.approx(1e-5 + 1e-9 * 64 * 512, rel=1e-3)
    assert kernels.prefill_attention(1, 1024, 32, 32, 128) == pytest.approx(1e-5 + 1e-12 * 32 * 1024**2, rel=1e-3)
    assert kernels.elementwise("add", 1_048_576) == pytest.approx(1e-6 + 1_048_576 / 1e12, rel=1e-3)


def test_a_device_file_says_what_was_measured_and_what_was_taken(profile: Profile) -> None:
    origins = device_of(profile, open_device("A100-80GB")).origins()
    assert "measured" in origins["gemm"].source
    assert "measured" in origins["links"].source
    for part in ("all-reduce nccl", "host graph", "power", "gemm, libraries of 2023"):
        assert "taken from A100-80GB, not measured here" in origins[part].derivation


def test_an_unlike_device_has_its_own_peaks(profile: Profile) -> None:
    other = replace(profile, facts=profile.facts.model_copy(update={"device": {"host_cpu": "Some CPU"}}))
    device = device_of(other, open_device("A100-80GB"))
    assert device.name == "Some CPU"
    assert device.flops["float32"] == pytest.approx(_kernel_seconds(Cell.of("", "peak", of="flops")))


def test_a_profile_without_kernels_makes_no_device_file(tmp_path: Path) -> None:
    made = write_synthetic_profile(tmp_path / "p")
    with pytest.raises(InputError, match="no hardware cells"):
        write_device(made, tmp_path / "d.json")
    with pytest.raises(InputError, match="JSON"):
        write_device(made, tmp_path / "d.yaml")
    assert not (tmp_path / "d.json").exists()
