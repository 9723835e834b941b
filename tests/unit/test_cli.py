"""Bad input on the command line: exit code 2, one line that names place, value and remedy, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliosim import __version__
from heliosim.formats.profile import Profile
from heliosim.formats.results import load_run
from tests.profiles import scenario, workload, write_synthetic_profile
from tests.unit.conftest import Cli

CHECKPOINT = Path(__file__).parents[2] / "heliosim" / "checkpoints" / "tiny-opt-s"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


@pytest.fixture
def plain(profile: Profile) -> dict[str, Any]:
    """A scenario that works, as plain data."""
    value: dict[str, Any] = yaml.safe_load(scenario(profile, workload=workload(requests=12)).to_yaml())
    return value


def write(folder: Path, value: Any) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refused(cli: Cli, folder: Path, *arguments: object) -> str:
    """The one line of a command that must be refused and leave the folder as it was."""
    before = files(folder)
    code, _, err = cli(*arguments)
    assert code == 2, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    place, _, rest = lines[0].partition(" (value: ")
    assert ": " in place.removeprefix("error: "), "where, and what is wrong"
    assert len(rest.partition("). ")[2]) > 8, "a remedy"
    assert files(folder) == before, "nothing half-written"
    return lines[0]


def test_what_works_works(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    code, out, err = cli("run", write(tmp_path, plain), "--out", "run", "--replications", 1)
    assert (code, err) == (0, "")
    assert "Run written to run" in out
    assert (tmp_path / "run" / "requests.parquet").stat().st_size > 0
    code, out, _ = cli("--version")
    assert (code, out) == (0, f"heliosim {__version__}\n")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda v: v.update(sede=1), ["scenario.yaml, field sede", "(value: 1)", "Did you mean 'seed'?"]),
        (
            lambda v: v["controller"].update(kind="helois"),
            [
                "controller.kind",
                "(value: 'helois')",
                "Did you mean 'helios'? Known: early-exit, fixed, helios, vanilla.",
            ],
        ),
        (
            lambda v: v["memory"].update(budget_bytes="24 MX"),
            ["scenario.yaml, field memory.budget_bytes", "(value: '24 MX')", "units are B, kB, MB"],
        ),
        (
            lambda v: v["memory"].update(budget_bytes=1000),
            ["memory.budget_bytes", "(value: 1000)", "too small for small at 2 of 6 layers", "Give at least 2,564 B"],
        ),
        (lambda v: v.update(models=["small", "larg"]), ["model", "(value: 'larg')", "Did you mean 'large'?"]),
        (
            lambda v: v["controller"].update(candidates=["smal"]),
            ["controller.candidates", "(value: 'smal')", "Did you mean 'small'?"],
        ),
        (
            lambda v: v.update(controller={"kind": "vanilla", "model": "tiny"}),
            ["controller.model", "Known: large, small"],
        ),
        (
            lambda v: v.update(controller={"kind": "fixed", "model": "small", "depth": 3}),
            ["controller.depth", "(value: 3)", "Exits: 2, 4, 6."],
        ),
        (lambda v: v["workload"]["tasks"][0].update(task="chatt"), ["task", "'chatt'", "Did you mean 'chat'?"]),
        (lambda v: v.update(profile="deep/nowhere"), ["deep/nowhere", "no profile here", "heliosim calibrate --out"]),
        (lambda v: v.update(profile="nowhere"), ["profile: unknown name (value: 'nowhere')", "Known: "]),
    ],
)
def test_scenarios_that_cannot_run(
    cli: Cli, plain: dict[str, Any], tmp_path: Path, change: Callable[[Any], object], parts: list[str]
) -> None:
    change(plain)
    line = refused(cli, tmp_path, "run", write(tmp_path, plain), "--out", "run")
    assert "scenario.yaml" in line, "the file it came from"
    for part in parts:
        assert part in line


def test_a_missing_scenario(cli: Cli, tmp_path: Path) -> None:
    assert "absent.yaml: no such file" in refused(cli, tmp_path, "run", "absent.yaml", "--out", "run")


def test_a_misspelt_clock(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    line = refused(cli, tmp_path, "run", write(tmp_path, plain), "--clock", "walk")
    assert "--clock" in line
    assert "Did you mean 'wall'?" in line


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--engine", "fast"), "--engine: a simulation does not look at it"),
        (("--max-stride", "4"), "--max-stride: a simulation does not look at it"),
        (("--live", "--engine", "quick"), "--engine: unknown name (value: 'quick')"),
        (("--live", "--engine", "plain", "--max-stride", "4"), "max_stride (4) needs the fast engine"),
    ],
)
def test_live_options_that_mean_nothing(
    cli: Cli, plain: dict[str, Any], tmp_path: Path, options: tuple[str, ...], part: str
) -> None:
    assert part in refused(cli, tmp_path, "run", write(tmp_path, plain), *options, "--out", "run")


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"sampling": {"seed": 3}}, "have no effect at temperature 0"),
        ({"sampling": {"temperature": 1, "top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"temprature": 1}}, "temperature"),
        ({"live": {"engine": "plain", "max_stride": 2}}, "needs the fast engine"),
        ({"live": {"attention": "flash"}}, "live.attention"),
    ],
)
def test_live_sections_that_cannot_be(
    cli: Cli, plain: dict[str, Any], tmp_path: Path, section: dict[str, Any], part: str
) -> None:
    assert part in refused(cli, tmp_path, "run", write(tmp_path, plain | section), "--out", "run")


def test_a_simulation_says_that_it_does_not_draw(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    drawing = plain | {"sampling": {"temperature": 0.7, "seed": 1}}
    code, out, err = cli("run", write(tmp_path, drawing), "--out", "run", "--replications", "1")
    assert code == 0, err
    assert "only a live run draws" in out


def test_a_missing_checkpoint(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    line = refused(cli, tmp_path, "calibrate", "--models", "nope", "--out", "p")
    assert "(value: 'nope')" in line
    assert "tiny-opt-s" in line
    assert "no such checkpoint folder" in refused(cli, tmp_path, "calibrate", "--models", "deep/nope", "--out", "p")


def test_a_calibration_never_replaces_a_profile_unasked(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "p").mkdir()
    assert "already exists" in refused(cli, tmp_path, "calibrate", "--models", "tiny-opt-s", "--out", "p")


@pytest.mark.parametrize("damage", ["json", "table", "version"])
def test_a_corrupt_profile(cli: Cli, plain: dict[str, Any], tmp_path: Path, damage: str) -> None:
    folder = write_synthetic_profile(tmp_path / "p").folder
    path = folder / ("behaviour.parquet" if damage == "table" else "profile.json")
    data = path.read_bytes()
    if damage == "version":
        path.write_text(json.dumps(json.loads(data) | {"schema_version": 9}))
    else:
        path.write_bytes(data[: len(data) // 2])
    plain["profile"] = str(folder)
    part = {"json": "not valid JSON", "table": "the table was changed since", "version": "this version reads 1"}[damage]
    for arguments in (("run", write(tmp_path, plain)), ("profile", "check", folder), ("profile", "show", folder)):
        line = refused(cli, tmp_path, *arguments)
        assert str(folder / "profile.json") in line
        assert part in line


def test_a_profile_of_other_weights(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    """The names agree, the digests of the weights do not."""
    pytest.importorskip("torch")
    assert CHECKPOINT.is_dir()
    folder = write_synthetic_profile(tmp_path / "p", checkpoints={"small": "tiny-opt-s"}).folder
    plain |= {"profile": str(folder), "models": ["small"], "controller": {"kind": "vanilla", "model": "small"}}
    line = refused(cli, tmp_path, "run", write(tmp_path, plain), "--live", "--out", "run")
    assert "profile model small: was measured on other weights than tiny-opt-s holds" in line
    assert "Calibrate again" in line


def test_an_unknown_shipped_profile(cli: Cli, tmp_path: Path) -> None:
    assert "unknown name (value: 'nope')" in refused(cli, tmp_path, "profile", "show", "nope")


@pytest.mark.parametrize(
    ("row", "part"),
    [("{broken", "line 3"), ('{"timestamp": 2, "input_length": 0, "output_length": 5}', "input_length")],
)
def test_a_trace_with_a_broken_row(cli: Cli, plain: dict[str, Any], tmp_path: Path, row: str, part: str) -> None:
    good = '{"timestamp": %d, "input_length": 9, "output_length": 5}'
    (tmp_path / "t.jsonl").write_text("\n".join([good % 0, good % 1, row, good % 3]) + "\n")
    plain["workload"] = {"trace": str(tmp_path / "t.jsonl")}
    line = refused(cli, tmp_path, "run", write(tmp_path, plain), "--out", "run")
    assert "t.jsonl, line 3" in line
    assert part in line
    assert "t.jsonl, line 3" in refused(cli, tmp_path, "trace", "stats", "t.jsonl")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"batcher": {"max_batch": 32, "token_budget": 240}}, "batch <= 16"),
        ({"batcher": {"max_batch": 8, "token_budget": 2048}}, "tokens per step <= 256"),
    ],
)
def test_outside_the_calibrated_range(
    cli: Cli, plain: dict[str, Any], tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    """Forty requests at once, more than the profile's batch of 16 and 256 tokens per step."""
    load = workload(requests=40, rate_per_s=1e6, prompt=60, output=32)
    plain |= {"workload": load, "memory": {"budget_bytes": "1 MB"}, **changes}
    plain["controller"] = {"kind": "vanilla", "model": "small"}
    path = write(tmp_path, plain)
    line = refused(cli, tmp_path, "run", path, "--out", "run")
    assert "profile costs of small" in line
    assert part in line
    assert "--allow-extrapolation" in line
    code, out, err = cli("run", path, "--out", "run", "--allow-extrapolation", "--replications", 1)
    assert (code, err) == (0, "")
    assert "steps lay outside the calibrated range; these figures are extrapolated" in " ".join(out.split())


