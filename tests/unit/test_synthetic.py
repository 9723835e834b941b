"""Exit models from published figures: marginals, joint, thresholds, texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from pydantic import ValidationError

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import validate
from heliosim.synthetic.draw import COARSE, FINE, behaviour_for, ease_along, quantised
from heliosim.synthetic.family import family_of
from heliosim.synthetic.joint import conditional
from heliosim.synthetic.solve import Solved, solve
from heliosim.synthetic.spec import ExitSpec, load_spec, shipped_specs
from heliosim.synthetic.states import implied_states
from heliosim.synthetic.table import BehaviourTable, load_table
from heliosim.types import ExitRule, Placement

OPT = {"opt-1.3b": (6, 12, 24), "opt-6.7b": (9, 17, 32)}


def raw(name: str = "opt-pair") -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(shipped_specs()[name].read_text(encoding="utf-8"))
    return value


def spec(name: str = "opt-pair", **changes: Any) -> ExitSpec:
    return ExitSpec.model_validate(raw(name) | changes)


def tokens(**changes: float) -> dict[str, Any]:
    """The spec's field ``tokens`` with other values."""
    return raw()["tokens"] | {k: {"value": v, "source": "a test"} for k, v in changes.items()}


def column(table: BehaviourTable, name: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = table.table[name].to_numpy()
    return values


@pytest.fixture(scope="module")
def solved() -> Solved:
    return solve(spec())


@pytest.fixture(scope="module")
def drawn() -> BehaviourTable:
    return behaviour_for(OPT, spec(), 0)


# --- family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.5, 0.9, 0.97, 1.0])
def test_shares_at_the_threshold_are_those_given(correlation: float) -> None:
    family = family_of((2, 4, 8), (0.5, 0.2, 0.3), 0.7, 3.0, confident_of_rest=0.4, depth_correlation=correlation)
    assert family.left(0.7) == pytest.approx([0.5, 0.2, 0.3], abs=1e-6)


@pytest.mark.parametrize(("correlation", "floor"), [(0.6, 0.0), (0.9, 0.05), (0.97, 0.0)])
def test_shares_and_perplexity_are_those_of_a_simulation(correlation: float, floor: float) -> None:
    """Quadrature against drawing tokens, at another threshold than the shares were given for."""
    family = family_of(
        (2, 4, 8), (0.5, 0.2, 0.3), 0.7, 3.0, confident_of_rest=0.4, shifts=(-0.5, 0.5), weights=(1, 3),
        depth_correlation=correlation, floor=floor,
    )  # fmt: skip
    rng, n = np.random.default_rng(1), 400_000
    shift = np.where(rng.random(n) < 0.75, 0.5, -0.5)
    ease = rng.standard_normal(n)
    latent = [np.sqrt(correlation) * ease + np.sqrt(1 - correlation) * rng.standard_normal(n) + shift for _ in range(3)]
    scores = np.stack([family.score(k, z) for k, z in enumerate(latent)])
    enough = scores >= 0.85
    enough[-1] = True
    first = enough.argmax(axis=0)
    shares = [float((first == k).mean()) for k in range(3)]
    assert family.left(0.85) == pytest.approx(shares, abs=0.004)
    left_with = scores[first, np.arange(n)]
    assert family.perplexity(0.85) == pytest.approx(float(np.exp(-np.log(left_with).mean())), rel=0.01)
    assert family.perplexity(None) == pytest.approx(float(np.exp(-np.log(scores[-1]).mean())), rel=0.01)


def test_a_higher_threshold_keeps_tokens_longer(solved: Solved) -> None:
    for family in solved.families.values():
        by = np.array([np.cumsum(family.left(t)) for t in np.linspace(0.1, 0.99, 40)])
        assert (np.diff(by[:, :-1], axis=0) < 0).all()
        assert family.left(1.0)[-1] == pytest.approx(1.0)


def test_no_score_is_above_the_cap() -> None:
    family = family_of((1, 2), (0.6, 0.4), 0.5, 2.0, confident_of_rest=0.5, depth_correlation=0.8, cap=0.9)
    assert family.left(0.89)[0] > 0
    assert family.left(0.9).tolist() == [0.0, 1.0]
    assert family.left(0.95).tolist() == [0.0, 1.0]


# --- joint ------------------------------------------------------------------------------------------------------


def test_the_published_conditional_is_met_and_needs_models_that_are_alike(solved: Solved) -> None:
    assert solved.conditional("opt-1.3b", 6, "opt-6.7b", 9) == pytest.approx(0.57, abs=1e-6)
    assert 0.2 < solved.correlation_of("opt-1.3b", "opt-6.7b") < 0.7
    one, other = solved.families["opt-1.3b"], solved.families["opt-6.7b"]
    at = [conditional(one, other, 0.8, (6, 9), rho) for rho in (-0.5, 0.0, 0.3, 0.6, 0.9)]
    assert at == sorted(at, reverse=True)


def test_without_tasks_and_correlation_models_are_independent() -> None:
    flat = {name: task | {"ease": 0.0} for name, task in raw()["tasks"].items()}
    pair = {"models": ["opt-1.3b", "opt-6.7b"], "correlation": {"value": 0.0, "source": "a test"}}
    found = solve(spec(tasks=flat, pairs=[pair]))
    assert found.conditional("opt-1.3b", 6, "opt-6.7b", 9) == pytest.approx(0.736, abs=1e-5)


def test_a_conditional_out_of_reach_is_refused() -> None:
    pairs = raw()["pairs"]
    pairs[0]["share"]["value"] = 0.99
    pairs[0]["given"]["beyond"], pairs[0]["then"]["by"] = 12, 9
    flat = spec(pairs=pairs, tokens=tokens(depth_correlation=0.3))
    with pytest.raises(InputError, match=r"pairs\.0\.share: out of reach"):
        solve(flat)


@pytest.mark.parametrize("ease", [1e9, float("nan"), {"opt-1.3b": -6.0}])
def test_an_ease_out_of_reach_is_refused(ease: object) -> None:
    content = load_spec("opt-pair").model_dump(mode="json")
    content["tasks"]["gsm8k"]["ease"] = ease
    with pytest.raises(ValidationError, match=r"tasks\.gsm8k\.ease"):
        ExitSpec.model_validate(content)


def test_correlations_that_cannot_all_hold_are_refused() -> None:
    pairs = raw("llama-three")["pairs"]
    for pair, value in zip(pairs, (0.9, 0.9, -0.9), strict=True):
        pair["correlation"]["value"] = value
    with pytest.raises(InputError, match="cannot all hold at once"):
        solve(spec("llama-three", pairs=pairs))


# --- texts ------------------------------------------------------------------------------------------------------


def test_drawn_shares_are_the_published_ones_within_sampling_error() -> None:
    """Mean over seeds, at most 4 standard errors of that mean off."""
    by_model: dict[str, list[list[float]]] = {name: [] for name in OPT}
    conditional_shares = []
    for seed in range(12):
        table = behaviour_for(OPT, spec(texts_per_task=24), seed)
        first = {}
        for name, exits in OPT.items():
            enough = np.stack(
                [column(table, f"confidence:{name}@{e}") >= 0.8 for e in exits[:-1]]
                + [np.ones(table.table.num_rows, bool)]
            )
            first[name] = enough.argmax(axis=0)
            by_model[name].append([float((first[name] == k).mean()) for k in range(len(exits))])
        stayed = first["opt-1.3b"] > 0
        conditional_shares.append(float((first["opt-6.7b"][stayed] == 0).mean()))
    for name, wanted in (("opt-1.3b", [0.730, 0.047, 0.223]), ("opt-6.7b", [0.736, 0.048, 0.216])):
        values = np.array(by_model[name])
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        assert (error < 0.004).all()
        assert (np.abs(values.mean(axis=0) - wanted) < 4 * error).all()
    error = np.std(conditional_shares, ddof=1) / np.sqrt(12)
    assert error < 0.006
    assert abs(np.mean(conditional_shares) - 0.57) < 4 * error


def test_perplexity_is_the_published_one(drawn: BehaviourTable, tmp_path: Path) -> None:
    drawn.save(tmp_path / "b")
    _, behaviour = load_table(tmp_path / "b")
    assert behaviour.perplexity("opt-1.3b", 24, "opt-1.3b:threshold", 0.8) == pytest.approx(1.47, rel=0.03)
    assert behaviour.perplexity("opt-6.7b", 32, "opt-6.7b:threshold", 0.8) == pytest.approx(1.49, rel=0.03)


def test_every_source_meets_the_same_text(drawn: BehaviourTable, tmp_path: Path) -> None:
    drawn.save(tmp_path / "b")
    _, behaviour = load_table(tmp_path / "b")
    texts = [
        behaviour.text("gsm8k-0003", source)
        for source in ("opt-1.3b:full", "opt-1.3b:threshold", "opt-6.7b:greedy@9", "opt-6.7b:threshold")
    ]
    assert all(text is texts[0] for text in texts)
    shallow = behaviour.walk(texts[0], Placement("opt-6.7b", 9), ExitRule("greedy", 0.8))
    full = behaviour.walk(texts[0], Placement("opt-6.7b", 32), ExitRule("threshold", 0.8))
    left = full.exit_layers == 9
    assert left.any()
    assert not left.all()
    assert (shallow.confidences[left] == full.confidences[left]).all()
    assert ((shallow.confidences >= 0.8) == left).all()
    assert behaviour.exit_shares("opt-6.7b", "opt-6.7b:threshold", 0.8)[9] == pytest.approx(0.736, abs=0.02)


def test_same_seed_same_bytes_another_seed_another_text(tmp_path: Path) -> None:
    small = spec(texts_per_task=2)
    made = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        behaviour_for(OPT, small, seed).save(tmp_path / folder)
        made.append((tmp_path / folder / "behaviour.parquet").read_bytes())
    assert made[0] == made[1] != made[2]


def test_leaving_out_a_model_an_exit_or_a_task_moves_nothing_else(drawn: BehaviourTable) -> None:
    alone = behaviour_for({"opt-6.7b": (9, 32)}, spec(), 0)
    assert [c for c in alone.table.column_names if c.startswith("confidence:")] == [
        "confidence:opt-6.7b@9", "confidence:opt-6.7b@32",
    ]  # fmt: skip
    for name in ("confidence:opt-6.7b@9", "agrees:opt-6.7b@9", "confidence:opt-6.7b@32"):
        assert (column(alone, name) == column(drawn, name)).all()


def test_the_order_of_a_spec_does_not_matter() -> None:
    value = raw()
    turned = value | {k: dict(reversed(value[k].items())) for k in ("models", "tasks")}
    one, other = (behaviour_for(OPT, ExitSpec.model_validate(v | {"texts_per_task": 2}), 0) for v in (value, turned))
    assert one.table.equals(other.table)


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.7])
@pytest.mark.parametrize("effect", [0.0, 0.3])
def test_autocorrelation_and_request_effect_are_realised(phi: float, effect: float) -> None:
    found = solve(spec(tokens=tokens(autocorrelation=phi, request_effect=effect)))
    eases = [ease_along(found, "gsm8k", k, 200, 0) for k in range(400)]
    one, other = (np.stack([e[name] for e in eases]) for name in found.families)
    assert one.var() == pytest.approx(1.0, abs=0.08)
    lag = [float((one[:, :-k] * one[:, k:]).mean()) for k in (1, 2, 50)]
    assert lag == pytest.approx([effect + (1 - effect) * phi**k for k in (1, 2, 50)], abs=0.06)
    rho = found.correlation_of("opt-1.3b", "opt-6.7b")
    assert float((one * other).mean()) == pytest.approx(rho, abs=0.06)
    assert float((one.mean(axis=1)).var()) >= 0.7 * effect


