"""Hardware calibration without a device: order of cells, the journal, the fit, what is chosen next, estimates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from heliosim_calibrate.hardware import grid
from heliosim_calibrate.hardware.adaptive import FIRST, Chooser
from heliosim_calibrate.hardware.cell import Cell, Row, absent, of_kind, row_of
from heliosim_calibrate.hardware.estimate import Estimator, by_group, estimated, nominal_speed, speed_on, steps_seconds
from heliosim_calibrate.hardware.fit import TERMS, fit_layer, held_out, line, predict, scores, terms_of
from heliosim_calibrate.hardware.grid import Extent
from heliosim_calibrate.hardware.journal import Journal
from heliosim_calibrate.hardware.memory import most_that
from heliosim_calibrate.hardware.table import read_rows, write_rows

from heliosim.errors import InputError
from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.device import open_device
from heliosim.streams import stream
from tests.helpers import spec

SMALL = spec("small", 6, (2, 4, 6), max_context=512)
QUICK = Extent(32, 256, 256, False, repeats=30, cell_s=0.03)
FULL = Extent(128, 1024, 1024, True)
TRUE = dict(zip(TERMS, (4e-5, 1e-6, 5e-7, 0, 2e-6, 0, 1e-5, 5e-6, 1e-6, 5e-8, 4e-8, 2e-5, 7e-9), strict=True))


def timed(cell: Cell, noise: float = 0.0, seed: int = 0) -> Row:
    """A layer cell whose time is that of ``TRUE``."""
    row = Row(cell, "s", (1.0,))
    seconds = float(np.array(terms_of(row)) @ np.array([TRUE[t] for t in TERMS]))
    rng = stream(seed, "cell", cell.key)
    return Row(cell, "s", tuple(seconds * float(math.exp(noise * x)) for x in rng.standard_normal(5)))


def layers(extent: Extent) -> list[Cell]:
    return [c for cells in grid.layer_cells(SMALL, extent).values() for c in cells]


def test_a_row_is_the_same_after_a_file() -> None:
    row = Row(Cell.of("m", "decode_layer", "decode 1-4", rows=4, context=128), "s", (1.0, 2.0, 4.0), drift=1.1, tries=2)
    again = row_of(json.loads(json.dumps(row.plain())))
    assert again == row
    assert again.value == 2.0
    assert again.spread == pytest.approx(0.75)
    assert again.cell.key == "m/decode_layer/context=128,rows=4"


def test_the_order_begins_with_the_ends_of_every_coordinate() -> None:
    for region, cells in grid.layer_cells(SMALL, FULL).items():
        first = cells[:6]
        for name, _ in cells[0].at:
            ends = {min(c.number(name) for c in cells), max(c.number(name) for c in cells)}
            assert ends <= {c.number(name) for c in first}, (region, name)
        assert len({c.key for c in cells}) == len(cells)


def test_a_full_grid_reaches_what_was_asked_for_and_no_further() -> None:
    cells = layers(FULL)
    assert max(c.number("rows") for c in cells) == 128
    assert max(c.number("context") for c in cells) == 512  # the model's own end
    assert all(c.number("tokens") + c.number("prefix") <= 512 for c in cells)
    assert {"decode 1-4", "decode 5+", "long context", "prefill", "mixed"} == {c.region for c in cells}
    assert len(cells) > 2 * len(layers(QUICK))


def test_every_row_of_the_table_has_cells() -> None:
    kinds = {c.kind for c in [*layers(FULL), *grid.part_cells(SMALL, FULL), *grid.fact_cells(SMALL, FULL, [1000])]}
    kinds |= {c.kind for c in [*grid.host_cells(SMALL, FULL), *grid.machine_cells(FULL), *grid.energy_cells(SMALL)]}
    assert kinds >= {
        "decode_layer", "prefill_layer", "embedding", "final_norm", "head", "sampler", "check", "decision", "host_step",
        "ingress", "detokenise", "graph", "kv_fill", "bytes", "activations", "workspace", "link", "layer_load",
        "largest_batch", "kv_blocks", "energy",
    }  # fmt: skip
    checks = {c.where["method"] for c in grid.part_cells(SMALL, FULL) if c.kind == "check"}
    fills = {c.where["method"] for c in grid.part_cells(SMALL, FULL) if c.kind == "kv_fill"}
    assert checks == {"max-prob", "margin", "entropy"}
    assert fills == {"none", "copy", "propagate", "recompute"}


# --- the fit ---------------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_terms_of_a_layer() -> None:
    rows = [timed(c) for c in layers(FULL)]
    coefficients = fit_layer(rows)
    for row in rows:
        assert predict(coefficients, row) == pytest.approx(row.value, rel=0.02)


def test_attention_is_a_straight_line_in_context_and_none_in_logarithms() -> None:
    coefficients = fit_layer([timed(c) for c in layers(FULL)])
    at = [predict(coefficients, timed(Cell.of("small", "decode_layer", rows=8, context=c))) for c in (64, 192, 320)]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], rel=1e-6)
    assert at[1] > at[0]


def test_held_out_errors_are_those_of_cells_inside_and_show_a_wrong_form() -> None:
    rows = [timed(c) for c in layers(FULL)]
    pairs = held_out(rows)
    ends = {c.number("rows") for c in layers(FULL) if c.kind == "decode_layer"}
    assert pairs
    assert not any(
        r.cell.kind == "decode_layer"
        and r.cell.number("rows") in (min(ends), max(ends))
        and r.cell.number("context") in (32, 512)
        for r, _ in pairs
    )
    assert scores(pairs)["all"].median_abs < 0.02
    bent = [Row(r.cell, "s", tuple(v * (1 + (r.cell.number("rows") % 2)) for v in r.values)) for r in rows]
    assert scores(held_out(bent))["all"].median_abs > 0.1


def test_noise_of_a_cell_falls_with_its_samples() -> None:
    cell = Cell.of("m", "decode_layer", rows=1, context=32)
    few, many = Row(cell, "s", (1.0, 1.0, 1.2, 1.2)), Row(cell, "s", (1.0, 1.0, 1.2, 1.2) * 9)
    assert many.noise == pytest.approx(few.noise / 3)


def test_a_line_goes_through_two_points_and_never_falls() -> None:
    assert line([(1, 3.0), (11, 5.0)]) == pytest.approx((2.8, 0.2))
    fixed, slope = line([(1, 3.0), (10, 2.0)])
    assert slope == 0.0
    assert 2.0 < fixed < 3.0
    assert line([(4, 7.0)]) == (7.0, 0.0)


# --- what comes next -------------------------------------------------------------------------------------------------


def run_all(chooser: Chooser, noise: float, wrong: str = "") -> list[Cell]:
    taken = []
    while (cell := chooser.next()) is not None:
        taken.append(cell)
        row = timed(cell, noise)
        if cell.region == wrong:
            rng = stream(1, cell.key)
            row = Row(cell, "s", tuple(v * float(rng.uniform(0.5, 2.0)) for v in row.values[:1]) * 3)
        chooser.learn(cell, row)
    return taken


def test_regions_end_once_they_are_predicted() -> None:
    cells = grid.layer_cells(SMALL, FULL)
    chooser = Chooser(cells)
    taken = run_all(chooser, 0.01)
    assert len(taken) < sum(map(len, cells.values()))
    assert chooser.saved == sum(map(len, cells.values())) - len(taken)
    assert all(sum(c.region == r for c in taken) >= min(FIRST, len(some)) for r, some in cells.items())
    assert "predicted within its noise" in chooser.ended.values()


def test_the_region_that_is_predicted_worst_gets_more_cells() -> None:
    cells = grid.layer_cells(SMALL, FULL)
    calm, rough = (run_all(Chooser(cells), 0.01, wrong) for wrong in ("", "prefill"))
    count = [sum(c.region == "prefill" for c in taken) for taken in (calm, rough)]
    assert count[1] > count[0]


def test_a_chooser_that_is_told_of_earlier_cells_goes_on_behind_them() -> None:
    cells = grid.layer_cells(SMALL, FULL)
    whole = run_all(Chooser(cells), 0.01)
    resumed = Chooser(cells)
    for cell in whole[:10]:
        resumed.learn(cell, timed(cell, 0.01))
    rest = run_all(resumed, 0.01)
    assert not {c.key for c in rest} & {c.key for c in whole[:10]}
    assert {c.key for c in rest} == {c.key for c in whole[10:]}


# --- the journal -----------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_where_it_was_and_drops_half_a_line(tmp_path: Path) -> None:
    out = tmp_path / "profile"
    first = Journal(out, {"seed": 0})
    first.add("a", [1, 2])
    first.add("b", {"x": 0.5})
    first.close()
    rows = tmp_path / "profile.partial" / "rows.jsonl"
    with rows.open("a") as file:
        file.write('{"name": "c", "val')
    again = Journal(out, {"seed": 0})
    assert again.resumed == 2
    assert again.get("b") == {"x": 0.5}
    assert "c" not in again
    again.add("c", 3)
    again.close()
    last = Journal(out, {"seed": 0})
    assert len(last) == 3
    last.remove()
    assert not rows.parent.exists()


def test_a_journal_of_other_settings_is_refused_by_what_differs(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "p", {"seed": 0, "models": ["a"]})
    journal.add("a", 1)
    journal.close()
    with pytest.raises(InputError, match="differs in seed"):
        Journal(tmp_path / "p", {"seed": 1, "models": ["a"]})


def test_a_folder_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="no interrupted calibration"):
        Journal(tmp_path / "p", {})
    assert (tmp_path / "p.partial" / "mine.txt").read_text() == "keep"


def test_an_empty_journal_leaves_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "p", {}).close()
    assert not (tmp_path / "p.partial").exists()


def test_rows_survive_the_table(tmp_path: Path) -> None:
    cell = Cell.of("m", "graph", "graph", rows=4)
    rows = [
        Row(Cell.of("", "link", "link", source="pinned", beside="decode"), "B/s", (1e9, 2e9, 3e9), facts={"bytes": 8}),
        absent(cell, "s", "a CPU has no graphs to capture"),
    ]
    write_rows(rows, tmp_path / "hardware.parquet")
    again = read_rows(tmp_path)
    assert again == rows
    assert not of_kind(again, "graph")
    with pytest.raises(InputError, match="no hardware cells"):
        read_rows(tmp_path / "elsewhere")


# --- bisection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 2, 7, 100, 1000])
@pytest.mark.parametrize("guess", [0, 1, 7, 99, 101, 5000])
def test_bisection_finds_the_last_that_fits_from_any_guess(most: int, guess: int) -> None:
    asked: list[int] = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= most

    assert most_that(fits, guess) == most
    assert len(asked) <= 2 if guess == most and most else len(asked) <= 30
    assert min(asked) >= 1


# --- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["A100-80GB", "H100-80GB", "H200-141GB"])
@pytest.mark.parametrize("name", ["opt-6.7b", "llama3-8b"])
def test_a_model_of_7b_takes_less_than_ten_minutes_by_its_own_estimate(device: str, name: str) -> None:
    architecture = open_architecture(name)
    model = spec(name, architecture.layers, (8, architecture.layers), max_context=1024)
    model = type(model)(
        **{
            **{f: getattr(model, f) for f in model.__dataclass_fields__},
            "layer_bytes": architecture.layer_bytes("bf16"),
            "base_bytes": architecture.base_bytes("bf16"),
            "kv_bytes_per_token_layer": architecture.kv_bytes("bf16"),
        }
    )
    speed = speed_on(open_device(device), architecture, "bfloat16")
    extent = Extent(64, 1024, 1024, True)
    cells = layer = [c for some in grid.layer_cells(model, extent).values() for c in some]
    cells = [*layer, *grid.part_cells(model, extent), *grid.fact_cells(model, extent, [40 * 10**9, 60 * 10**9])]
    cells += [*grid.host_cells(model, extent), *grid.machine_cells(extent), *grid.energy_cells(model)]
    with_times = estimated(cells, {name: Estimator(model, extent, speed)})
    _, steps_s = steps_seconds(model, speed, 0.8, 64, 1024, 1024, 1)
    assert all(c.estimate_s > 0 for c in with_times)
    assert steps_s + sum(c.estimate_s for c in with_times) < 600
    assert sum(line.seconds for line in by_group(with_times)) == pytest.approx(sum(c.estimate_s for c in with_times))


def test_an_estimate_grows_with_the_model() -> None:
    cell = layers(QUICK)[0]
    small, large = (
        Estimator(model, QUICK, nominal_speed(model, 4))(cell)
        for model in (SMALL, spec("large", 24, (24,), max_context=512))
    )
    assert large > small
