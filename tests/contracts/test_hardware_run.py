"""Hardware cells measured for real on the CPU: every kind, interrupted and taken up again, drift, budget, energy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")

from heliosim_calibrate.hardware import drift, grid, power  # noqa: E402
from heliosim_calibrate.hardware.bench import Bench, Shape  # noqa: E402
from heliosim_calibrate.hardware.cell import Cell, Row, of_kind, row_of  # noqa: E402
from heliosim_calibrate.hardware.facts import hardware_facts  # noqa: E402
from heliosim_calibrate.hardware.grid import Extent  # noqa: E402
from heliosim_calibrate.hardware.journal import Journal  # noqa: E402
from heliosim_calibrate.hardware.memory import (  # noqa: E402
    activation_formula,
    measure_activations,
    measure_bytes,
    measure_largest_batch,
    peak_bytes,
)
from heliosim_calibrate.hardware.run import HardwareRun, Measured, Setting, Target, all_cells  # noqa: E402

from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint  # noqa: E402

NAMES = ("tiny-opt-s", "tiny-llama-s")
EXTENT = Extent(4, 64, 64, False, repeats=3, cell_s=0.01)
TEXT = tuple(5 + i % 500 for i in range(400))


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    threads = torch.get_num_threads()
    yield {name: TorchEngine({name: name}, threads=1) for name in NAMES}
    torch.set_num_threads(threads)


def setting(**more: Any) -> Setting:
    return replace(Setting(torch.device("cpu"), EXTENT, None, [9_000_000], TEXT, ["hello"], None, "no counter"), **more)


def target(engine: Any, name: str) -> Target:
    info = inspect_checkpoint(checkpoint_path(name), "float32")
    return Target(engine[name].specs[name], engine[name].hosts[name], info.tokenizer_file)


def run(
    engine: Any, name: str, out: Path, progress: Callable[[str, float], None] | None = None, **more: Any
) -> Measured:
    journal = Journal(out, {"name": name})
    try:
        made = HardwareRun(
            [target(engine, name)], engine[name], setting(**more), journal, progress or (lambda _what, _share: None)
        )
        return made.go()
    finally:
        journal.close()


def bench_of(engine: Any, name: str = "tiny-opt-s") -> Bench:
    return Bench(engine[name].hosts[name], engine[name].specs[name], torch.device("cpu"), most_blocks=40)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_measured_or_says_why_not(engine: Any, tmp_path: Path, name: str) -> None:
    measured = run(engine, name, tmp_path / "p")
    spec = engine[name].specs[name]
    wanted = {c.key for c in all_cells([spec], setting())}
    got = {r.cell.key: r for r in measured.rows}
    ended = {c.key for c in all_cells([spec], setting()) if c.region in measured.ended[name]}
    assert wanted - ended <= set(got) <= wanted
    assert {r.cell.kind for r in measured.rows if not r.is_measured} <= {
        "energy",
        "graph",
        "workspace",
        "link",
        "bytes",
    }
    assert all(r.reason for r in measured.rows if not r.is_measured)
    exact = {"bytes", "largest_batch", "kv_blocks"}
    assert all(len(r.values) >= 3 for r in measured.rows if r.is_measured and r.cell.kind not in exact | {"kv_fill"})
    facts = hardware_facts(measured, {name: spec}, {}, mode="quick", clock="cpu", budget_s=None)
    assert facts.models[name].layer is not None
    assert all(b.rows == b.formula_rows for b in facts.models[name].largest_batch)
    assert all(b.engine_blocks == b.pool_blocks for b in facts.models[name].kv_blocks)


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(engine: Any, tmp_path: Path) -> None:
    seen = 0

    def interrupt(_what: str, _share: float) -> None:
        nonlocal seen
        seen += 1
        if seen == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(engine, "tiny-opt-s", tmp_path / "p", interrupt)
    kept = Journal(tmp_path / "p", {"name": "tiny-opt-s"})
    first = {row_of(v).cell.key: row_of(v).values for v in kept.named("cell:")}
    assert kept.resumed == 25
    kept.close()
    again = run(engine, "tiny-opt-s", tmp_path / "p")
    keys = [r.cell.key for r in again.rows]
    assert len(keys) == len(set(keys)) > 60
    assert {r.cell.key: r.values for r in again.rows if r.cell.key in first} == first
    third = run(engine, "tiny-opt-s", tmp_path / "p", lambda _w, _s: pytest.fail("measured again"))
    assert {r.cell.key: r.values for r in third.rows} == {r.cell.key: r.values for r in again.rows}


def test_cells_beside_an_unusual_reference_are_measured_again(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = iter([1.0, 2.0, 1.0])  # the first reading behind cells is off, the one behind their second try is not

    def read(self: drift.Reference) -> float:
        self.readings.append(1e-3)
        return next(ratios, 1.0)

    monkeypatch.setattr(drift.Reference, "read", read)
    monkeypatch.setattr(drift.Reference, "is_due", property(lambda _self: True))
    measured = run(engine, "tiny-opt-s", tmp_path / "p")
    again = [r for r in measured.rows if r.tries == 2]
    assert measured.rejected == len(again) == 1
    assert measured.unsteady == 0


def test_a_machine_that_never_settles_is_named_and_does_not_hold_up(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: drift.Reference) -> float:
        self.readings.append(1e-3)
        return 1.5

    monkeypatch.setattr(drift.Reference, "read", read)
    measured = run(engine, "tiny-opt-s", tmp_path / "p")
    beside = [r for r in measured.rows if not r.is_steady]
    assert beside
    assert measured.unsteady == len(beside)
    assert all(r.tries == drift.MOST_TRIES and r.drift == 1.5 for r in beside)


def test_a_budget_leaves_out_what_it_has_no_time_for(engine: Any, tmp_path: Path) -> None:
    measured = run(engine, "tiny-opt-s", tmp_path / "p", budget_s=0.2, estimate=lambda _cell: 0.02)
    assert measured.skipped
    assert len(measured.rows) + len(measured.skipped) >= 60
    assert not {c.key for c in measured.skipped} & {r.cell.key for r in measured.rows}
    assert len(measured.rows) < 40


@dataclass
class Meter:
    """100 W idle; each call of the work adds a joule."""

    source: Literal["nvml", "rapl"] = "nvml"
    began: float = 0.0
    extra_j: float = 0.0

    def read_j(self) -> float:
        return 100.0 * time.perf_counter() + self.extra_j


def test_energy_takes_what_idling_takes_off(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "WINDOW_S", 0.05)
    bench, meter = bench_of(engine), Meter()
    idle = power.measure_energy(bench, Cell.of("m", "energy", phase="idle"), meter, "", None)
    assert idle.value == pytest.approx(100.0, rel=1e-3)

    def work(_bench: Bench, _phase: str) -> Callable[[], None]:
        def call() -> None:
            meter.extra_j += 1.0
            time.sleep(0.001)

        return call

    monkeypatch.setattr(power, "_work", work)
    row = power.measure_energy(bench, Cell.of("m", "energy", phase="decode"), meter, "", 100.0)
    assert row.value == pytest.approx(1.0, rel=0.05)
    assert row.facts["mean_w"] > 100.0
    none = power.measure_energy(bench, Cell.of("m", "energy", phase="decode"), None, "no counter", None)
    assert (none.values, none.reason) == ((), "no counter")


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_about_what_the_shapes_say(engine: Any, name: str) -> None:
    bench = bench_of(engine, name)
    with torch.inference_mode():
        row = measure_activations(bench, Cell.of(name, "activations"), 256)
    assert row.value == pytest.approx(activation_formula(bench.host, bench.spec), rel=0.6)
    assert row.value > 0


def test_the_peak_counts_what_lives_at_the_same_time(engine: Any) -> None:
    def one_after_the_other() -> None:
        for _ in range(4):
            torch.empty(1000, dtype=torch.uint8)

    def together() -> Any:
        return [torch.empty(1000, dtype=torch.uint8) for _ in range(4)]

    bench = bench_of(engine)
    assert peak_bytes(bench, one_after_the_other) == 1000
    assert peak_bytes(bench, together) == 4000


def test_bytes_that_are_not_the_byte_models_are_an_error(engine: Any) -> None:
    bench = bench_of(engine)
    bench.spec = replace(bench.spec, layer_bytes=bench.spec.layer_bytes + 4)
    with pytest.raises(AssertionError, match="the byte model says"):
        measure_bytes(bench, Cell.of("m", "bytes", part="layer"))


def test_a_budget_too_small_for_the_weights_holds_no_row(engine: Any) -> None:
    host, spec = engine["tiny-opt-s"].hosts["tiny-opt-s"], engine["tiny-opt-s"].specs["tiny-opt-s"]
    cell = Cell.of(spec.name, "largest_batch", depth=6, context=64, budget_bytes=1_000_000)
    row = measure_largest_batch(host, spec, torch.device("cpu"), cell)
    assert (row.value, row.facts["formula_rows"]) == (0.0, 0)


def test_a_slope_is_that_of_the_layers(engine: Any) -> None:
    """Twice the layers take the time of as many layers more, whatever a pass takes beside them."""
    bench = bench_of(engine)
    with torch.inference_mode():
        shape = Shape(count=64)
        whole = sorted(bench.timer.repeated(bench.through(shape, 0, bench.layers), 15))[7]
        slope = sorted(bench.timer.differences(*(bench.through(shape, 0, n) for n in (1, bench.layers)), 5, 15))[7]
    assert slope * bench.layers == pytest.approx(whole, rel=0.5)


def test_what_a_grid_asks_for_fits_the_bench(engine: Any) -> None:
    spec = engine["tiny-opt-s"].specs["tiny-opt-s"]
    rows = [Row(c, "s", (1.0,)) for cells in grid.layer_cells(spec, EXTENT).values() for c in cells]
    assert {r.cell.kind for r in rows} == set(grid.LAYER_KINDS)
    assert len(of_kind(rows, "decode_layer", spec.name)) >= 6


def test_models_share_a_budget(engine: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "p", {})
    both = [target(engine, name) for name in NAMES]
    made = HardwareRun(both, engine[NAMES[0]], setting(budget_s=10.0), journal, lambda _w, _s: None)
    journal.close()
    assert made._share(2) == 5.0
    made.found.spent_s = 4.0  # the first took less than its share
    assert made._share(1) == 10.0
    made.found.spent_s = 12.0
    assert made._share(1) == 12.0  # nothing is left


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [Shape(3, 40), Shape(count=20, prefix=16), Shape(2, 30, 16, 0)])
def test_passes_of_the_fast_engine_run_the_same_layers(engine: Any, name: str, shape: Shape) -> None:
    """Measured on a GPU, where decoding is captured; here they give what the plain passes give."""
    host, spec = engine[name].hosts[name], engine[name].specs[name]
    outs = []
    for is_fast in (False, True):
        bench = Bench(host, spec, torch.device("cpu"), most_blocks=40, is_fast=is_fast)
        with torch.inference_mode():
            outs.append(bench.through(shape, 0, bench.layers)())
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


def test_random_weights_have_every_cell_but_those_of_files_and_text(tmp_path: Path) -> None:
    config = tmp_path / "small.json"
    fields = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    config.write_text(json.dumps(fields))
    made = TorchEngine({"small": f"random:{config}@exits=1"}, threads=1)
    journal = Journal(tmp_path / "p", {})
    targets = [Target(made.specs["small"], made.hosts["small"], None)]
    measured = HardwareRun(targets, made, setting(budgets=[400_000]), journal, lambda _w, _s: None).go()
    journal.remove()
    why = {r.cell.kind: r.reason for r in measured.rows if not r.is_measured}
    assert why["ingress"] == why["detokenise"] == "the checkpoint has no tokenizer.json"
    assert why["layer_load"] == "random weights lie on no disk"
    assert of_kind(measured.rows, "layer_load")
    assert of_kind(measured.rows, "decode_layer")
    assert of_kind(measured.rows, "largest_batch")
