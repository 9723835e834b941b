"""The simulated engine on hand-made steps of the synthetic profile."""

from __future__ import annotations

import math

import pytest

from heliosim.costs import layers_run, load_seconds, load_terms, shape_of
from heliosim.engines.sim import SimEngine
from heliosim.errors import OutOfRangeError, UnknownNameError
from heliosim.formats.profile import Profile
from heliosim.runs import sim_engine
from heliosim.types import (
    TICK,
    Arrival,
    Batch,
    Content,
    ExitRule,
    Load,
    Outcome,
    Placement,
    Request,
    Run,
    Tokens,
    tick,
)
from tests.profiles import LOAD_SECONDS, SMALL, scenario, write_synthetic_profile

FULL, PARTIAL = Placement("small", 6), Placement("small", 4)
NONE, GREEDY, THRESHOLD = ExitRule("none"), ExitRule("greedy"), ExitRule("threshold", 0.8)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


def engine(profile: Profile, *tasks: str, output: int | None = 50, allow_extrapolation: bool = False) -> SimEngine:
    """An engine that knows one request per task, ids from 0, prompts of 20."""
    made = sim_engine(scenario(profile, allow_extrapolation=allow_extrapolation), profile)
    for k, task in enumerate(tasks):
        made.accept(Arrival(Request(k, 0.0, 20, 50), Content(task, None, output)))
    return made


def decode(rows: int, exits: ExitRule, placement: Placement = FULL, start: int = 20) -> Run:
    return Run(placement, exits, Batch(tuple(range(rows)), (start,) * rows, (1,) * rows, (True,) * rows))


def prefill(rows: int, exits: ExitRule, placement: Placement = FULL, tokens: int = 20) -> Run:
    return Run(placement, exits, Batch(tuple(range(rows)), (0,) * rows, (tokens,) * rows, (True,) * rows))


@pytest.mark.parametrize(("exits", "placement"), [(NONE, FULL), (GREEDY, FULL), (GREEDY, PARTIAL)])
def test_without_a_threshold_every_token_leaves_at_the_depth(
    profile: Profile, exits: ExitRule, placement: Placement
) -> None:
    out = engine(profile, "chat", "qa").perform(decode(2, exits, placement))
    assert out.tokens.exit_layers == (placement.depth,) * 2
    assert out.layers_run == placement.depth


def test_under_a_threshold_tokens_leave_where_their_recorded_text_did(profile: Profile) -> None:
    made = engine(profile, "chat", "code", "qa")
    texts = [profile.behaviour.text(profile.behaviour.assign(k, t, 0), "small:threshold") for k, t in
             enumerate(("chat", "code", "qa"))]  # fmt: skip
    seen: set[int] = set()
    for position in range(20):
        out = made.perform(decode(3, THRESHOLD))
        for row, text in enumerate(texts):
            exit_layer, confidence = out.tokens.exit_layers[row], out.tokens.confidences[row]
            assert confidence == text.confidence[f"small@{exit_layer}"][position]
            assert confidence >= 0.8 or exit_layer == 6
            assert all(text.confidence[f"small@{e}"][position] < 0.8 for e in (2, 4) if e < exit_layer)
            assert out.tokens.logprobs[row] == pytest.approx(math.log(confidence))
            seen.add(exit_layer)
        assert out.layers_run == max(out.tokens.exit_layers)
    assert seen == {2, 4, 6}


def test_a_step_costs_what_its_shape_says_on_ticks(profile: Profile) -> None:
    run = decode(2, THRESHOLD)
    out = engine(profile, "chat", "qa").perform(run)
    expected = profile.step_cost("small", "cpu").seconds(shape_of(run, out, SMALL))
    assert out.seconds == tick(expected)
    assert out.seconds % TICK == 0


@pytest.mark.parametrize(
    ("batch", "kind", "batching", "expected"),
    [
        (Batch((0, 1), (9, 9), (1, 1), (True, True)), "threshold", "wait-for-deepest", 4),
        (Batch((0, 1), (9, 9), (1, 1), (True, True)), "threshold", "full", 6),
        (Batch((0, 1), (9, 9), (1, 1), (True, True)), "greedy", "wait-for-deepest", 6),
        (Batch((0, 1), (0, 9), (5, 1), (True, True)), "threshold", "wait-for-deepest", 6),  # a prompt
        (Batch((0, 1), (5, 9), (3, 1), (True, True)), "threshold", "wait-for-deepest", 6),  # its last chunk
        (Batch((0, 1), (0, 9), (1, 1), (True, True)), "threshold", "wait-for-deepest", 6),  # a prompt of one
    ],
)
def test_layers_run(batch: Batch, kind: str, batching: str, expected: int) -> None:
    rule = ExitRule(kind, 0.8, batching)  # type: ignore[arg-type]
    tokens = Tokens((0, 1), (2, 4), (0.9, 0.9), (0.0, 0.0), (False, False))
    assert layers_run(Run(FULL, rule, batch), tokens) == expected


