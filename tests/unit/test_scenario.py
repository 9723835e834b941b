"""Scenarios: strict YAML in and out, and one hash for one content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliosim.errors import InputError
from heliosim.metrics import Slo
from heliosim.scenario import Scenario, load_scenario, parse_bytes, parse_clock
from heliosim.serving.helios import HeliosParameters
from heliosim.serving.kinds import EarlyExit, Fixed, Vanilla


def plain() -> dict[str, Any]:
    """A scenario as a person writes it."""
    return {
        "schema_version": 1,
        "name": "mine",
        "seed": 3,
        "profile": "profile",
        "models": ["small", "large"],
        "workload": {
            "requests": 20,
            "arrivals": {"kind": "gamma", "rate_per_s": 5.0, "cv": 2.0},
            "tasks": [
                {"task": "chat", "prompt_tokens": 20, "output_tokens": {"kind": "uniform", "low": 1, "high": 9}},
                {"task": "code", "prompt_tokens": 30, "output_tokens": 12, "share": 2.0},
            ],
            "order": "mix",
        },
        "memory": {"budget_bytes": "24 MB"},
        "batcher": {"max_batch": 8, "token_budget": 64},
        "controller": {"kind": "helios", "probe_requests": 4},
        "slo": {"ttft_ms": 200.0},
    }


def write(folder: Path, value: Any) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def loaded(folder: Path, **changes: Any) -> Scenario:
    return load_scenario(write(folder, plain() | changes))


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_scenario(path)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.remedy
    return text


# --- what is right ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    scenario = loaded(tmp_path)
    assert (scenario.name, scenario.seed, scenario.models) == ("mine", 3, ("small", "large"))
    assert scenario.memory.budget_bytes == 24_000_000
    assert scenario.slo == Slo(ttft_ms=200.0)
    assert (scenario.clock, scenario.batcher.watermark, scenario.allow_extrapolation) == ("cpu", 0.01, False)
    assert scenario.controller_kind() == HeliosParameters(probe_requests=4)


def test_round_trip(tmp_path: Path) -> None:
    scenario = loaded(tmp_path)
    scenario.save(tmp_path / "again.yaml")
    again = load_scenario(tmp_path / "again.yaml")
    assert again == scenario
    assert again.hash == scenario.hash
    again.save(tmp_path / "third.yaml")
    assert (tmp_path / "third.yaml").read_bytes() == (tmp_path / "again.yaml").read_bytes()


def test_an_order_by_class_needs_classes() -> None:
    given = plain()
    given["batcher"]["order"] = {"kind": "priority"}
    with pytest.raises(ValueError, match=r"give workload\.priorities"):
        Scenario.model_validate(given)
    given["workload"]["priorities"] = {"shares": [0.5, 0.5]}
    assert Scenario.model_validate(given).workload.priorities is not None


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    load = {"trace": "../traces/t.jsonl", "arrivals": {"kind": "poisson", "rate_per_s": 1.0}}
    path = write(tmp_path / "deep", plain() | {"profile": "../profiles/p", "workload": load})
    monkeypatch.chdir(tmp_path)
    scenario = load_scenario(Path("deep") / path.name)
    assert scenario.profile == str(tmp_path / "profiles" / "p")
    assert scenario.workload.trace == str(tmp_path / "traces" / "t.jsonl")
    absolute = write(tmp_path, plain() | {"profile": "/somewhere/p"})
    assert load_scenario(absolute).profile == "/somewhere/p"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"kind": "vanilla", "model": "small"}, Vanilla("small")),
        ({"kind": "early-exit", "model": "small", "threshold": 0.9}, EarlyExit("small", 0.9)),
        ({"kind": "fixed", "model": "small", "depth": 4}, Fixed("small", 4)),
        ({"kind": "helios", "candidates": ["large"]}, HeliosParameters(candidates=("large",))),
    ],
)
def test_controllers(tmp_path: Path, section: dict[str, Any], expected: object) -> None:
    assert loaded(tmp_path, controller=section).controller_kind() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (5, 5),
        ("5 B", 5),
        ("24 MB", 24_000_000),
        ("24mb", 24_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("2 kB", 2000),
        ("2 KiB", 2048),
    ],
)
def test_sizes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


# --- the hash ---------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_content_and_nothing_else(tmp_path: Path) -> None:
    base = loaded(tmp_path)
    assert loaded(tmp_path).hash == base.hash
    assert load_scenario(write(tmp_path, dict(reversed(plain().items())))).hash == base.hash, "order of fields"
    assert loaded(tmp_path, memory={"budget_bytes": 24_000_000}).hash == base.hash, "units"
    assert loaded(tmp_path, clock="cpu").hash == base.hash, "a default that is spelt out"
    assert loaded(tmp_path, profile="elsewhere").hash == base.hash, "a run names its profile by its own digest"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"seed": 4},
        {"models": ["large", "small"]},
        {"memory": {"budget_bytes": 24_000_001}},
        {"batcher": {"max_batch": 8, "token_budget": 65}},
        {"controller": {"kind": "helios", "probe_requests": 5}},
        {"controller": {"kind": "vanilla", "model": "small"}},
        {"workload": plain()["workload"] | {"requests": 21}},
        {"workload": plain()["workload"] | {"arrivals": {"kind": "gamma", "rate_per_s": 5.0, "cv": 2.1}}},
        {"clock": "wall"},
        {"slo": None},
        {"allow_extrapolation": True},
    ],
)
def test_the_hash_changes_with_every_field(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert loaded(tmp_path, **changes).hash != loaded(tmp_path).hash


def test_a_trace_counts_by_its_bytes(tmp_path: Path) -> None:
    rows = '{"timestamp": 0, "input_length": 3, "output_length": 2}\n'
    hashes = []
    for name, text in (("a.jsonl", rows), ("b.jsonl", rows), ("c.jsonl", rows * 2)):
        (tmp_path / name).write_text(text)
        hashes.append(loaded(tmp_path, workload={"trace": name}).hash)
    assert hashes[0] == hashes[1] != hashes[2]


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda v: v.update(sede=1), ["field sede: unknown field (value: 1)", "Did you mean 'seed'?"]),
        (lambda v: v["batcher"].update(maxbatch=4), ["field batcher.maxbatch", "Did you mean 'max_batch'?"]),
        (lambda v: v["workload"].update(request=4), ["field workload.request", "Did you mean 'requests'?"]),
        (lambda v: v["controller"].update(kind="helois"), ["controller.kind", "'helois'", "Did you mean 'helios'?"]),
        (lambda v: v["controller"].pop("kind"), ["controller.kind: missing field", "Known: early-exit"]),
        (
            lambda v: v["controller"].update(probe_request=4),
            ["field controller.probe_request: unknown field (value: 4)", "Did you mean 'probe_requests'?"],
        ),
        (lambda v: v["controller"].update(threshold="high"), ["field controller.threshold", "'high'"]),
        (lambda v: v["controller"].update(in_flight="restart"), ["field controller.in_flight", "'restart'"]),
        (lambda v: v["controller"].update(kind=["helios"]), ["controller.kind: unknown name"]),
        (lambda v: v["controller"].update(probe_requests=0), ["controller.probe_requests: must be at least 1"]),
        (lambda v: v.update(memory={"budget_bytes": "24 MX"}), ["field memory.budget_bytes", "24 MX", "MB, GB, KiB"]),
        (lambda v: v.update(memory={"budget_bytes": 0}), ["field memory.budget_bytes", "greater than 0"]),
        (lambda v: v.update(memory={"budget_bytes": 1.5}), ["field memory.budget_bytes", "whole bytes"]),
        (
            lambda v: v.update(batcher={"max_batch": 32, "token_budget": 16}),
            ["field batcher", "token_budget (16) must be at least max_batch (32)"],
        ),
        (lambda v: v.update(models=["small", "small"]), ["field models", "a model is named twice"]),
        (lambda v: v.update(models=[]), ["field models"]),
        (lambda v: v.pop("profile"), ["field profile: missing field"]),
        (lambda v: v.update(seed=-1), ["field seed", "-1"]),
        (lambda v: v.update(clock="gpu"), ["field clock", "'cpu' or 'wall'"]),
        (lambda v: v.update(slo={"ttft_ms": -5}), ["field slo", "ttft_ms must be positive"]),
        (lambda v: v.update(schema_version=2), ["field schema_version", "2"]),
        (lambda v: v["workload"]["arrivals"].update(kind="poison"), ["arrivals", "Did you mean 'poisson'?"]),
    ],
)
def test_what_is_refused(tmp_path: Path, change: Callable[[Any], object], parts: list[str]) -> None:
    value = plain()
    change(value)
    text = complaint(write(tmp_path, value))
    for part in parts:
        assert part in text


def test_files_that_are_no_scenario(tmp_path: Path) -> None:
    assert "no such file" in complaint(tmp_path / "absent.yaml")
    assert "line 2: not valid YAML" in complaint(write(tmp_path, "name: x\n  seed: [1\n"))
    assert "a scenario is a mapping" in complaint(write(tmp_path, "- a\n- b\n"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "not valid YAML" in complaint(tmp_path / "bytes.yaml")


def test_a_clock_from_the_command_line() -> None:
    assert parse_clock("wall") == "wall"
    with pytest.raises(InputError, match="Did you mean 'wall'"):
        parse_clock("walk")


# --- fleets -----------------------------------------------------------------------------------------------------------


def with_fleet(**changes: Any) -> dict[str, Any]:
    fleet = {
        "router": "power-of-two",
        "replicas": [
            {"name": "a100", "count": 2},
            {"name": "h100", "memory": {"budget_bytes": "48 MB"}, "controller": {"kind": "vanilla", "model": "large"}},
        ],
        "failures": [{"replica": "a100-1", "at_s": 3.0, "restart_after_s": 2.0}, {"replica": "a100-1", "at_s": 5.0}],
    }
    return plain() | {"fleet": fleet | changes}


def test_a_fleet(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, with_fleet()))
    assert scenario.fleet is not None
    assert scenario.fleet.names == ("a100-0", "a100-1", "h100-0")
    own, other = (scenario.of_group(group) for group in scenario.fleet.replicas)
    assert own.model_dump() == scenario.model_dump() | {"fleet": None}
    assert (other.memory.budget_bytes, other.controller_kind()) == (48_000_000, Vanilla("large"))
    assert other.batcher == scenario.batcher
    scenario.save(tmp_path / "again.yaml")
    assert load_scenario(tmp_path / "again.yaml") == scenario
    assert "null" not in (tmp_path / "again.yaml").read_text().split("replicas:")[1].split("failures:")[0]


def test_a_fleet_counts_in_the_hash_but_not_where_its_profiles_lie(tmp_path: Path) -> None:
    groups = [[{"name": "a"}], [{"name": "a", "count": 2}], [{"name": "a", "profile": "x"}]]
    one, two, elsewhere = (load_scenario(write(tmp_path, with_fleet(replicas=g, failures=[]))) for g in groups)
    assert len({loaded(tmp_path).hash, one.hash, two.hash}) == 3
    assert one.hash == elsewhere.hash


def test_profiles_of_groups_count_from_the_file(tmp_path: Path) -> None:
    groups = [{"name": "a", "profile": "../p"}, {"name": "b", "profile": "shipped"}]
    scenario = load_scenario(write(tmp_path, with_fleet(replicas=groups, failures=[])))
    assert scenario.fleet is not None
    assert [g.profile for g in scenario.fleet.replicas] == [str(tmp_path.parent / "p"), "shipped"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"router": "least-outstandin"},
            ["field fleet.router", "did you mean 'least-outstanding'?", "known: least-kv"],
        ),
        ({"replicas": []}, ["field fleet.replicas"]),
        ({"replicas": [{"name": "a"}, {"name": "a"}]}, ["field fleet.replicas", "the name 'a' stands at two groups"]),
        ({"replicas": [{"name": "a/b"}]}, ["field fleet.replicas.0.name", "a group's name has letters"]),
        ({"replicas": [{"name": "a", "count": 0}]}, ["field fleet.replicas.0.count"]),
        ({"replicas": [{"name": "a"}, {"name": "b", "count": 10**30}]}, ["fleet.replicas", "at most 1048576"]),
        ({"replicas": [{"name": "a", "cuont": 2}]}, ["unknown field", "Did you mean 'count'?"]),
        ({"replicas": [{"name": "a", "models": ["x", "x"]}]}, ["fleet.replicas.0.models", "a model is named twice"]),
        (
            {"replicas": [{"name": "a100", "count": 2, "controller": {"kind": "vanila"}}]},
            ["fleet group 'a100'", "Did you mean 'vanilla'?"],
        ),
        (
            {"failures": [{"replica": "a100-2", "at_s": 1.0}]},
            ["field fleet", "unknown replica 'a100-2'; did you mean 'a100-", "known: a100-0, a100-1, h100-0"],
        ),
        ({"failures": [{"replica": "a100-0", "at_s": -1.0}]}, ["field fleet.failures.0.at_s"]),
        ({"failures": [{"replica": "a100-0", "at_s": 1.0, "restart_after_s": 0.0}]}, ["restart_after_s"]),
        (
            {"failures": [{"replica": "a100-0", "at_s": 4.0}, {"replica": "a100-0", "at_s": 9.0}]},
            ["a100-0 is down for good from 4 s on, so it cannot fail at 9 s"],
        ),
        (
            {
                "failures": [
                    {"replica": "a100-0", "at_s": 7.0},
                    {"replica": "a100-0", "at_s": 4.0, "restart_after_s": 3.5},
                ]
            },
            ["a100-0 is down for 3.5 s from 4 s on, so it cannot fail at 7 s"],
        ),
    ],
)
def test_what_is_refused_of_a_fleet(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    text = complaint(write(tmp_path, with_fleet(**change)))
    for part in parts:
        assert part in text


# --- changes ----------------------------------------------------------------------------------------------------------


def test_changes_read_units_and_come_back_from_a_file(tmp_path: Path) -> None:
    changes = [
        {"at_s": 60, "slo": {"ttft_ms": 100.0}, "objective": "ttft", "max_perplexity": 9.5},
        {"at_s": 120, "memory": {"budget_bytes": "12 MB"}},
    ]
    read = load_scenario(write(tmp_path, plain() | {"changes": changes}))
    assert read.changes[1].memory is not None
    assert read.changes[1].memory.budget_bytes == 12_000_000
    first = read.behind(read.changes[0])
    assert (first.slo, first.memory) == (Slo(ttft_ms=100.0), read.memory)
    assert first.behind(read.changes[1]).slo == Slo(ttft_ms=100.0)
    assert first.behind(read.changes[1]).memory.budget_bytes == 12_000_000
    read.save(tmp_path / "again.yaml")
    assert load_scenario(tmp_path / "again.yaml") == read
    assert read.hash != load_scenario(write(tmp_path, plain())).hash


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ([{"at_s": 1.0}], ["changes", "nothing changes"]),
        ([{"at_s": 0, "objective": "ttft"}], ["changes", "greater than 0"]),
        ([{"at_s": 2.0, "objective": "ttft"}, {"at_s": 2.0, "objective": "energy"}], ["at_s must rise", "2 s"]),
        ([{"at_s": 1.0, "objective": "speed"}], ["changes", "objective"]),
        ([{"at_s": 1.0, "memory": {"budget_bytes": "1 XB"}}], ["budget_bytes", "not a size"]),
        ([{"at_s": 1.0, "depth": 4}], ["changes", "depth"]),
    ],
)
def test_changes_that_are_refused(tmp_path: Path, changes: list[Any], parts: list[str]) -> None:
    text = complaint(write(tmp_path, plain() | {"changes": changes}))
    for part in parts:
        assert part in text


def test_memory_of_a_group_of_its_own_does_not_change(tmp_path: Path) -> None:
    changes = [{"at_s": 1.0, "memory": {"budget_bytes": "12 MB"}}]
    assert "fleet group 'h100' has memory of its own" in complaint(write(tmp_path, with_fleet() | {"changes": changes}))
