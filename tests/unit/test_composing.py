"""Composed profiles: what they hold, say and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heliosim.cli import app
from heliosim.composing import Wanted, compose_profile
from heliosim.errors import InputError, OutOfRangeError
from heliosim.formats.profile import Profile
from heliosim.hardware.architecture import open_architecture, read_architecture, shipped_architectures
from heliosim.hardware.compose import compose_model
from heliosim.hardware.device import open_device
from heliosim.profile_diff import decode_shape, mixed_shape
from heliosim.profile_view import check_profile, open_profile
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    out = tmp_path_factory.mktemp("composed") / "pair"
    wanted = [Wanted(n, open_architecture(n), 1, e) for n, e in (("opt-1.3b", (6, 12)), ("opt-6.7b", (9, 17)))]
    device = open_device("A100-80GB")
    return compose_profile(out, wanted, device, dtype="fp32", host="graph", behaviour="synthetic")


def test_it_says_what_it_is(pair: Profile) -> None:
    facts = pair.facts
    assert pair.origin == "composed, not measured"
    assert facts.composition is not None
    assert (facts.composition.device, facts.composition.dtype, facts.composition.host) == (
        "A100-80GB",
        "float32",
        "graph",
    )
    assert facts.composition.tensor_parallel == {"opt-1.3b": 1, "opt-6.7b": 1}
    assert facts.derivation is not None
    assert any("synthetic" in line for line in facts.derivation.synthetic)
    assert all(source.licence for source in facts.derivation.sources)
    assert check_profile(pair) == 0


def test_its_costs_are_those_composed(pair: Profile) -> None:
    """A step priced from the profile takes what the composition says, decode alone and beside a prompt."""
    made = compose_model(open_architecture("opt-1.3b"), open_device("A100-80GB"), dtype="fp32", exits=(6, 12))
    cost = pair.step_cost("opt-1.3b", "wall")
    for rows, context in ((1, 128), (32, 512), (100, 2000)):
        expected = made.step_seconds(decode_rows=rows, context=context)
        assert cost.seconds(decode_shape(24, rows, context)) == pytest.approx(expected)
    expected = made.step_seconds(decode_rows=16, context=256, prompts=[(256, 256)])
    assert cost.seconds(mixed_shape(24, 256, 16)) == pytest.approx(expected)


def test_helios_serves_it_and_the_run_says_so(pair: Profile) -> None:
    values = {
        "name": "t",
        "profile": str(pair.folder),
        "models": ["opt-1.3b", "opt-6.7b"],
        "workload": {
            "requests": 12,
            "arrivals": {"kind": "constant", "rate_per_s": 5.0},
            "tasks": [{"task": "gsm8k", "prompt_tokens": 60, "output_tokens": 12}],
        },
        "memory": {"budget_bytes": "60 GB"},
        "batcher": {"max_batch": 4, "token_budget": 128},
        "controller": {"kind": "helios"},
        "clock": "wall",
    }
    run = run_simulated(Scenario.model_validate(values))
    assert run.info.profile_kind == "composed"
    assert set(run.steps["model"].to_pylist()) == {"opt-1.3b", "opt-6.7b"}


def test_sizes_are_those_of_one_rank(tmp_path: Path) -> None:
    wanted = [Wanted("llama2-70b", open_architecture("llama2-70b"), 4, ())]
    profile = compose_profile(tmp_path / "p", wanted, open_device("A100-40GB"), dtype="fp16", host="graph")
    spec, whole = profile.spec("llama2-70b"), open_architecture("llama2-70b").weights_bytes("fp16")
    assert profile.model("llama2-70b").tensor_parallel == 4
    assert whole / 4 <= spec.weights_bytes(80) < 1.001 * whole / 4
    assert not profile.has_behaviour


def test_outside_the_curves_it_refuses_or_says_so(tmp_path: Path) -> None:
    config = json.loads(shipped_architectures()["llama2-7b"].read_text(encoding="utf-8"))
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(config | {"intermediate_size": 98304}), encoding="utf-8")
    wanted = [Wanted("wide", read_architecture(path), 1, ())]
    device = open_device("H200-141GB")
    with pytest.raises(OutOfRangeError, match="wide, .*98304"):
        compose_profile(tmp_path / "p", wanted, device, dtype="bf16", host="graph")
    arguments = ["profile", "compose", "--model", str(path), "--device", "H200-141GB", "-o", str(tmp_path / "p")]
    done = CliRunner().invoke(app, [*arguments, "--allow-extrapolation"])
    assert done.exit_code == 0, done.output
    assert "EXTRAPOLATED" in done.output
    found = open_profile(str(tmp_path / "p")).facts.composition
    assert found is not None
    assert any("98304" in line for line in found.extrapolated)
    assert set(found.files) == {"wide.json", "H200-141GB"}


def test_exits_that_no_spec_knows(tmp_path: Path) -> None:
    wanted = [Wanted("opt-1.3b", open_architecture("opt-1.3b"), 1, (5,))]
    with pytest.raises(InputError, match=r"no shipped exit spec knows opt-1\.3b at 5, 24"):
        compose_profile(
            tmp_path / "p", wanted, open_device("A100-80GB"), dtype="fp16", host="graph", behaviour="synthetic"
        )
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tp", "1,2,4"], "3 given for 2 models"),
        (["--tp", "x"], "must be whole numbers"),
        (["--exits", "6", "--exits", "6", "--exits", "6"], "3 given for 2 models"),
        (["--exits", "99"], "has 24 layers"),
        (["--dtype", "int8"], "unknown name"),
        (["--host", "none"], "unknown name"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: list[str], said: str) -> None:
    models = ["--model", "opt-1.3b", "--model", "opt-6.7b"]
    arguments = ["profile", "compose", *models, "--device", "A100-80GB", "-o", str(tmp_path / "p"), *options]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
