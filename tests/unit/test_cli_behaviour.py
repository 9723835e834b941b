"""``heliosim behaviour``: what it writes, prints and refuses; and a run over what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heliosim.formats.profile import Profile
from heliosim.profile_view import open_profile
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.synthetic.draw import behaviour_for
from heliosim.synthetic.spec import ExitSpec, load_spec, shipped_specs
from heliosim.synthetic.table import load_table
from tests.unit.conftest import Cli


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def widest(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


def test_synthesize_writes_a_table_and_says_it_is_synthetic(cli: Cli) -> None:
    code, out, _ = cli("behaviour", "synthesize", "opt-pair", "-o", "b", "--models", "opt-6.7b", "--seed", 3)
    assert code == 0
    said, behaviour = load_table(Path("b"))
    assert (said.seed, list(behaviour.exits)) == (3, ["opt-6.7b"])
    assert out.count("ynthetic") >= 3
    assert "Synthetic behaviour written to b" in out
    assert widest(out) <= 80
    assert cli("behaviour", "show", "b")[1].splitlines()[0].startswith("b · synthetic")


@pytest.mark.parametrize("name", sorted(shipped_specs()))
def test_show_prints_every_figure_with_its_source_in_80_columns(cli: Cli, name: str) -> None:
    code, out, _ = cli("behaviour", "show", name)
    assert code == 0
    assert "synthetic: drawn from published and assumed figures" in out
    assert widest(out) <= 80
    joined = " ".join(out.split())
    for model in load_spec(name).models.values():
        assert model.left.source in joined
    assert "depth_correlation 0.9" in joined


def test_show_gives_the_solved_joint(cli: Cli) -> None:
    _, out, _ = cli("behaviour", "show", "opt-pair")
    line = next(x for x in out.splitlines() if "beyond opt-1.3b@6" in x)
    assert "57.0%" in line
    assert "73.6%" in line
    assert "solved" in line


def test_import_replays_and_says_what_is_not_recorded(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    name = "eval_rl_model_opt27b_thresh_0.9_0.2ctx_1000_samples_15_maxnew_java_exit_layers.json"
    (data / name).write_text(json.dumps([3, 32, 9] * 10), encoding="utf-8")
    code, out, _ = cli("behaviour", "import", "green-code", data, "-o", "b")
    assert code == 0
    assert "imported exits" in out
    assert "confidence is not recorded" in " ".join(out.split())
    assert widest(out) <= 80
    assert load_table(Path("b"))[0].facts.rows == 30


def test_import_of_the_sweep_writes_a_spec_that_synthesizes(cli: Cli, tmp_path: Path) -> None:
    rows = [(0.95, 0.81, 10.0, 5.5), (0.93, 0.7, 9.0, 5.4), (0.9, 0.6, 8.0, 5.2)]
    head = "softmax_threshold_first_exit,softmax_threshold_last_exit,ppl_mean,ppl_std,exit_point_mean,exit_point_std"
    lines = [f"{a},{b},5,2,{m},{s}" for a, b, m, s in rows]
    (tmp_path / "sweep.csv").write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    code, out, _ = cli("behaviour", "import", "ee-llama", "sweep.csv", "-o", "spec.yaml")
    assert code == 0
    assert "synthetic" in out
    assert len(load_spec("spec.yaml").models["llama-3.2-1b"].exits) == 16
    assert cli("behaviour", "synthesize", "spec.yaml", "-o", "b")[0] == 0
    code, _, err = cli("behaviour", "import", "ee-llama", "sweep.csv", "-o", "spec.yaml")
    assert (code, "already exists" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("synthesize", "opt-pear", "-o", "b"), "Did you mean 'opt-pair'"),
        (("synthesize", "nowhere.yaml", "-o", "b"), "no such file"),
        (("synthesize", "opt-pair", "-o", "b", "--models", "opt-13b"), "unknown name"),
        (("import", "greencode", ".", "-o", "b"), "Did you mean 'green-code'"),
        (("import", "green-code", ".", "-o", "b"), "holds no"),
        (("import", "ee-llama", "x.csv", "-o", "b"), "no such file"),
        (("import", "ee-llama", "x.csv", "-o", "b", "--model", "llama"), "--model: has no effect on ee-llama"),
        (("import", "ee-llama", "x.csv", "-o", "b", "--seed", "0"), "--seed: has no effect on ee-llama"),
        (("show", "."), "no behaviour table here"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, arguments: tuple[str, ...], problem: str) -> None:
    code, _, err = cli("behaviour", *arguments)
    assert code == 2
    assert problem in err
    assert len(err.strip().splitlines()) == 1


def test_a_changed_table_is_refused(cli: Cli) -> None:
    cli("behaviour", "synthesize", "opt-pair", "-o", "b")
    with (Path("b") / "behaviour.parquet").open("ab") as file:
        file.write(b"x")
    code, _, err = cli("behaviour", "show", "b")
    assert (code, "was changed" in err) == (2, True)


# --- a run over synthetic exits -----------------------------------------------------------------------------------


def profile_with(spec: ExitSpec, tmp_path: Path) -> Profile:
    """The shipped derived profile of Llama-2-7B with exits of a spec instead of its own."""
    profile = open_profile("llama2-a100-80gb")
    behaviour_for({"llama2-7b": (8, 16, 24, 32)}, spec, 0).save(tmp_path / "b")
    vars(profile)["behaviour"] = load_table(tmp_path / "b")[1]
    return profile


@pytest.mark.parametrize("controller", [{"kind": "early-exit", "model": "llama2-7b"}, {"kind": "helios"}])
def test_runs_over_synthetic_exits_do_not_depend_on_strides(tmp_path: Path, controller: dict[str, object]) -> None:
    profile = profile_with(load_spec("llama-three"), tmp_path)
    scenario = Scenario.model_validate(
        {
            "name": "synthetic",
            "profile": "llama2-a100-80gb",
            "models": ["llama2-7b"],
            "workload": {
                "requests": 120,
                "order": "mix",
                "arrivals": {"kind": "poisson", "rate_per_s": 3},
                "tasks": [
                    {"task": t, "prompt_tokens": 100, "output_tokens": 60}
                    for t in ("cnn-dailymail", "gsm8k", "codexglue", "hellaswag", "sharegpt")
                ],
            },
            "memory": {"budget_bytes": "72 GB"},
            "controller": controller,
            "clock": "wall",
        }
    )
    run, single = run_simulated(scenario, profile), run_simulated(scenario, profile, max_stride=1)
    assert run.requests.equals(single.requests)
    assert run.steps.equals(single.steps)


def test_stats_prints_the_chosen_tables(cli: Cli) -> None:
    code, out, _ = cli("behaviour", "stats", "tiny-opt-cpu", "--models", "tiny-opt-s", "--tables", "depth,quality")
    assert code == 0
    assert out.splitlines()[0] == "tiny-opt-cpu · measured · threshold 0.8"
    assert "By depth" in out
    assert "greedy@2" in out
    assert "Runs of tokens" not in out
    assert "tiny-opt-l" not in out
    assert widest(out) <= 80


def test_stats_of_what_was_drawn_say_so(cli: Cli) -> None:
    cli("behaviour", "synthesize", "opt-pair", "-o", "b", "--models", "opt-1.3b")
    for what, word in (("b", "synthetic"), ("llama2-h100-80gb", "derived, not measured")):
        code, out, _ = cli("behaviour", "stats", what, "--tables", "depth")
        assert code == 0, what
        assert word in out.splitlines()[0]
        assert "ynthetic" in out


def test_fits_name_what_suffices(cli: Cli) -> None:
    code, out, _ = cli(
        "behaviour", "stats", "tiny-opt-cpu", "--task", "qa", "--models", "tiny-opt-s", "--tables", "fits"
    )
    assert code == 0
    assert "the simplest fitted model that meets every statistic: all tasks" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tables", "depth,widths"), "--tables: unknown name"),
        (("--models", "tiny"), "model: unknown name"),
        (("--task", "chess"), "task: unknown name"),
        (("--source", "tiny-opt-s:half"), "behaviour source: unknown name"),
    ],
)
def test_stats_refuse_unknown_names(cli: Cli, arguments: tuple[str, str], said: str) -> None:
    code, _, err = cli("behaviour", "stats", "tiny-opt-cpu", *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_report_is_one_file_and_replaces_nothing(cli: Cli) -> None:
    code, _, _ = cli("behaviour", "report", "tiny-opt-cpu", "-o", "b.html", "--task", "chat")
    assert code == 0
    page = Path("b.html").read_text(encoding="utf-8")
    for word in ("Where tokens leave", "Reliability of confidence", "Two models on the same text", "Fitted models"):
        assert word in page
    assert "http://" not in page.split("</script>")[-1]
    assert "already exists" in cli("behaviour", "report", "tiny-opt-cpu", "-o", "b.html")[2]


def test_measure_refuses_options_without_effect(cli: Cli) -> None:
    Path("p.txt").write_text("a prompt\n")
    for option, value in (("--tasks", "qa"), ("--prompts", "3")):
        code, _, err = cli("behaviour", "measure", "-o", "b", "--prompts-file", "p.txt", option, value)
        assert code == 2
        assert f"{option}: has no effect with --prompts-file" in err
    assert "--tasks: unknown name" in cli("behaviour", "measure", "-o", "b", "--tasks", "chess")[2]
    assert "--dtype: unknown name" in cli("behaviour", "measure", "-o", "b", "--dtype", "int8")[2]


def test_compose_takes_a_measured_or_drawn_table(cli: Cli) -> None:
    cli("behaviour", "synthesize", "opt-pair", "-o", "b", "--models", "opt-1.3b")
    asked = ("--model", "opt-1.3b", "--device", "A100-80GB", "--exits", "6,12,24", "--behaviour", "b", "-o", "p")
    code, _, err = cli("profile", "compose", *asked)
    assert code == 0, err
    made = open_profile("p")
    assert made.behaviour.sources == {"any"}
    assert any("exits are those of the table b (synthetic)" in line for line in made.facts.derivation.synthetic)  # type: ignore[union-attr]


def test_show_of_a_profile_and_a_report_of_what_was_drawn(cli: Cli) -> None:
    code, out, _ = cli("behaviour", "show", "llama2-h100-80gb")
    assert code == 0
    assert out.splitlines()[0].startswith("llama2-h100-80gb · derived, not measured")
    cli("behaviour", "synthesize", "opt-pair", "-o", "b", "--models", "opt-1.3b")
    assert cli("behaviour", "report", "b", "-o", "b.html")[0] == 0
    page = Path("b.html").read_text(encoding="utf-8")
    assert "synthetic: drawn from published and assumed figures" in page
    assert "Two models" not in page.split("</script>")[-1], "there is one"


def test_tables_of_two_models_and_of_confidence(cli: Cli) -> None:
    code, out, _ = cli("behaviour", "stats", "tiny-opt-cpu", "--tables", "confidence,joint,complement")
    assert code == 0
    joined = " ".join(out.split())
    for word in ("0.9 to 1.0", "tiny-opt-l@4", "tiny-opt-s@6", "helped anyway", "depth correlation"):
        assert word in joined
