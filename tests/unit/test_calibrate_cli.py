"""The command line of a calibration: what it would do, what it refuses, where it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliosim.errors import InputError, UnknownNameError
from tests.unit.conftest import Cli

pytest.importorskip("torch")

from heliosim_calibrate.calibrate import Request
from heliosim_calibrate.dry_run import plan_of
from heliosim_calibrate.stages import GPU_BUDGET_S, budget_of, mode_of, todo_of

from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint


def request(**more: object) -> Request:
    return Request(**{"models": ["tiny-opt-s"], "out": Path("p"), "device": "cpu", **more})  # type: ignore[arg-type]


def test_a_dry_run_lists_cells_and_seconds_and_measures_nothing(cli: Cli) -> None:
    code, out, _ = cli("calibrate", "--models", "tiny-opt-s", "--out", "p", "--device", "cpu", "--dry-run")
    assert code == 0
    assert "layers, decode" in out
    assert "not measured" in out
    assert not list(Path.cwd().iterdir())


def test_a_dry_run_for_gpus_that_are_not_here_estimates_each(cli: Cli) -> None:
    asked = ("--dry-run", "--dry-device", "A100-80GB,H200-141GB", "--hardware", "full")
    code, out, _ = cli("calibrate", "--models", "tiny-opt-s", "--out", "p", *asked)
    assert code == 0
    assert "A100-80GB" in out
    assert "H200-141GB" in out
    assert "Budget 9.0 min" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--hardware", "some"), "full"),
        (("--dry-device", "A100-80GB"), "no effect without --dry-run"),
        (("--device-base", "A100-80GB"), "no effect without --device-out"),
        (("--dry-run", "--dry-device", "A200"), "A100"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(cli: Cli, options: tuple[str, ...], said: str) -> None:
    code, _, err = cli("calibrate", "--models", "tiny-opt-s", "--out", "p", "--device", "cpu", *options)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--models", ""), "names no model"),
        (("--models", "tiny-opt-s,tiny-opt-s"), "named twice"),
        (("--prompts-file", "nope.jsonl"), "is no file"),
        (("--device", "tpu"), "--device"),
        (("--device", "cpu:x"), "--device"),
        (("--device", "cuda:99"), "--device"),
    ],
)
def test_a_dry_run_refuses_what_the_calibration_would(cli: Cli, options: tuple[str, ...], said: str) -> None:
    code, _, err = cli("calibrate", "--out", "p", "--dry-run", *options)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_auto_is_quick_on_a_cpu_and_full_within_a_budget_on_a_gpu() -> None:
    assert (mode_of("auto", "cpu"), mode_of("auto", "cuda:1"), mode_of("off", "cuda")) == ("quick", "full", "off")
    assert budget_of(None, "cpu", 2) is None
    assert budget_of(None, "cuda", 2) == 2 * GPU_BUDGET_S
    assert budget_of(30.0, "cuda", 2) == 30.0
    with pytest.raises(InputError, match="more than 0"):
        budget_of(-1.0, "cpu", 1)
    with pytest.raises(UnknownNameError):
        mode_of("fast", "cpu")


def test_every_situation_has_its_first_visit() -> None:
    spec = inspect_checkpoint(checkpoint_path("tiny-opt-s"), "float32").spec
    todo = todo_of(request(rounds=3), {spec.name: spec}, 128)
    first = {(p.mode.name, p.rows, p.token_budget == max(256, 32)) for _, p, visit in todo if visit == 0}
    assert {(p.mode.name, p.rows) for _, p, _ in todo} == {(mode, rows) for mode, rows, _ in first}
    one_row = [visit for _, p, visit in todo if p.rows == 1 and p.mode.name == "vanilla"]
    assert one_row == list(range(12))  # four visits a round


def test_a_plan_without_cells_is_steps_alone() -> None:
    plan = plan_of(request(hardware="off"), None)
    assert plan.lines == []
    assert plan.total_s == plan.steps_s > 0
    full = plan_of(request(hardware="full", device_out=Path("d.json")), None)
    assert {line.group for line in full.lines} >= {"kernels", "energy windows", "links and loads"}
