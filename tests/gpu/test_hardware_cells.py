"""Hardware cells on a GPU: graphs, pinned links, out of memory, the whole of a small budget."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from heliosim_calibrate.hardware.bench import Bench, Shape  # noqa: E402
from heliosim_calibrate.hardware.cell import Cell, of_kind  # noqa: E402
from heliosim_calibrate.hardware.grid import Extent  # noqa: E402
from heliosim_calibrate.hardware.journal import Journal  # noqa: E402
from heliosim_calibrate.hardware.links import measure_link  # noqa: E402
from heliosim_calibrate.hardware.memory import measure_graph, measure_largest_batch  # noqa: E402
from heliosim_calibrate.hardware.run import HardwareRun, Setting, Target  # noqa: E402

from heliosim.engines.torch import TorchEngine  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NAME = "tiny-opt-s"
EXTENT = Extent(4, 64, 64, True, repeats=5, cell_s=0.05)


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine({NAME: NAME}, device="cuda", mode="fast")


def bench_of(engine: TorchEngine) -> Bench:
    return Bench(engine.hosts[NAME], engine.specs[NAME], engine.device, most_blocks=64)


def test_a_captured_pass_gives_what_it_gives_launched_one_by_one(engine: TorchEngine) -> None:
    bench = bench_of(engine)
    with torch.inference_mode():
        call = bench.through(Shape(4, 32), 0, bench.layers)
        said = call().clone()
        replay, seconds, held = bench.captured(call)
        replay()
        torch.cuda.synchronize()
    assert seconds > 0
    assert held >= 0
    torch.testing.assert_close(call(), said)


def test_a_graph_has_its_time_and_memory(engine: TorchEngine) -> None:
    with torch.inference_mode():
        row = measure_graph(bench_of(engine), Cell.of(NAME, "graph", rows=4), 64)
    assert row.value > 0
    assert {"capture_s", "memory_bytes", "eager_s"} <= set(row.facts)


def test_pinned_memory_is_faster_than_pageable(engine: TorchEngine) -> None:
    bench = bench_of(engine)
    rates = [
        measure_link(bench, Cell.of("", "link", source=s, beside="nothing"), EXTENT) for s in ("pinned", "pageable")
    ]
    assert rates[0].value > rates[1].value


def test_the_largest_batch_ends_out_of_memory_where_the_byte_model_says(engine: TorchEngine) -> None:
    cell = Cell.of(NAME, "largest_batch", depth=6, context=64, budget_bytes=256 << 20)
    with torch.inference_mode():
        row = measure_largest_batch(engine.hosts[NAME], engine.specs[NAME], engine.device, cell)
    said = int(row.facts["formula_rows"])
    assert said * 0.9 <= row.value <= said


def test_a_small_budget_is_kept_and_every_kind_is_there_or_says_why(engine: TorchEngine, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "p", {})
    target = Target(engine.specs[NAME], engine.hosts[NAME], None)
    text = tuple(5 + i % 500 for i in range(400))
    setting = Setting(engine.device, EXTENT, 60.0, [64 << 20], text, ["hello"], None, "no counter")
    measured = HardwareRun([target], engine, setting, journal, lambda _w, _s: None).go()
    journal.remove()
    assert of_kind(measured.rows, "decode_layer")
    assert of_kind(measured.rows, "graph")
    assert all(r.reason for r in measured.rows if not r.is_measured)
    assert "sm_clock_mhz" in measured.sensors[0]
