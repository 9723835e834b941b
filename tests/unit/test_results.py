"""The run folder: round trip, equal bytes, nothing left of an interrupted save, clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliosim.errors import InputError
from heliosim.formats import results as results_module
from heliosim.formats.results import TABLES, RunResults, load_run, save_run
from heliosim.recorder import TableRecorder
from heliosim.types import Outcome, Placement, Run
from tests.synthetic_runs import synthetic_run


@pytest.fixture(name="run", scope="module")
def _run() -> RunResults:
    return synthetic_run("helios", "tiny-opt-s", requests=24)


def test_round_trip(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    back = load_run(tmp_path / "a")
    assert back.info == run.info
    assert back.scenario_yaml == run.scenario_yaml
    assert back.host == run.host
    for name in TABLES:
        assert getattr(back, name).equals(getattr(run, name)), name


def test_equal_content_gives_equal_bytes(run: RunResults, tmp_path: Path) -> None:
    again = synthetic_run("helios", "tiny-opt-s", requests=24)
    save_run(tmp_path / "a", run)
    save_run(tmp_path / "b", replace(again, host={"wall_s": 99.0, "node": "elsewhere"}))
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted([*(f"{t}.parquet" for t in TABLES), "host.json", "run.json", "scenario.yaml"])
    for name in names:
        same = (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert same == (name != "host.json"), name


def test_chunks_do_not_change_the_bytes(run: RunResults, tmp_path: Path) -> None:
    split = pa.concat_tables([run.tokens.slice(0, 7), run.tokens.slice(7)])
    save_run(tmp_path / "a", run)
    save_run(tmp_path / "b", replace(run, tokens=split))
    name = "tokens.parquet"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_run_json_counts(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    counts = json.loads((tmp_path / "a" / "run.json").read_text())["counts"]
    assert counts["finished"] == counts["requests"] == 24
    assert counts["tokens"] == run.tokens.num_rows


def test_existing_folder_is_kept(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    with pytest.raises(InputError, match="already exists"):
        save_run(tmp_path / "a", run)
    other = replace(run, scenario_yaml="name: other\n")
    save_run(tmp_path / "a", other, overwrite=True)
    assert load_run(tmp_path / "a").scenario == {"name": "other"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_save_leaves_nothing(
    run: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        save_run(tmp_path / "a", run)
    written: list[Path] = []
    real = results_module.write_table

    def fail_at_third(path: Path, table: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        real(path, table)

    monkeypatch.setattr(results_module, "write_table", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        save_run(tmp_path / "a", replace(run, scenario_yaml="name: new\n"), overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if overwrite else [])
    if overwrite:
        assert load_run(tmp_path / "a").scenario_yaml == run.scenario_yaml


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        load_run(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["scenario.yaml", "tokens.parquet"])
def test_missing_file(run: RunResults, tmp_path: Path, name: str) -> None:
    save_run(tmp_path / "a", run)
    (tmp_path / "a" / name).unlink()
    for verify in (True, False):
        with pytest.raises(InputError, match=f"{name}.*missing"):
            load_run(tmp_path / "a", verify=verify)


def test_missing_host_file_is_fine(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    (tmp_path / "a" / "host.json").unlink()
    assert load_run(tmp_path / "a").host == {}


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + b"x" * 40 + b"PAR1"])
def test_corrupt_table(run: RunResults, tmp_path: Path, content: bytes) -> None:
    save_run(tmp_path / "a", run)
    (tmp_path / "a" / "steps.parquet").write_bytes(content)
    with pytest.raises(InputError, match="changed or damaged"):
        load_run(tmp_path / "a")
    with pytest.raises(InputError, match="not a readable table"):
        load_run(tmp_path / "a", verify=False)


def test_truncated_run_json(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    path = tmp_path / "a" / "run.json"
    path.write_text(path.read_text()[:80])
    with pytest.raises(InputError, match="not valid JSON"):
        load_run(tmp_path / "a")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_unknown_schema_version(run: RunResults, tmp_path: Path, version: object) -> None:
    save_run(tmp_path / "a", run)
    path = tmp_path / "a" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    with pytest.raises(InputError, match="schema_version"):
        load_run(tmp_path / "a")


def test_unknown_field_is_refused(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    path = tmp_path / "a" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sead": 3}))
    with pytest.raises(InputError, match="Did you mean 'seed'"):
        load_run(tmp_path / "a")


def test_wrong_columns(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    pq.write_table(run.steps.drop_columns(["rows"]), tmp_path / "a" / "steps.parquet")
    with pytest.raises(InputError, match="rows"):
        load_run(tmp_path / "a", verify=False)


def test_wrong_type(run: RunResults, tmp_path: Path) -> None:
    save_run(tmp_path / "a", run)
    index = run.steps.schema.get_field_index("rows")
    broken = run.steps.set_column(index, "rows", pa.array(["x"] * run.steps.num_rows))
    pq.write_table(broken, tmp_path / "a" / "steps.parquet")
    with pytest.raises(InputError, match="wrong type"):
        load_run(tmp_path / "a", verify=False)


def test_empty_run_is_saved_and_read(run: RunResults, tmp_path: Path) -> None:
    empty = RunResults.of(TableRecorder(), run.info, "")
    save_run(tmp_path / "a", empty)
    assert load_run(tmp_path / "a").counts["requests"] == 0


def test_scenario_facts() -> None:
    run = synthetic_run("helios", "tiny-opt-s", requests=12)
    assert (run.threshold, run.max_breaches, run.budget_bytes) == (0.8, 50, 24_000_000)
    other = replace(run, scenario_yaml="controller: {kind: vanilla}\n")
    assert (other.threshold, other.max_breaches, other.budget_bytes) == (0.8, None, None)
    assert replace(run, scenario_yaml="{").scenario == {}


def test_step_without_tokens_leaves_no_rows() -> None:
    recorder = TableRecorder()
    placement = Placement("m", 2)
    recorder.tokens(1.0, Run(placement, None, None), Outcome(1.0))  # type: ignore[arg-type]
    assert recorder.tables().tokens.num_rows == 0