def test_agreement_is_high_whatever_the_confidence(drawn: BehaviourTable) -> None:
    confidence, agrees = column(drawn, "confidence:opt-6.7b@9"), column(drawn, "agrees:opt-6.7b@9")
    for low, high in ((0.0, 0.2), (0.4, 0.6), (0.9, 1.0)):
        chosen = (confidence >= low) & (confidence < high)
        middle = float(confidence[chosen].mean())
        assert chosen.sum() > 300
        assert float(agrees[chosen].mean()) == pytest.approx(0.85 + 0.14 * middle, abs=0.035)
    assert column(drawn, "agrees:opt-6.7b@32").all()


def test_agreement_may_fall_with_depth() -> None:
    value = raw()
    value["models"]["opt-6.7b"]["agreement"] |= {"low": {9: 0.9, 17: 0.6}, "high": {9: 0.9, 17: 0.6}}
    table = behaviour_for(OPT, ExitSpec.model_validate(value), 0)
    shares = [float(column(table, f"agrees:opt-6.7b@{e}").mean()) for e in (9, 17)]
    assert shares == pytest.approx([0.9, 0.6], abs=0.01)


def test_quantised_confidences_stay_on_their_side_of_a_threshold() -> None:
    confidence = np.random.default_rng(0).random(100_000) ** 0.2
    kept = quantised(confidence).astype(np.float32)
    for threshold in (*np.arange(1, 100) / COARSE, 0.995, 0.905, 0.999):
        assert ((kept >= threshold) == (confidence >= threshold)).all(), threshold
    assert np.abs(kept - confidence).max() <= 0.5 / COARSE + 1e-6
    assert np.abs(kept - confidence)[confidence > 0.9].max() <= 0.5 / FINE + 1e-6


