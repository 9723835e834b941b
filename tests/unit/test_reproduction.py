"""The reproduction: claims have rows, what computes sees no figure of the paper, finished runs are kept."""

from __future__ import annotations

import ast
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import heliosim.reproduction
from heliosim.errors import UnknownNameError
from heliosim.reproduction import batch_size, inputs, latency, memory, runner
from heliosim.reproduction.book import ROWS, experiments_of, pick
from heliosim.reproduction.compare import relative_error, report_data, row_data, verdict_of
from heliosim.reproduction.page import markdown
from heliosim.reproduction.paper import PAPER, Said
from heliosim.reproduction.plots import svg, ticks
from heliosim.reproduction.rows import Answer, Row, Value, flatter, greater, value_of
from heliosim.reproduction.settings import key_of, prepare_scenario
from heliosim.reproduction.systems import ALONE_SMALL, HELIOS, helios

PACKAGE = Path(heliosim.reproduction.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
SEES_PAPER = {"paper.py", "compare.py"}

SECTION_4 = {
    "weight memory saved": "weights-saved",
    "weight memory of the large pair": "weights-large-pair",
    "weights of the Llama models": "weights-llama-set",
    "HBM share": "hbm-shares",
    "tokens by exit, OPT-1.3B alone": "exits-small-alone",
    "tokens by exit, OPT-6.7B alone": "exits-large-alone",
    "tokens by exit, HELIOS": "exits-helios",
    "TPOT": "tpot",
    "throughput at batch 1": "throughput",
    "throughput, both averages": "throughput-token-weighted",
    "TTFT": "ttft",
    "energy per prompt": "energy",
    "perplexity": "perplexity",
    "transitions, profiling cost": "transitions",
    "LD exposed": "ld-exposed",
    "batch size, Llama3-8B, ShareGPT": "batch-llama3-sharegpt",
    "batch size, Llama3-8B, HellaSwag": "batch-llama3-hellaswag",
    "batch size, Llama2-70B, ShareGPT": "batch-llama2-sharegpt",
    "batch size, Llama2-70B, HellaSwag": "batch-llama2-hellaswag",
    "largest batch gain": "batch-largest",
    "TH sweep": "th-sweep",
    "RI sweep": "ri-sweep",
    "LD/SW ablation": "ld-sw",
    "quality against depth": "quality-depth",
}
"""Claims of the paper and the rows that answer them."""


def constants(path: Path) -> set[float]:
    """Fractional numbers that a source has as literals."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, float)}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_id", SECTION_4.values(), ids=SECTION_4.keys())
def test_every_claim_has_a_row(row_id: str) -> None:
    assert [row.id for row in ROWS].count(row_id) == 1


def test_every_figure_of_the_paper_belongs_to_a_row() -> None:
    assert set(PAPER) <= {row.id for row in ROWS}


def test_rows_name_inputs_and_assumptions_that_exist() -> None:
    for row in ROWS:
        assert set(row.inputs) <= set(inputs.INPUTS), row.id
        assert set(row.assumptions) <= set(inputs.ASSUMPTIONS), row.id
        if row.kind in ("calibrated", "shape"):
            assert row.assumptions, row.id


def test_modules_that_compute_do_not_see_the_paper() -> None:
    looked_at = [p for p in PACKAGE.glob("*.py") if p.name not in SEES_PAPER]
    assert len(looked_at) > 15
    for path in looked_at:
        assert not any(name.startswith("heliosim.reproduction.paper") for name in imported(path)), path.name
        assert path.name == "page.py" or "heliosim.reproduction.compare" not in imported(path), path.name


def test_no_figure_of_the_paper_is_typed_into_what_computes() -> None:
    figures = {s.value for parts in PAPER.values() for s in parts.values() if s.value != round(s.value, 1)}
    assert len(figures) > 20
    for path in PACKAGE.glob("*.py"):
        if path.name not in SEES_PAPER | {"inputs.py"}:
            assert not figures & constants(path), path.name


def test_answers_do_not_change_with_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in ROWS if not row.needs and row.kind != "shape"]
    assert len(rows) > 10
    before = {row.id: row.compute({}) for row in rows}
    for row_id in list(PAPER):
        monkeypatch.setitem(PAPER, row_id, {"anything": Said(1e9)})  # type: ignore[index]
    assert {row.id: row.compute({}) for row in rows} == before


def test_inputs_are_shown_and_never_results() -> None:
    shown = [row for row in ROWS if row.kind == "input"]
    assert {row.id for row in shown} == {"exits-small-alone", "exits-large-alone"}
    for row in shown:
        answer = row.compute({})
        assert not answer.values
        assert answer.beside
        assert row.id not in PAPER


@pytest.mark.parametrize("row", [r for r in ROWS if r.kind == "exact"], ids=lambda r: r.id)
def test_exact_rows_are_within_two_percent(row: Row) -> None:
    values = {v.part: v.value for v in row.compute({}).values}
    assert set(values) == set(PAPER[row.id])
    for part, said in PAPER[row.id].items():
        assert values[part] == pytest.approx(said.value, rel=0.02), part


@pytest.mark.parametrize("row_id", ["batch-llama3-hellaswag", "batch-llama2-hellaswag"])
def test_batches_at_half_and_three_quarters_are_within_ten_percent(row_id: str) -> None:
    (row,) = pick((row_id,))
    values = row.compute({}).values[1:]
    for value in values:
        assert value.value == pytest.approx(PAPER[row_id][value.part].value, rel=0.1), value.part


# --- models behind rows -------------------------------------------------------------------------------------


def test_kv_alone_gives_the_published_bound() -> None:
    bounds = {"Llama3-8B": (5.59, 2.53, 1.51), "Llama2-70B": (16.96, 6.32, 2.77)}
    for model, expected in bounds.items():
        pool = batch_size.MemoryModel(batch_size.budget_bytes(model))
        layers = {"Llama3-8B": 32, "Llama2-70B": 80}[model]
        gains = [pool.gain(model, layers * q // 4, 100) for q in (1, 2, 3)]
        assert gains == pytest.approx(expected, rel=0.005)


def test_a_fixed_cost_lowers_the_gain_and_a_cap_ends_it() -> None:
    bare = batch_size.MemoryModel(batch_size.budget_bytes("Llama3-8B"))
    fixed = batch_size.MemoryModel(bare.budget_bytes, copies=2.0)
    capped = batch_size.MemoryModel(bare.budget_bytes, copies=2.0, cap=10)
    assert bare.gain("Llama3-8B", 16, 100) > fixed.gain("Llama3-8B", 16, 100) > 1
    assert capped.rows("Llama3-8B", 16, 100) == 10
    assert batch_size.MemoryModel(1e9).rows("Llama2-70B", 80, 100) == 0


def test_overhead_widens_the_interval_and_nothing_else() -> None:
    answer = memory.llama_set({})
    for value, alone in zip(answer.values, answer.beside, strict=True):
        assert value.low is not None
        assert value.high is not None
        assert alone.value < value.low < value.value < value.high


def test_tpot_is_layers_times_seconds() -> None:
    assert latency.full_ms(inputs.SMALL) == pytest.approx(0.971 * (6 * 0.73 + 12 * 0.047 + 24 * 0.223))


# --- statistics of rows -------------------------------------------------------------------------------------


def test_values_and_checks_over_replications() -> None:
    value = value_of("x", [1.0, 2.0, 3.0])
    assert value.value == 2.0
    assert value.low is not None
    assert value.low < 1.0
    sure = greater("a over b", [2.0, 2.1, 2.2], [1.0, 1.1, 1.3])
    assert sure.holds
    assert sure.share == 1.0
    unsure = greater("a over b", [2.0, 0.0, 2.2], [1.0, 1.1, 1.3])
    assert not unsure.holds
    assert unsure.share == pytest.approx(2 / 3)
    assert flatter("a flatter", [0.01, -0.02, 0.01], [0.3, -0.3, 0.31]).holds


def test_errors_are_signed_and_judged_by_tolerance() -> None:
    assert relative_error(9.0, 10.0) == pytest.approx(-0.1)
    assert relative_error(1.0, 0.0) is None
    assert verdict_of(Value("x", 1.05), Said(1.0, "P", 0.1)) == "within"
    assert verdict_of(Value("x", 1.15), Said(1.0, "P", 0.1)) == "beyond"
    assert verdict_of(Value("x", 1.15), Said(1.0)) is None


# --- runs ---------------------------------------------------------------------------------------------------


def count_of(rows: Sequence[Row]) -> int:
    return len(experiments_of(list(rows)))


def test_replications_of_all_systems_meet_the_same_requests() -> None:
    one, other = (prepare_scenario(x, 7, 1.0) for x in (HELIOS, ALONE_SMALL))
    assert one.workload == other.workload
    assert one.seed == other.seed
    assert sum(task.count or 0 for task in one.workload.tasks) == 1087


def test_a_key_depends_on_what_a_run_depends_on() -> None:
    keys = {
        key_of(HELIOS, 1, 1.0),
        key_of(HELIOS, 2, 1.0),
        key_of(HELIOS, 1, 0.1),
        key_of(helios(threshold=0.7), 1, 1.0),
    }
    assert len(keys) == 4
    assert key_of(HELIOS, 1, 1.0) == key_of(HELIOS, 1, 1.0)


def test_finished_runs_are_kept_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pick(("tpot-simulated",))
    done: list[Any] = []

    def perform(task: Any) -> dict[str, float]:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(task)
        return {"token_weighted_tpot_ms": float(len(done)), "mean_tpot_ms": 1.0}

    monkeypatch.setattr(runner, "perform", perform)
    planned = runner.plan(rows, tmp_path, 2, 0.1)
    assert len(planned.jobs) == 2 * count_of(rows) == 6
    with pytest.raises(KeyboardInterrupt):
        runner.run(planned, tmp_path)
    again = runner.plan(rows, tmp_path, 2, 0.1)
    assert len(again.known) == 4
    assert len(again.jobs) == 2
    done.clear()
    answers = runner.run(again, tmp_path)
    assert len(done) == 2
    assert [v.part for v in answers["tpot-simulated"][0].values] == ["OPT-1.3B", "OPT-6.7B", "HELIOS"]
    assert len(runner.plan(rows, tmp_path, 3, 0.1).jobs) == 3


def test_one_candidate_at_full_depth_is_early_exit(tmp_path: Path) -> None:
    rows = pick(("identity",))
    answers = runner.run(runner.plan(rows, tmp_path, 2, 0.05), tmp_path)
    (check,) = answers["identity"][0].checks
    assert check.holds


def test_shares_of_a_run_add_up(tmp_path: Path) -> None:
    metrics = runner.perform((HELIOS, 3, 0.05))
    for kind in ("state:", "exit:"):
        assert sum(v for k, v in metrics.items() if k.startswith(kind)) == pytest.approx(1.0)
    assert metrics["evaluations"] >= 1


# --- report -------------------------------------------------------------------------------------------------


def test_plots_are_svg_and_hold_every_series() -> None:
    series = {"name": "a & b", "x": [1.0, 2.0], "y": [3.0, 4.0], "low": [2.5, 3.5], "high": [3.5, 4.5]}
    text = svg({"title": "t", "x_title": "x", "y_title": "y", "series": [series, {**series, "name": "c"}]})
    root = ET.fromstring(text)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert "a & b" in [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 3.0), (95.0, 131.0), (0.61, 0.93), (-3.0, 41000.0)])
def test_ticks_hold_the_data_and_are_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9


def test_a_miss_is_said_and_contradictions_stay() -> None:
    (row,) = pick(("weights-saved",))
    data = row_data(row, Answer((Value("OPT-1.3B@6", 4.0),)), "command")
    assert data["values"][0]["verdict"] == "beyond"
    answer = {row.id: Answer((Value("OPT-1.3B@6", 4.0),))}
    page = markdown(report_data([row], answer, 2, 1.0, "heliosim reproduce"))
    assert "**beyond 2%**" in page
    assert "85, 92.1 and 95 %" in page


def test_committed_page_is_that_of_the_committed_data() -> None:
    data = json.loads((DOCS / "reproduction.json").read_text(encoding="utf-8"))
    assert markdown(data) == (DOCS / "reproduction.md").read_text(encoding="utf-8")
    assert data["replications"] >= 10
    assert data["share_of_requests"] == 1
    assert [row["id"] for row in data["rows"]] == [row.id for row in ROWS]


def test_committed_figures_that_need_no_run_are_current() -> None:
    data = json.loads((DOCS / "reproduction.json").read_text(encoding="utf-8"))
    of = {row["id"]: row for row in data["rows"]}
    for row in ROWS:
        if not row.needs and row.kind != "shape":
            values = {v.part: v.value for v in row.compute({}).values}
            assert {v["part"]: v["value"] for v in of[row.id]["values"]} == pytest.approx(values), row.id


# --- command ------------------------------------------------------------------------------------------------


def test_the_command_writes_and_goes_on(cli: Any) -> None:
    arguments = ("reproduce", "--rows", "weights,hbm", "-o", "out")
    code, out, _ = cli(*arguments)
    assert code == 0
    assert "within" in out
    assert {p.name for p in Path("out").iterdir()} >= {"reproduction.md", "reproduction.json"}
    assert cli(*arguments)[0] == 0


def test_unknown_rows_and_foreign_folders_are_refused(cli: Any) -> None:
    code, _, err = cli("reproduce", "--rows", "wieghts-saved")
    assert code == 2
    assert "weights-saved" in err
    Path("mine").mkdir()
    (Path("mine") / "notes.txt").write_text("x")
    assert cli("reproduce", "--rows", "weights", "-o", "mine")[0] == 2
    with pytest.raises(UnknownNameError):
        pick(("nothing",))


def test_a_dry_run_says_what_rows_cost_and_writes_nothing(cli: Any) -> None:
    code, out, _ = cli("reproduce", "--dry-run", "--quick", "--rows", "tpot-simulated")
    assert code == 0
    assert "6 runs to do" in out
    assert not Path("reproduction").exists()