def test_a_chunk_that_emits_nothing(profile: Profile) -> None:
    run = Run(FULL, THRESHOLD, Batch((0,), (0,), (12,), (False,)))
    out = engine(profile, "chat").perform(run)
    assert (len(out.tokens), out.layers_run) == (0, 6)


def test_a_forced_length_ends_a_request_and_forgets_it(profile: Profile) -> None:
    made = engine(profile, "chat", output=3)
    lasts = [made.perform(decode(1, NONE)).tokens.lasts for _ in range(3)]
    assert lasts == [(False,), (False,), (True,)]
    with pytest.raises(KeyError):
        made.perform(decode(1, NONE))


def test_a_natural_length_ends_with_the_text_or_at_the_limit(profile: Profile) -> None:
    ends = {profile.behaviour.texts[s, "small:full"].end for s in profile.behaviour.sequences["chat"]}
    assert ends == {None, 16, 17}
    for request in range(12):
        made = engine(profile)
        made.accept(Arrival(Request(request, 0.0, 20, 18), Content("chat", None, None)))
        run = Run(FULL, NONE, Batch((request,), (20,), (1,), (True,)))
        count = 1
        while not made.perform(run).tokens.lasts[0]:
            count += 1
        text = profile.behaviour.text(profile.behaviour.assign(request, "chat", 0), "small:full")
        assert count == (text.end or 18)


def test_a_switch_of_source_goes_on_at_the_same_position(profile: Profile) -> None:
    made = engine(profile, "chat")
    for _ in range(4):
        made.perform(decode(1, NONE))
    out = made.perform(decode(1, GREEDY, PARTIAL))
    text = profile.behaviour.text(profile.behaviour.assign(0, "chat", 0), "small:greedy@4")
    assert out.tokens.confidences[0] == text.confidence["small@4"][4]


def test_an_unknown_task_says_the_known_ones(profile: Profile) -> None:
    with pytest.raises(UnknownNameError, match=r"'cat'.*Did you mean 'chat'\?"):
        engine(profile, "cat")


def test_a_load_costs_what_is_new(profile: Profile) -> None:
    made = engine(profile)

    def expected(load: Load, resident: int) -> float:
        kv_bytes = load.kv_blocks * SMALL.block_bytes(load.placement.depth, load.stores_hidden)
        return tick(load_seconds(LOAD_SECONDS, load_terms(load, SMALL, resident, kv_bytes)))

    first, deeper, shallow = Load(PARTIAL, 9, ""), Load(FULL, 5, ""), Load(PARTIAL, 9, "", stores_hidden=True)
    assert made.perform(first) == Outcome(expected(first, 0))
    assert made.perform(deeper).seconds == expected(deeper, 4)
    assert made.perform(shallow).seconds == expected(shallow, 6)
    made.perform(Load(Placement("large", 4), 1, ""))
    assert made.perform(deeper).seconds == expected(deeper, 0) > expected(deeper, 4)


def test_energy_is_power_times_time_where_power_is_known(profile: Profile) -> None:
    made = engine(profile, "chat")
    assert made.perform(decode(1, NONE)).energy_j is None
    made.watts = 40.0
    out = made.perform(decode(1, NONE))
    assert out.energy_j == pytest.approx(40.0 * out.seconds, rel=1e-5)


# --- the calibrated range ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "part"),
    [
        (decode(17, NONE), "'batch': 17"),
        (decode(1, NONE, start=256), "'context': 257"),
        (prefill(2, NONE, tokens=129), "'tokens': 258"),
    ],
)
def test_steps_outside_the_range_are_refused_or_counted(profile: Profile, run: Run, part: str) -> None:
    tasks = ("chat",) * len(run.batch)
    with pytest.raises(OutOfRangeError, match=r"batch <= 16, context <= 256, tokens per step <= 256") as caught:
        engine(profile, *tasks).perform(run)
    assert part in str(caught.value)
    assert "--allow-extrapolation" in str(caught.value)
    allowed = engine(profile, *tasks, allow_extrapolation=True)
    assert allowed.perform(run).seconds > 0
    assert allowed.extrapolated_steps == 1


@pytest.mark.parametrize("run", [decode(16, NONE), decode(1, NONE, start=255), prefill(2, NONE, tokens=128)])
def test_the_edges_are_inside(profile: Profile, run: Run) -> None:
    made = engine(profile, *("chat",) * len(run.batch))
    assert made.perform(run).seconds > 0
    assert made.extrapolated_steps == 0