def test_a_context_outside_the_calibrated_range(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    plain["profile"] = str(write_synthetic_profile(tmp_path / "p", max_context=48).folder)
    plain["workload"] = workload(requests=5, prompt=40, output=20)
    path = write(tmp_path, plain)
    assert "context <= 48" in refused(cli, tmp_path, "run", path, "--out", "run")
    code, out, _ = cli("run", path, "--out", "run", "--allow-extrapolation")
    assert code == 0
    assert "extrapolated" in out


def test_an_output_folder_that_exists(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, plain)
    assert cli("run", path, "--out", "run")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    line = refused(cli, tmp_path, "run", path, "--out", "run", "--seed", 5)
    assert "run: already exists" in line
    assert "--overwrite" in line
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert cli("run", path, "--out", "run", "--seed", 5, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == 5
    assert {p.name for p in tmp_path.iterdir()} == {"scenario.yaml", "run"}, "the old run is gone, not moved"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("run.json", "not valid JSON"),
        ("steps.parquet", "the file was changed or damaged since the run"),
        ("scenario.yaml", "the file was changed or damaged since the run"),
    ],
)
def test_a_corrupt_run(cli: Cli, plain: dict[str, Any], tmp_path: Path, name: str, part: str) -> None:
    assert cli("run", write(tmp_path, plain), "--out", "run")[0] == 0
    assert cli("compare", "run")[0] == 0
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-20])
    line = refused(cli, tmp_path, "compare", "run", "--report", "report.html")
    assert f"run/{name}" in line
    assert part in line
    path.unlink()
    assert name in refused(cli, tmp_path, "compare", "run")


