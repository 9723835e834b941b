"""Profiles on disk: what was written is read, and whatever is wrong is said in one line with file, field and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from heliosim.costs import TERMS
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import sha256_of
from heliosim.formats.profile import Energy, Profile, load_behaviour, load_profile, write_profile
from heliosim.profile_view import check_profile
from tests.profiles import (
    LARGE,
    LOAD_SECONDS,
    MODELS,
    SMALL,
    STEP_SECONDS,
    TASKS,
    TEXTS_PER_TASK,
    TOKENS_PER_TEXT,
    WALL_FACTOR,
    behaviour_columns,
    write_synthetic_profile,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


@pytest.fixture
def folder(original: Profile, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original.folder, tmp_path / "copy"))


def complaint(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_profile(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    assert caught.value.remedy
    return text


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    """Change profile.json as plain data."""
    path = folder / "profile.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def drop_column(folder: Path, column: str) -> None:
    """Take a column out of the behaviour table and make the digest agree."""
    path = folder / "behaviour.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    edit(folder, lambda v: v["files"].update({"behaviour.parquet": sha256_of(path)}))


# --- what is right ----------------------------------------------------------------------------------------------------


def test_round_trip(original: Profile, tmp_path: Path) -> None:
    again = load_profile(Path(shutil.copytree(original.folder, tmp_path / "copy")))
    assert again.facts == original.facts
    assert again.hash == original.hash
    write_profile(again.folder, again.facts)
    assert again.hash == original.hash, "writing what was read gives the same bytes"


def test_sizes_and_costs_are_those_written(original: Profile) -> None:
    assert original.spec("small") == SMALL
    assert original.spec("large") == LARGE
    cost = original.step_cost("small", "cpu")
    assert dict(zip(TERMS, cost.coefficients, strict=True)) == STEP_SECONDS
    assert (cost.max_rows, cost.max_context, cost.max_tokens) == (16, 256, 256)
    assert original.load_cost("large", "wall")["load"] == pytest.approx(WALL_FACTOR * LOAD_SECONDS["load"])


def test_behaviour_is_grouped_by_sequence_and_source(original: Profile) -> None:
    behaviour = original.behaviour
    columns = behaviour_columns()
    assert {task: len(names) for task, names in behaviour.sequences.items()} == dict.fromkeys(TASKS, TEXTS_PER_TASK)
    assert len(behaviour.texts) == 8 * len(TASKS) * TEXTS_PER_TASK
    first = behaviour.texts["chat-000", "small:full"]
    assert (first.task, first.prompt_tokens, first.tokens, first.end) == ("chat", 24, TOKENS_PER_TEXT, None)
    assert behaviour.texts["chat-001", "small:full"].end == 16
    written = np.asarray(columns["confidence:large@8"][:TOKENS_PER_TEXT], dtype=np.float32)
    assert np.array_equal(first.confidence["large@8"], written)
    assert set(first.agrees) == {f"{name}@{e}" for name, s in MODELS.items() for e in s.exits}


def test_the_check_passes_and_finds_what_cannot_be(original: Profile, folder: Path, capsys: Any) -> None:
    assert check_profile(original) == 0

    def break_it(value: Any) -> None:
        value["models"]["small"]["largest_batch"][0]["rows"] += 1
        value["models"]["large"]["step"]["cpu"]["holdout"]["median_abs_error"] = 0.4
        value["behaviour"]["rows"] += 5

    edit(folder, break_it)
    capsys.readouterr()
    assert check_profile(load_profile(folder)) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "the byte model says" in printed
    assert "miss held-out cells by 40%" in printed
    assert "rows in the table" in printed


def test_power_is_known_only_where_it_was_metered(original: Profile, tmp_path: Path) -> None:
    assert original.busy_watts is None
    energy = Energy(source="rapl", idle_w=20.0, joules_per_step_second=15.0)
    assert write_synthetic_profile(tmp_path / "p", energy=energy).busy_watts == 35.0


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_missing_folder_and_file(tmp_path: Path) -> None:
    assert "no profile here" in complaint(tmp_path / "absent")
    assert "heliosim calibrate --out" in complaint(tmp_path)


def test_broken_json_names_the_line(folder: Path) -> None:
    path = folder / "profile.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "oops", *lines[5:]]))
    text = complaint(folder)
    assert "profile.json, line 5" in text
    assert "not valid JSON" in text
    path.write_text("\n".join(lines[: len(lines) // 2]))
    assert "not valid JSON" in complaint(folder)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not valid JSON" in complaint(folder)


@pytest.mark.parametrize("version", [3, "1", None])
def test_another_schema_version(folder: Path, version: Any) -> None:
    edit(folder, lambda v: v.update(schema_version=version))
    text = complaint(folder)
    assert f"field schema_version: this version reads 1 and 2 (value: {version!r})" in text


def test_a_profile_that_is_no_object(folder: Path) -> None:
    (folder / "profile.json").write_text("[1, 2]")
    assert "schema_version" in complaint(folder)


def test_an_unknown_field_says_the_nearest(folder: Path) -> None:
    edit(folder, lambda v: v["models"]["small"].update(layer_byte=1000))
    text = complaint(folder)
    assert "field models.small.layer_byte: unknown field" in text
    assert "Did you mean 'layer_bytes'?" in text


def test_a_missing_field(folder: Path) -> None:
    edit(folder, lambda v: v["models"]["small"].pop("layers"))
    assert "field models.small.layers: missing field" in complaint(folder)


def test_a_changed_or_missing_table(folder: Path) -> None:
    path = folder / "behaviour.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "field files.behaviour.parquet: the table was changed since" in complaint(folder)
    assert load_profile(folder, verify=False).facts.seed == 0
    path.unlink()
    assert "the table is missing (value: 'behaviour.parquet')" in complaint(folder)


def test_a_table_that_is_none(folder: Path) -> None:
    path = folder / "behaviour.parquet"
    path.write_bytes(b"not parquet")
    edit(folder, lambda v: v["files"].update({"behaviour.parquet": sha256_of(path)}))
    with pytest.raises(InputError, match="not a readable table") as caught:
        _ = load_profile(folder).behaviour
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["confidence:large@8", "agrees:small@2", "sequence", "source", "task", "end"])
def test_a_missing_column_is_named(folder: Path, column: str) -> None:
    drop_column(folder, column)
    with pytest.raises(InputError, match="columns") as caught:
        _ = load_profile(folder).behaviour
    assert column.removeprefix("confidence:").removeprefix("agrees:") in str(caught.value)


def test_a_model_that_was_not_scored(original: Profile) -> None:
    with pytest.raises(InputError, match="no confidences for this exit"):
        load_behaviour(original.folder / "behaviour.parquet", {"medium": (3, 6)})


@pytest.mark.parametrize("kind", ["step", "load"])
def test_cost_terms_must_be_known_and_not_negative(folder: Path, kind: str) -> None:
    term = {"step": "check_row", "load": "kv_byte"}[kind]
    edit(folder, lambda v: v["models"]["small"][kind]["cpu"]["seconds_per"].update({term: -1e-9}))
    text = complaint(folder)
    assert f"field models.small.{kind}.cpu.seconds_per" in text
    assert "must not be negative" in text
    edit(folder, lambda v: v["models"]["small"][kind]["cpu"]["seconds_per"].pop(term))
    assert "must be exactly" in complaint(folder)


def test_schema_1_reads_as_a_profile_without_what_came_later(folder: Path) -> None:
    def older(values: dict[str, Any]) -> None:
        values["schema_version"] = 1
        del values["composition"]
        for model in values["models"].values():
            del model["tensor_parallel"], model["memory"]
            for fit in model["step"].values():
                del fit["curves"], fit["seconds_per"]["layer_decode_context"], fit["seconds_per"]["layer_mixed_context"]

    now = load_profile(folder)
    edit(folder, older)
    before = load_profile(folder)
    assert before.step_cost("small", "cpu") == now.step_cost("small", "cpu")
    assert before.model("small").tensor_parallel == 1
    assert before.noise("cpu").ratios == now.noise("cpu").ratios


def test_curves_that_end_before_the_range(folder: Path) -> None:
    points = {"layer": [[1, 1e-4], [100, 2e-4]], "head": [[1, 1e-4], [100, 2e-4]]}
    edit(folder, lambda v: v["models"]["small"]["step"]["cpu"].update(curves=points))
    assert "the layer curve ends at 100, but the range of these costs at 256" in complaint(folder)
    points["layer"][1][0] = 50
    points["layer"].append([300, 1e-4])
    edit(folder, lambda v: v["models"]["small"]["step"]["cpu"].update(curves=points))
    assert "must not fall" in complaint(folder)


def test_composed_profiles_say_of_what(folder: Path) -> None:
    derivation = {
        "method": "m", "sources": [{"name": "n", "used_for": "u", "url": "l", "licence": "MIT"}],
        "assumptions": [], "synthetic": [],
    }  # fmt: skip
    edit(folder, lambda v: v.update(kind="composed", derivation=derivation))
    assert "a composed profile has a composition" in complaint(folder)
    parts = {"device": "d", "dtype": "float16", "tensor_parallel": {"small": 2}, "host": "graph", "behaviour": "none"}
    edit(folder, lambda v: v.update(composition=parts))
    assert load_profile(folder).origin == "composed, not measured"
    assert not load_profile(folder).is_measured


def test_an_unknown_model_says_the_nearest(original: Profile) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'small'\? Known: large, small") as caught:
        original.spec("smal")
    assert str(original.folder) in str(caught.value)


def test_a_clock_that_was_not_measured(tmp_path: Path) -> None:
    gpu = write_synthetic_profile(tmp_path / "gpu", clocks=("wall",))
    with pytest.raises(InputError, match="not measured on this clock") as caught:
        gpu.step_cost("small", "cpu")
    assert "Set clock: wall." in str(caught.value)
    with pytest.raises(InputError, match="not measured on this clock"):
        gpu.load_cost("small", "cpu")
    assert gpu.step_cost("small", "wall").max_rows == 16
    assert gpu.clock() == "wall"