@pytest.mark.parametrize("name", sorted(shipped_specs()))
def test_shipped_specs_give_small_tables_of_all_their_models(name: str, tmp_path: Path) -> None:
    loaded = load_spec(name)
    found = solve(loaded)
    models = {model: family.exits for model, family in found.families.items()}
    for model, family in found.families.items():
        assert family.left(found.threshold) == pytest.approx(loaded.models[model].shares, abs=1e-6)
    behaviour_for(models, loaded, 0).save(tmp_path / "b")
    assert (tmp_path / "b" / "behaviour.parquet").stat().st_size < 700_000
    said, behaviour = load_table(tmp_path / "b")
    assert said.origin == "synthetic"
    assert sum(t.tokens for t in behaviour.texts.values()) == said.facts.rows
    assert set(behaviour.sequences) == set(loaded.tasks)
    assert said.spec == loaded


def test_the_large_pair_reaches_its_coverage_at_the_depth_helios_loads() -> None:
    shares = load_spec("codellama-llama2").models["codellama-34b"].left.by_exit
    assert sum(s for e, s in shares.items() if e <= 28) < 0.70 <= sum(s for e, s in shares.items() if e <= 32)


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_model_or_exit_without_figures_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'opt-1.3b'"):
        behaviour_for({"opt-1.3": (6, 24)}, spec(), 0)
    with pytest.raises(InputError, match="nothing is said of this exit"):
        behaviour_for({"opt-1.3b": (6, 13, 24)}, spec(), 0)
    with pytest.raises(InputError, match="ascend to the last layer"):
        behaviour_for({"opt-1.3b": (6, 12)}, spec(), 0)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("models", "opt-1.3b", "left", "by_exit"), {6: 0.7, 12: 0.1, 24: 0.1}, "add up to 0.9"),
        (("models", "opt-1.3b", "left", "by_exit"), {6: 0.7, 12: 0.3}, "must end with the last of 24 layers"),
        (("models", "opt-1.3b", "sigma"), {"value": 3, "source": "a test"}, "sigma or perplexity"),
        (("pairs",), [], "pairs say nothing of opt-1.3b and opt-6.7b"),
        (("tasks", "gsm8k", "colour"), 1, "unknown field"),
        (("threshold", "source"), "", "at least 3 characters"),
        (("tokens", "autocorrelation", "value"), 1.5, "autocorrelation must lie"),
    ],
)
def test_specs_that_make_no_sense_are_refused(path: tuple[str, ...], value: Any, problem: str) -> None:
    whole = raw()
    inner = whole
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(InputError, match=problem) as error:
        validate(ExitSpec, whole, "spec.yaml")
    assert "\n" not in str(error.value)


def test_a_perplexity_out_of_reach_is_refused() -> None:
    value = raw()
    value["models"]["opt-1.3b"]["perplexity"]["value"] = 40
    with pytest.raises(InputError, match=r"models\.opt-1\.3b\.perplexity: these shares allow 1\."):
        solve(ExitSpec.model_validate(value))


# --- states -----------------------------------------------------------------------------------------------------


def test_states_are_found_again() -> None:
    alone = {"a": {1: 0.6, 2: 0.1, 3: 0.3}, "b": {2: 0.8, 4: 0.2}}
    full, partial = {"a": 0.3, "b": 0.1}, {"a": 0.4, "b": 0.2}
    served = {m: {e: full[m] * x + (partial[m] if e == min(s) else 0) for e, x in s.items()} for m, s in alone.items()}
    found = implied_states(alone, served)
    assert found.full == pytest.approx(full)
    assert found.partial == pytest.approx(partial)
    assert found.total == pytest.approx(1.0)
    assert all(x == pytest.approx(0.0, abs=1e-12) for later in found.by_exit.values() for x in later.values())


def test_states_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="negative share"):
        implied_states({"a": {1: 0.9, 2: 0.1}}, {"a": {1: 0.1, 2: 0.9}})
