"""The GPU check: bars and verdicts, groups that die or run out of time, going on, reports that leave nothing unsaid."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from heliosim_calibrate.gpu_check import report
from heliosim_calibrate.gpu_check.__main__ import missing
from heliosim_calibrate.gpu_check.book import Book, read_book
from heliosim_calibrate.gpu_check.child import run_group
from heliosim_calibrate.gpu_check.command import run
from heliosim_calibrate.gpu_check.figures import Asked, Bar, Figure, Got
from heliosim_calibrate.gpu_check.gputests import read_results
from heliosim_calibrate.gpu_check.plan import METRICS, PAIR, SYSTEMS, Group, Measure, Options, groups
from heliosim_calibrate.gpu_check.runner import Runner

from heliosim.errors import InputError, UnknownNameError

CPU = Options(device="cpu", is_quick=True)
GPU = Options()
ROOT = Path(__file__).resolve().parents[2]


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bar", "got", "verdict"),
    [
        (Bar("at least", 0.8), Got("k", 0.8), "pass"),
        (Bar("at least", 0.8), Got("k", 0.79), "miss"),
        (Bar("at most", 0.05), Got("k", -0.05), "pass"),
        (Bar("at most", 0.05), Got("k", -0.06), "miss"),
        (Bar("at most", 0.05), Got("k", 0.06, passes=True), "pass"),
        (None, Got("k", 1.0), "no bar"),
        (Bar("at most", 0.05), Got("k", why="no time left"), "not measured"),
    ],
)
def test_a_figure_is_held_against_its_bar(bar: Bar | None, got: Got, verdict: str) -> None:
    assert Figure("g", "m", Asked("k", "what", bar=bar), got).verdict == verdict


def test_a_figure_shows_its_spread_and_unit() -> None:
    figure = Figure("g", "m", Asked("k", "what", bar=Bar("at least", 0.8)), Got("k", 0.823, 0.81, 0.83))
    assert figure.shown == "82.3 % (81.0 % to 83.0 %)"
    assert figure.bar_shown == "at least 80.0 %"
    assert Figure("g", "m", Asked("k", "what", "GB/s"), Got("k", 3021.4)).shown == "3,021 GB/s"


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GPU, Options(is_quick=True), CPU, Options(trains_pair=True)])
def test_no_figure_is_asked_twice_in_a_group(options: Options) -> None:
    for group in groups(options):
        for measure in group.measures:
            keys = [a.key for a in measure.asked]
            assert len(keys) == len(set(keys)), measure.name


def test_the_whole_fits_the_time_and_bars_are_those_of_a_gpu() -> None:
    assert sum(g.seconds for g in groups(GPU)) <= 1.25 * GPU.seconds
    assert GPU.seconds < 540
    bars = {a.key: a.bar for g in groups(GPU) for m in g.measures for a in m.asked}
    assert bars["opt-6.7b.ideal.1x128"] == Bar("at least", 0.8)
    assert bars["opt-1.3b.ideal.16x1024"] == Bar("at least", 0.5)
    assert bars["helios.0.85.e2e_p99"] == Bar("at most", 0.10)
    assert bars["throughput.ratio"] == Bar("at least", 2.0)
    on_cpu = {a.key: a.bar for g in groups(CPU) if g.name != "tests" for m in g.measures for a in m.asked}
    assert set(on_cpu.values()) == {None}


def test_every_measure_names_a_function() -> None:
    for group in groups(Options(trains_pair=True)):
        for measure in group.measures:
            module, _, function = measure.run.partition(":")
            source = (ROOT / "calibrate" / "gpu_check" / f"{module}.py").read_text(encoding="utf-8")
            assert f"\ndef {function}(book: Book)" in source, measure.run


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="machine"):
        groups(Options(parts=("machin",)))
    assert [g.name for g in groups(Options(parts=("tests", "machine")))] == ["machine", "tests"]


def test_what_is_missing_is_named() -> None:
    assert missing(("json", "no_such_module_anywhere")) == ["no_such_module_anywhere"]


# --- the runner, with stand-ins for processes ------------------------------------------------------------------------


class Stub(Runner):
    """Runs groups in this process: ``act`` does what a child would, and says how it ended."""

    def __init__(self, options: Options, work: Path, act: Callable[[Path, str], int | None]) -> None:
        self.said: list[str] = []
        super().__init__(options, work, self.said.append)
        self.act = act
        self.begun: list[str] = []

    def _process(self, group: Group, measures: Sequence[Measure], limit_s: float) -> int | None:
        for measure in measures:
            self.begun.append(measure.name)
            book = Book(self.options, measure, self.work / group.name, {})
            book.folder.mkdir(parents=True, exist_ok=True)
            book.save()
            code = self.act(book.folder, measure.name)
            if code != 0:
                return code
            for asked in measure.asked:
                book.put(asked.key, 1.0)
            book.state = "done"
            book.save()
        return 0


PART = Options(device="cpu", is_quick=True, parts=("llama3-8b",))
NAMES = ["roofline", "linearity", "loading", "throughput", "calibrate"]


def test_a_measure_that_takes_its_process_along_does_not_stop_the_others(tmp_path: Path) -> None:
    runner = Stub(PART, tmp_path, lambda _folder, name: -9 if name == "linearity" else 0)
    runner.run()
    assert runner.begun == NAMES
    states = {n: read_book(tmp_path / "llama3-8b", n) for n in NAMES}
    assert states["linearity"] is not None
    assert states["linearity"]["state"] == "failed"
    assert "died (-9)" in states["linearity"]["error"]
    assert all(book is not None and book["state"] == "done" for n, book in states.items() if n != "linearity")


def test_what_ran_out_of_time_says_so_and_is_tried_again_alone(tmp_path: Path) -> None:
    runner = Stub(PART, tmp_path, lambda _folder, name: None if name == "loading" else 0)
    runner.run()
    book = read_book(tmp_path / "llama3-8b", "loading")
    assert book is not None
    assert "out of time" in book["error"]
    again = Stub(PART, tmp_path, lambda _folder, _name: 0)
    again.run()
    assert again.begun == ["loading"]
    assert not report.failures(report.outcomes(PART, tmp_path))


def test_an_interruption_is_noted_and_gone_on_with(tmp_path: Path) -> None:
    def interrupt(_folder: Path, name: str) -> int:
        if name == "throughput":
            raise KeyboardInterrupt
        return 0

    runner = Stub(PART, tmp_path, interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    runner.interrupted()
    found = {o.measure.name: o for o in report.outcomes(PART, tmp_path)}
    assert found["throughput"].error == "interrupted"
    assert found["calibrate"].state == "not begun"
    again = Stub(PART, tmp_path, lambda _folder, _name: 0)
    again.run()
    assert again.begun == ["throughput", "calibrate"]


def test_without_time_nothing_begins_and_everything_says_why(tmp_path: Path) -> None:
    options = Options(device="cpu", is_quick=True, seconds=1.0, parts=("llama3-8b",))
    runner = Stub(options, tmp_path, lambda _folder, _name: 0)
    runner.run()
    assert runner.begun == []
    figures = [f for o in report.outcomes(options, tmp_path) for f in o.figures]
    assert figures
    assert {f.got.why for f in figures} == {"the 1 s were over"}


def test_a_process_that_does_not_even_start_is_no_endless_loop(tmp_path: Path) -> None:
    class Dead(Stub):
        def _process(self, group: Group, measures: Sequence[Measure], limit_s: float) -> int | None:
            return 1

    Dead(PART, tmp_path, lambda _folder, _name: 0).run()
    assert {o.error for o in report.outcomes(PART, tmp_path)} == {"its process ended with code 1"}


def test_a_work_folder_of_another_check_is_refused(tmp_path: Path) -> None:
    Stub(PART, tmp_path, lambda _folder, _name: 0).run()
    with pytest.raises(InputError, match="--fresh"):
        Stub(Options(device="cpu", is_quick=False), tmp_path, lambda _folder, _name: 0).run()


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_of_every_figure_what_came_out_or_why_not(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "profiles" / "llama3-8b").mkdir(parents=True)
    (work / "profiles" / "llama3-8b" / "profile.json").write_text("{}")
    runner = Stub(PART, work, lambda _folder, name: -9 if name == "loading" else 0)
    runner.run()
    Book(PART, groups(PART)[0].measures[0], work / "llama3-8b", {}).row(seconds=1.0)
    report.write(PART, work, out)
    text = (out / "report.md").read_text(encoding="utf-8")
    html = (out / "report.html").read_text(encoding="utf-8")
    made = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for measure in groups(PART)[0].measures:
        for asked in measure.asked:
            assert f"| {asked.what} |" in text
            assert asked.what in html
    assert "Nothing here is a figure of a GPU" in text
    assert {f["verdict"] for m in made["measures"] for f in m["figures"]} == {"no bar", "not measured"}
    assert all(f["why"] for m in made["measures"] for f in m["figures"] if f["value"] is None)
    assert sorted(p.name for p in out.iterdir()) == sorted(report.FILES)
    with gzip.open(out / "rows.jsonl.gz", "rt") as rows:
        assert json.loads(rows.readline()) == {"group": "llama3-8b", "measure": "roofline", "seconds": 1.0}
    with zipfile.ZipFile(out / "profiles.zip") as archive:
        assert archive.namelist() == ["llama3-8b/profile.json"]


def test_what_is_too_large_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "llama3-8b").mkdir(parents=True)
    noise = "\n".join(json.dumps({"x": os.urandom(64).hex()}) for _ in range(2000))
    (work / "llama3-8b" / "roofline.rows.jsonl").write_text(noise)
    monkeypatch.setattr(report, "MOST_BYTES", 60_000)
    report.write(PART, work, out)
    assert not (out / "rows.jsonl.gz").exists()
    assert "rows.jsonl.gz" in (out / "LEFT_OUT.txt").read_text()


def test_results_of_pytest_are_read(tmp_path: Path) -> None:
    file = tmp_path / "r.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="tests.gpu.test_a" name="one"/>'
        '<testcase classname="tests.gpu.test_a" name="two"><failure/></testcase>'
        '<testcase classname="tests.gpu.test_a" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_results(file) == (["test_a::two"], 1, 1)


# --- really, in small ------------------------------------------------------------------------------------------------


def test_the_machine_is_measured_by_the_command(tmp_path: Path) -> None:
    """The first group in its own process, as the shell script starts it."""
    pytest.importorskip("torch")
    options = Options(device="cpu", is_quick=True, seconds=120.0, parts=("machine",))
    assert run(options, tmp_path / "work", tmp_path / "out") == 0
    made = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    bandwidth = made["measures"][1]["figures"]
    assert bandwidth[0]["value"] > 0
    assert bandwidth[1]["why"] == "the CPU has no way to a device"
    assert made["machine"]["device"] == "cpu"


def test_the_shell_script_finds_the_package_from_a_checkout(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [
        str(ROOT / "scripts" / "gpu_check"),
        "--parts",
        "nothing",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --parts: unknown name")


@pytest.mark.parametrize("mode", ["plain", "fast"])
def test_decode_steps_are_timed_on_a_stand_in(tmp_path: Path, mode: str) -> None:
    """A narrow model with the layers of OPT-1.3B: rows fill, decode and leave, and time grows with depth."""
    pytest.importorskip("torch")
    from heliosim_calibrate.gpu_check.decode import weight_bytes
    from heliosim_calibrate.gpu_check.shapes import checkpoint_of
    from heliosim_calibrate.gpu_check.steps import Bench

    from heliosim.engines.torch import TorchEngine

    shape = PAIR[0]
    engine = TorchEngine({shape.model: checkpoint_of(shape, CPU, tmp_path)}, mode=mode)
    bench = Bench(engine, shape.model, 0)
    seconds = {}
    for depth in (6, 24):
        bench.place(depth, 3, 60)
        assert bench.fill(3, 20) > 0
        seconds[depth] = bench.step(3, 4).least_s
        assert set(bench.known.values()) == {20 + 1 + 4 + 3 * 4}
    assert seconds[24] > seconds[6]
    bench.drop()
    assert engine.books()["kv_used_blocks"] == 0
    spec = engine.specs[shape.model]
    assert weight_bytes(engine, shape.model, 24) == 24 * spec.layer_bytes + 512 * 64 * 4


def really(tmp_path: Path, part: str, names: list[str]) -> dict[str, Figure]:
    """Figures of measures of a group, run here within short budgets."""
    pytest.importorskip("torch")
    options = Options(device="cpu", is_quick=True, parts=(part,))
    whole = groups(options)[0]
    group = replace(whole, measures=tuple(replace(m, seconds=4.0) for m in whole.measures))
    tmp_path.mkdir(exist_ok=True)
    run_group(group, names, options, tmp_path)
    found = [o for o in report.outcomes(options, tmp_path) if o.measure.name in names]
    assert [(o.state, o.error) for o in found] == [("done", "")] * len(names)
    return {f.asked.key: f for o in found for f in o.figures}


def test_depth_and_loads_are_measured_on_stand_ins(tmp_path: Path) -> None:
    found = really(tmp_path, "llama3-8b", ["linearity", "loading"])
    assert found["llama3-8b.linearity"].got.value is not None
    load = found["llama3-8b.load"].got
    assert load.value is not None
    assert 0 < load.value < 100
    assert any("stand-ins" in o.notes[0] for o in report.outcomes(PART, tmp_path) if o.notes)
    rows = (tmp_path / "llama3-8b" / "loading.rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["kind"] for row in rows} == {"load", "slowdown"}


@pytest.mark.slow
def test_live_is_held_against_simulated_on_stand_ins(tmp_path: Path) -> None:
    """A profile is made, exits are replayed, and every metric of every system gets a figure."""
    found = really(tmp_path, "opt-pair", ["calibrate", "fidelity"])
    for system in SYSTEMS:
        for metric in METRICS:
            got = found[f"{system}.0.6.{metric}"].got
            assert got.value is not None
            assert abs(got.value) < 1, "predictions are of the right size"
    assert found["vanilla.0.6.step"].got.low is not None
