"""Exit batching and skipped KV: verdicts, the segments of a step, and their price, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from heliosim.costs import TERMS, ExitCosts, StepCost, StepShape
from heliosim.engines.joint import JointBlock, leave_together
from heliosim.errors import InputError, UnknownNameError
from heliosim.exits.batching import AtExit, Segment, exit_batcher, segments
from heliosim.exits.pricing import (
    Counts,
    Row,
    StepParts,
    break_even,
    is_plain,
    needs_single_steps,
    parts_from_counts,
    parts_of,
)
from heliosim.exits.skipped import skipped_kv
from heliosim.formats.profile import Profile
from heliosim.metrics import summarise
from heliosim.registry import EXIT_BATCHING, SKIPPED_KV
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.serving.kinds import EarlyExit
from heliosim.types import ExitRule
from tests.profiles import scenario, write_synthetic_profile

ENDS = (4, 8, 12)
PER_LAYER_ROW = 1e-5
SECONDS = {"step": 1e-3, "layer": 1e-4, "layer_token": PER_LAYER_ROW, "fill_layer": 2e-5, "fill_layer_token": 1e-6}
COST = StepCost(tuple(SECONDS.get(t, 0.0) for t in TERMS), 64, 256, 256)


def rule(batching: str, method: str = "propagate", **more: Any) -> ExitRule:
    return ExitRule("threshold", 0.8, batching, method, **more)


@pytest.mark.parametrize(
    ("chosen", "undecided", "verdict"),
    [
        (rule("full"), 0, "go-on"),
        (rule("wait-for-deepest"), 1, "go-on"),
        (rule("wait-for-deepest"), 0, "stop"),
        (rule("eager"), 4, "go-on"),
        (rule("eager"), 3, "stop"),
        (rule("eager", quorum=2), 3, "go-on"),
        (rule("eager", quorum=2), 2, "stop"),
        (rule("eager", quorum=9), 1, "go-on"),
        (rule("eager", quorum=9), 0, "stop"),
        (rule("rebatch"), 4, "go-on"),
        (rule("rebatch"), 3, "regroup"),
        (rule("rebatch", break_even=4.0), 3, "regroup"),
        (rule("rebatch", break_even=4.5), 3, "go-on"),
        (rule("rebatch", break_even=4.5), 2, "regroup"),
        (rule("rebatch", break_even=math.inf), 1, "go-on"),
        (rule("rebatch"), 0, "stop"),
    ],
)
def test_verdicts(chosen: ExitRule, undecided: int, verdict: str) -> None:
    assert exit_batcher(chosen.batching).verdict(AtExit(4, 4, undecided, 4), chosen) == verdict


@pytest.mark.parametrize(
    ("chosen", "undecided", "walked"),
    [
        (rule("full"), (0, 0), [Segment(1, 12, -1, 6)]),
        (rule("wait-for-deepest"), (5, 0), [Segment(1, 8, -1, 6)]),
        (rule("rebatch"), (5, 2), [Segment(1, 4, -1, 6), Segment(5, 8, 0, 5), Segment(9, 12, 1, 2)]),
        (rule("rebatch"), (6, 2), [Segment(1, 8, -1, 6), Segment(9, 12, 1, 2)]),
        (rule("rebatch"), (6, 0), [Segment(1, 8, -1, 6)]),
        (rule("rebatch", break_even=8.0), (5, 2), [Segment(1, 8, -1, 6), Segment(9, 12, 1, 2)]),
    ],
)
def test_segments(chosen: ExitRule, undecided: tuple[int, int], walked: list[Segment]) -> None:
    assert segments(chosen, ENDS, 6, undecided) == walked


def parts(chosen: ExitRule, exits: list[int], dones: list[list[int] | None] | None = None) -> tuple[StepParts, Any]:
    """Decode rows of 20, 21, ... tokens that leave at ``exits``."""
    rows = [Row(20 + k, 21 + k, None if dones is None else dones[k]) for k in range(len(exits))]
    checked = sum(sum(e >= end for e in exits) for end in ENDS)
    counts = Counts(len(rows), len(rows), sum(max(exits) >= end for end in ENDS), checked, 0, 0)
    return parts_of(chosen, ENDS, rows, exits, counts)


def test_a_step_costs_the_sum_of_its_segments() -> None:
    found, dones = parts(rule("rebatch"), [4, 12, 4, 8])
    assert [(s.layers, s.decode_rows) for s in (found.first, *found.deeper)] == [(4, 4), (4, 2), (4, 1)]
    assert found.fills == ((4, 2), (4, 3))
    assert found.layers_run == 12
    assert dones == [[21, 20, 20], [22, 22, 22], [23, 22, 22], [24, 24, 23]]
    layers = 12 * 1e-4 + (4 * 4 + 4 * 2 + 4 * 1) * PER_LAYER_ROW
    fills = 8 * 2e-5 + (4 * 2 + 4 * 3) * 1e-6
    regroup = 1e-3 + 1e-4  # a step's host work and one layer's launches
    assert found.seconds(COST, rule("rebatch")) == pytest.approx(1e-3 + layers + 2 * regroup + fills)
    measured = replace(COST, exits=ExitCosts(3e-4, 1e-6, 1e-7))
    assert found.seconds(measured, rule("rebatch")) == pytest.approx(1e-3 + layers + 2 * 3e-4 + fills)


def test_waiting_tokens_run_with_the_next_that_goes_deeper() -> None:
    chosen = rule("rebatch", "recompute")
    found, dones = parts(chosen, [4, 4], [[20, 17, 15], [21, 21, 21]])
    assert dones == [[21, 17, 15], [22, 21, 21]]
    assert not found.deeper
    found, dones = parts(chosen, [8, 4], [[20, 17, 15], [21, 21, 21]])
    assert dones == [[21, 21, 15], [22, 21, 21]]
    (deeper,) = found.deeper
    assert (deeper.layers, deeper.tokens, deeper.prefill_rows, deeper.prefill_products) == (4, 4, 1, 4 * 21)
    found, dones = parts(chosen, [12, 4], [[20, 17, 15], [21, 21, 21]])
    assert [s.tokens for s in found.deeper] == [4, 6]
    assert dones[0] == [21, 21, 21]
    assert skipped_kv("recompute").seconds(COST, 4, 3) == skipped_kv("none").seconds(COST, 4, 3) == 0.0


def test_counts_say_the_same_as_rows() -> None:
    for chosen in (rule("rebatch"), rule("rebatch", "copy", break_even=5.0), rule("wait-for-deepest", "none")):
        for exits in ([4, 12, 4, 8], [4, 4, 4, 4], [8, 8, 12, 12], [12, 4, 8, 8]):
            rows, _ = parts(chosen, exits)
            left = [sum(e >= end for e in exits) for end in ENDS]
            longest = [max((21 + k for k, e in enumerate(exits) if e >= end), default=0) for end in ENDS]
            blocks = [-(-n // 16) for n in longest]
            held = [sum(21 + k for k, e in enumerate(exits) if e >= end) for end in ENDS]
            counts = parts_from_counts(chosen, ENDS, left, blocks, held, 0)
            assert counts.seconds(COST, chosen) == rows.seconds(COST, chosen)
            assert counts.layers_run == rows.layers_run
            assert counts.fills == rows.fills


def test_copying_costs_what_was_measured_or_as_much_as_propagating() -> None:
    assert skipped_kv("copy").seconds(COST, 3, 5) == skipped_kv("propagate").seconds(COST, 3, 5) == 3 * (2e-5 + 5e-6)
    measured = replace(COST, exits=ExitCosts(0.0, 1e-6, 1e-7))
    assert skipped_kv("copy").seconds(measured, 3, 5) == pytest.approx(3 * (1e-6 + 5e-7))


def test_break_even_is_where_a_regrouping_pays() -> None:
    cost = replace(COST, exits=ExitCosts(3e-4, 0.0, 0.0))
    chosen = rule("rebatch")
    least = break_even(cost, chosen, 64)
    assert least == pytest.approx((3e-4 + 2e-5) / (PER_LAYER_ROW - 1e-6))
    flat = tuple(0.0 if t == "layer_token" else c for t, c in zip(TERMS, cost.coefficients, strict=True))
    assert break_even(replace(cost, coefficients=flat), chosen, 64) == math.inf


def test_rows_of_an_eager_batch_leave_together() -> None:
    sure, unsure = ([0.9, 0.95, 0.99], [True, True, True]), ([0.3, 0.85, 0.7], [False, True, True])

    def leave(quorum: int, *, may_stop: bool = True) -> JointBlock:
        return leave_together(rule("eager", quorum=quorum), ENDS, [1, 2], [unsure, sure], may_stop)

    block = leave(1)
    assert block.exit_layers.tolist() == [4, 4]
    assert block.confidences.tolist() == [0.3, 0.9]
    assert block.agrees().tolist() == [False, True]
    assert leave(2).exit_layers.tolist() == [8, 4]
    assert leave(1, may_stop=False).exit_layers.tolist() == [8, 4]


def test_which_rules_need_more_than_one_shape_or_single_steps() -> None:
    assert {b for b in EXIT_BATCHING.builtin if is_plain(rule(b))} == {"full", "wait-for-deepest"}
    assert {m for m in SKIPPED_KV.builtin if is_plain(rule("full", m))} == {"propagate"}
    assert {b for b in EXIT_BATCHING.builtin if needs_single_steps(rule(b))} == {"eager"}
    assert {m for m in SKIPPED_KV.builtin if needs_single_steps(rule("rebatch", m))} == {"recompute"}
    assert is_plain(ExitRule("greedy", 0.8, "eager", "recompute"))


# --- in a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


def early_exit(profile: Profile, **fields: Any) -> Scenario:
    return scenario(profile, controller={"kind": "early-exit", "model": "large", "threshold": 0.8} | fields)


def test_quality_is_unknown_without_texts_of_the_pair(profile: Profile) -> None:
    usual = run_simulated(early_exit(profile, batching="full"), profile)
    assert not usual.info.quality_unknown
    assert summarise(usual).agreement is not None
    other = run_simulated(early_exit(profile, batching="eager", skipped_kv="copy"), profile)
    assert other.info.quality_unknown == "eager+copy"
    assert summarise(other).agreement is None
    assert summarise(other).perplexity is None
    assert summarise(other).layers_per_token is not None


def test_eager_walks_fewer_layers_and_a_quorum_more(profile: Profile) -> None:
    def walked(**fields: Any) -> float:
        found = summarise(run_simulated(early_exit(profile, **fields), profile)).layers_per_token
        assert found is not None
        return found

    waiting = walked(batching="wait-for-deepest")
    assert walked(batching="eager") < walked(batching="eager", quorum=3) < waiting
    assert walked(batching="eager", quorum=99) == waiting


def test_methods_take_other_times_and_leave_tokens_alone(profile: Profile) -> None:
    """Except ``eager``: which row leaves where is a property of its text, not of the price."""
    controllers = [{"batching": "rebatch", "skipped_kv": m, "break_even": 0.0} for m in sorted(SKIPPED_KV.builtin)]
    runs = [run_simulated(early_exit(profile, **fields), profile) for fields in controllers]
    times = {sum(run.steps["seconds"].to_pylist()) for run in runs}
    assert len(times) > 2
    by_request = [
        sorted(zip(*(run.tokens[c].to_pylist() for c in ("request_id", "position", "exit_layer")), strict=True))
        for run in runs
    ]
    assert all(tokens == by_request[0] for tokens in by_request)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"batching": "eagre"}, UnknownNameError, "eager"),
        ({"skipped_kv": "propagete"}, UnknownNameError, "propagate"),
        ({"batching": "eager", "quorum": 0}, InputError, "quorum"),
        ({"quorum": 2}, InputError, "wait-for-deepest has no use for it"),
        ({"batching": "rebatch", "break_even": -1.0}, InputError, "break_even"),
        ({"batching": "rebatch", "break_even": math.nan}, InputError, "break_even"),
        ({"batching": "eager", "break_even": 2.0}, InputError, "set batching to rebatch"),
    ],
)
def test_bad_fields_are_named(profile: Profile, fields: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        early_exit(profile, **fields).controller_kind()


def test_another_packages_rule_is_found_by_name(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point is looked up like a built-in name; here one that stops half-way down."""

    class Entry:
        name, group = "half", "heliosim.exit_batching"

        def load(self) -> Any:
            return Half

    class Half:
        runs_all, is_joint = False, True

        def verdict(self, at: AtExit, rule: ExitRule) -> str:
            return "stop"

    from heliosim import registry

    known = registry.metadata.entry_points
    monkeypatch.setattr(
        registry.metadata, "entry_points", lambda group: [Entry()] if group == Entry.group else known(group=group)
    )
    found = run_simulated(early_exit(profile, batching="half"), profile)
    assert isinstance(early_exit(profile, batching="half").controller_kind(), EarlyExit)
    columns = (found.steps[c].to_pylist() for c in ("layers_run", "rows", "prefill_tokens"))
    decode = [layers for layers, rows, read in zip(*columns, strict=True) if rows and not read]
    assert set(decode) == {4}


def test_parts_are_step_shapes() -> None:
    found, _ = parts(rule("rebatch"), [4, 12])
    assert isinstance(found.first, StepShape)