def test_a_folder_that_is_no_run(cli: Cli, tmp_path: Path) -> None:
    assert "run.json is missing" in refused(cli, tmp_path, "compare", tmp_path)


def test_examples_over_a_profile_run(cli: Cli, profile: Profile, tmp_path: Path) -> None:
    code, out, _ = cli("example", "--profile", profile.folder, "--out", "example")
    assert code == 0
    assert "example/helios.yaml" in out
    assert "already exists" in refused(cli, tmp_path, "example", "--profile", profile.folder, "--out", "example")
    assert cli("run", "example/helios.yaml", "--out", "run")[0] == 0
    code, out, _ = cli("run", "example/fleet.yaml", "--out", "fleet")
    assert code == 0
    assert "3 replicas behind a least-outstanding router" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("helios-", "plain-"))}
    assert sorted(rows) == ["helios-0", "helios-1", "plain-0"]
    assert sum(int(cells[0]) for cells in rows.values()) == load_run(tmp_path / "fleet").counts["finished"]
    assert [int(cells[5]) for cells in rows.values()] == [1, 0, 0]
    line = refused(cli, tmp_path, "run", "example/fleet.yaml", "--live", "--out", "live")
    assert "fleet: a fleet cannot run live" in line
    assert "without --live" in line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_overwriting_spares_the_users_own_files(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    path = write(own, plain)
    (own / "thesis.txt").write_text("years of work")
    before = contents(own)
    other = write(tmp_path, plain)
    for command in (("example",), ("example", "--plans"), ("run", other)):
        line = refused(cli, tmp_path, *command, "--out", "own", "--overwrite")
        assert "own: holds what is no part of" in line
        assert "choose another folder" in line
    (own / "thesis.txt").unlink()
    assert "holds the file that is being read" in refused(cli, tmp_path, "run", path, "--out", "own", "--overwrite")
    assert "is no folder" in refused(cli, tmp_path, "run", path, "--out", "own/scenario.yaml", "--overwrite")
    assert "the folder you are in" in refused(cli, tmp_path, "example", "--out", ".", "--overwrite")
    assert contents(own) == {"scenario.yaml": before["scenario.yaml"]}


PLANS = ("example", "--plans")


def test_overwriting_replaces_what_the_command_wrote(cli: Cli, plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, plain)
    (tmp_path / "empty").mkdir()
    twice = ("run", path, "--replications", 2)
    for command, out in ((twice, "empty"), (("run", path), "empty"), *2 * ((("example",), "ex"), (PLANS, "p"))):
        assert cli(*command, "--out", out, "--overwrite")[0] == 0, (command, out)
    (tmp_path / "ex" / "helios.yaml").unlink()
    assert "is not the example" in refused(cli, tmp_path, "example", "--out", "ex", "--overwrite")
    (tmp_path / "empty" / "events.parquet").unlink()
    (tmp_path / "empty" / "events.parquet").mkdir()
    assert "'events.parquet'" in refused(cli, tmp_path, "run", path, "--out", "empty", "--overwrite")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda v: v.update(profle=v.pop("profile")), ["field profle: unknown field", "Did you mean 'profile'?"]),
        (lambda v: v.pop("profile"), ["field profile: missing field"]),
        (lambda v: v.update(budget_bytes=5), ["field budget_bytes: unknown field", "Remove it. Known: allow_extra"]),
        (lambda v: v.update(slo={"ttft": 5}), ["field slo.ttft: unknown field", "Did you mean 'ttft_ms'?"]),
        (
            lambda v: v["workload"]["arrivals"].update(rate=v["workload"]["arrivals"].pop("rate_per_s")),
            ["scenario.yaml", "arrivals poisson, field rate: unknown field", "Did you mean 'rate_per_s'?"],
        ),
        (lambda v: v["workload"]["arrivals"].update(kind="poison"), ["scenario.yaml", "Did you mean 'poisson'?"]),
        (lambda v: v["workload"].update(requests=True), ["field workload.requests: a number is wanted (value: True)"]),
        (lambda v: v["workload"]["tasks"][0].update(share=False), ["field workload.tasks.0.share: a number"]),
        (lambda v: v["controller"].update(threshold=True), ["field controller.threshold: a number is wanted"]),
        (lambda v: v["workload"]["arrivals"].update(rate_per_s=True), ["scenario.yaml", "field rate_per_s: a number"]),
    ],
)
def test_fields_as_people_misspell_them(
    cli: Cli, plain: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], Any], parts: list[str]
) -> None:
    change(plain)
    line = refused(cli, tmp_path, "run", write(tmp_path, plain))
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("twice", ["seed: 5\n", "memory: {budget_bytes: 5, budget_bytes: 6}\n"])
def test_a_field_given_twice(cli: Cli, plain: dict[str, Any], tmp_path: Path, twice: str) -> None:
    path = write(tmp_path, {k: v for k, v in plain.items() if k != "memory"})
    path.write_text(path.read_text() + twice)
    line = refused(cli, tmp_path, "run", path)
    assert f"scenario.yaml, line {len(path.read_text().splitlines())}" in line
    assert "the field is given twice" in line
    assert cli("run", write(tmp_path, plain | {"allow_extrapolation": True}), "--out", "run")[0] == 0
