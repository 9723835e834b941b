"""Loads beside steps, layers that arrive while a step runs, and what host memory holds: hand-made values."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from heliosim.costs import TERMS, StepCost, stall_seconds
from heliosim.engines.sim import SimEngine
from heliosim.errors import InputError
from heliosim.metrics import summarise
from heliosim.recorder import TableRecorder
from heliosim.runs import run_simulated
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.controller import Note
from heliosim.serving.loading import Fetch, HostTier, Loading
from heliosim.serving.memory import MemoryPool
from heliosim.serving.server import Server
from heliosim.simulate import simulate_server
from heliosim.types import Arriving, Directive, ExitRule, InFlight, Load, Outcome, Placement, Run
from heliosim.workload import OpenLoop
from tests.helpers import StubEngine, arrival, spec
from tests.profiles import scenario, write_synthetic_profile

SMALL, LARGE = spec("small", 6, (2, 4, 6)), spec("large", 12, (4, 8, 12))
STEP_S, TRANSFER_S, CHANGE_S = 0.015625, 0.25, 0.03125  # whole ticks


class Slow(StubEngine):
    """Weights take a quarter of a second to come; what is left of a load then takes 1/32 s."""

    def perform(self, action: Run | Load) -> Outcome:
        if not isinstance(action, Load):
            return super().perform(action)
        self.actions.append(action)
        if action.part == "begin":
            return Outcome(0.0, arrives_s=TRANSFER_S)
        waited = {"whole": TRANSFER_S, "finish": action.left_s or 0.0, "drop": 0.0}[action.part]
        return Outcome(waited + (CHANGE_S if action.part != "drop" else 0.0))


@dataclass
class Plan:
    """Wants each placement from its step on."""

    wanted: dict[int, Placement]
    in_flight: InFlight = "boundary"
    breaches: int = 0
    steps: int = 0

    def decide(self, now: float, status: Any) -> Directive:
        at = max(k for k in self.wanted if k <= self.steps)
        return Directive(self.wanted[at], ExitRule("none"), self.in_flight, reason=f"step {at}")

    def observe(self, *_: Any) -> None:
        self.steps += 1

    def breaches_over(self, steps: int) -> list[int]:
        return [0] * steps

    def take_notes(self) -> list[Note]:
        return []


def served(
    wanted: dict[int, Placement],
    loading: Loading,
    budget: int = 100_000,
    output: int = 40,
    in_flight: InFlight = "boundary",
) -> tuple[list[Run | Load], TableRecorder]:
    engine, recorder = Slow(seconds=lambda run: STEP_S), TableRecorder()
    models = {"small": SMALL, "large": LARGE}
    batcher, pool = ContinuousBatcher(4, 64), MemoryPool(budget)
    server = Server(Plan(wanted, in_flight), batcher, pool, models, recorder, loading=loading)
    simulate_server(server, engine, OpenLoop([arrival(k, output=output) for k in range(6)]))
    return engine.actions, recorder


def loads(actions: list[Run | Load]) -> list[tuple[str, str]]:
    return [(str(a.placement), a.part) for a in actions if isinstance(a, Load)]


SWITCH = {0: Placement("small", 6), 5: Placement("large", 4)}


def test_steps_go_on_while_weights_come() -> None:
    actions, recorder = served(SWITCH, Loading(overlaps=True))
    assert loads(actions) == [("small@6", "whole"), ("large@4", "begin"), ("large@4", "finish")]
    begin = next(k for k, a in enumerate(actions) if isinstance(a, Load) and a.part == "begin")
    finish = next(k for k, a in enumerate(actions) if isinstance(a, Load) and a.part == "finish")
    between = actions[begin + 1 : finish]
    assert len(between) >= TRANSFER_S / STEP_S
    assert {str(a.placement) for a in between} == {"small@6"}
    events = recorder.tables().events
    detail = json.loads(events["detail"][events["kind"].to_pylist().index("fetched")].as_py())
    assert detail["hidden_s"] == detail["transfer_s"] == TRANSFER_S
    assert detail["exposed_s"] == CHANGE_S


def test_blocking_loads_are_exposed_whole() -> None:
    actions, recorder = served(SWITCH, Loading())
    assert loads(actions) == [("small@6", "whole"), ("large@4", "whole")]
    steps = recorder.tables().steps.to_pylist()
    assert [s["seconds"] for s in steps if s["kind"] == "load"][1] == TRANSFER_S + CHANGE_S


def test_kv_shrinks_by_what_arrives_and_what_does_not_fit_waits() -> None:
    actions, _ = served(SWITCH, Loading(overlaps=True), budget=20_000)
    begin = next(a for a in actions if isinstance(a, Load) and a.part == "begin")
    assert begin.kv_blocks == (20_000 - SMALL.weights_bytes(6) - LARGE.weights_bytes(4)) // SMALL.block_bytes(6)
    actions, _ = served(SWITCH, Loading(overlaps=True), budget=SMALL.weights_bytes(6) + LARGE.weights_bytes(4))
    assert loads(actions)[1] == ("large@4", "whole")


def test_deepening_reserves_the_new_layers_alone_and_keeps_requests() -> None:
    deeper = {0: Placement("small", 2), 5: Placement("small", 6)}
    actions, _ = served(deeper, Loading(overlaps=True), budget=9_000, in_flight="extend")
    begin, finish = (a for a in actions if isinstance(a, Load) and a.part != "whole")
    more = SMALL.weights_bytes(6) - SMALL.weights_bytes(2)
    assert begin.kv_blocks == (9_000 - SMALL.weights_bytes(2) - more) // SMALL.block_bytes(2, stores_hidden=True)
    assert finish.kept


def test_a_transfer_that_nobody_wants_any_more_is_given_up() -> None:
    back = {**SWITCH, 8: Placement("small", 6)}
    actions, recorder = served(back, Loading(overlaps=True))
    assert loads(actions) == [("small@6", "whole"), ("large@4", "begin"), ("small@6", "drop")]
    drop = next(a for a in actions if isinstance(a, Load) and a.part == "drop")
    assert drop.kv_blocks == (100_000 - SMALL.weights_bytes(6)) // SMALL.block_bytes(6)
    assert "fetch abandoned" in recorder.tables().events["kind"].to_pylist()
    other = {**SWITCH, 8: Placement("large", 8)}
    actions, _ = served(other, Loading(overlaps=True))
    assert [p for p, part in loads(actions) if part == "begin"] == ["large@4", "large@8"]


def test_who_cannot_run_meanwhile_waits_for_the_weights() -> None:
    """Both placements fit, but no request does beside them: the server waits for what is left of the transfer."""
    one_block = SMALL.weights_bytes(6) + LARGE.weights_bytes(4) + SMALL.block_bytes(6)
    wanted = {0: Placement("small", 6), 1: Placement("large", 4)}
    models = {"small": SMALL, "large": LARGE}
    engine, recorder = Slow(seconds=lambda run: STEP_S), TableRecorder()
    server = Server(
        Plan(wanted), ContinuousBatcher(4, 64), MemoryPool(one_block), models, recorder, loading=Loading(overlaps=True)
    )
    first, second = arrival(0, prompt=10, output=1), arrival(1, at=0.3, prompt=40, output=4)
    simulate_server(server, engine, OpenLoop([first, second]))
    finish = next(a for a in engine.actions if isinstance(a, Load) and a.part == "finish")
    assert finish.left_s == TRANSFER_S
    assert recorder.tables().requests["status"].to_pylist() == ["finished", "finished"]


def test_a_fetch_knows_what_of_it_was_hidden() -> None:
    fetch = Fetch(Placement("m", 2), "switch", began_s=1.0)
    assert fetch.left_s(2.0) is None
    assert not fetch.is_done(99.0)
    fetch.due_s = 3.0
    assert (fetch.left_s(2.0), fetch.left_s(4.0)) == (1.0, 0.0)
    assert (fetch.hidden_s(2.5), fetch.hidden_s(9.0)) == (1.5, 2.0)
    assert fetch.is_done(3.0)


# -- layers that arrive while a step runs -----------------------------------------------------------------------------

PER_LAYER, PER_STEP = 0.01, 0.002


def cost() -> StepCost:
    values = dict.fromkeys(TERMS, 0.0) | {"layer": PER_LAYER, "step": PER_STEP}
    return StepCost(tuple(values[t] for t in TERMS), 64, 512, 512)


@pytest.mark.parametrize(
    ("present", "left_s", "expected"),
    [
        (4, 0.0, 0.0),
        (4, 0.03, 0.0),  # the fourth layer ends at 0.04; the last is there at 0.03, and the first of two at 0.015
        (4, 0.08, 0.08 + PER_LAYER - 6 * PER_LAYER),  # the last one runs when it comes
        (0, 0.03, 0.005),  # the first of six comes at 0.005; from then on each is there in time
        (6, 0.5, 0.0),  # nothing is missing
    ],
)
def test_a_step_waits_for_what_cannot_be_hidden(present: int, left_s: float, expected: float) -> None:
    assert stall_seconds(PER_STEP + 6 * PER_LAYER, PER_STEP, 6, Arriving(present, left_s)) == pytest.approx(expected)


LOADS = {
    "load": 0.001,
    "layer": 0.0,
    "weights_byte": 1e-5,
    "kv_byte": 0.0,
    "extend_token_layer": 0.0,
    "disk_byte": 3e-5,
}


def sim() -> SimEngine:
    models = {"small": SMALL, "large": LARGE}
    return SimEngine(models, dict.fromkeys(models, cost()), dict.fromkeys(models, LOADS), None, 0)


def test_a_pipelined_load_is_over_when_the_base_is_there_and_steps_wait_for_the_rest() -> None:
    engine = sim()
    whole = Load(Placement("small", 6), 10, "serve")
    done = engine.perform(replace(whole, is_pipelined=True))
    assert done.seconds == pytest.approx(0.001 + 1e-5 * SMALL.base_bytes, abs=1e-8)
    assert done.arrives_s == pytest.approx(1e-5 * 6_000, abs=1e-8)
    assert sim().perform(whole).seconds == pytest.approx(done.seconds + (done.arrives_s or 0.0), abs=1e-8)


def test_bytes_from_disk_take_as_long_as_the_disk_does() -> None:
    usual, from_disk = (sim().perform(Load(Placement("small", 6), 10, "serve", disk_bytes=n)) for n in (0, 6_500))
    assert from_disk.seconds - usual.seconds == pytest.approx(6_500 * 2e-5, abs=1e-8)


def test_the_parts_of_a_load_in_the_background_add_up_to_it() -> None:
    engine = sim()
    engine.perform(Load(Placement("small", 2), 10, "serve"))
    begin = engine.perform(Load(Placement("small", 6), 8, "load", part="begin"))
    finish = engine.perform(Load(Placement("small", 6), 10, "load", part="finish", left_s=0.0))
    other = sim()
    other.perform(Load(Placement("small", 2), 10, "serve"))
    whole = other.perform(Load(Placement("small", 6), 10, "load"))
    assert begin.arrives_s is not None
    assert begin.seconds + begin.arrives_s + finish.seconds == pytest.approx(whole.seconds, abs=1e-8)


# -- host memory ------------------------------------------------------------------------------------------------------


def test_host_memory_keeps_what_was_used_last() -> None:
    models = {"small": SMALL, "large": LARGE}
    tier = HostTier(13_000, models)  # small takes 6,500 B, large 12,500 B
    assert tier.held == (("small", 6),)
    assert tier.missing_bytes(Placement("small", 6), 0) == 0
    assert tier.missing_bytes(Placement("large", 4), 0) == LARGE.weights_bytes(4)
    tier.use(Placement("large", 4))
    assert tier.held == (("small", 6), ("large", 4))
    assert tier.missing_bytes(Placement("large", 8), 4) == 4_000
    tier.use(Placement("large", 8))
    assert tier.held == (("large", 8),), "the model used longest ago gives way"
    assert tier.missing_bytes(Placement("small", 2), 0) == SMALL.weights_bytes(2)
    assert tier.missing_bytes(Placement("large", 12), 8) == 4_000
    assert tier.held_bytes <= 13_000


def test_what_does_not_fit_host_memory_is_read_every_time() -> None:
    tier = HostTier(5_000, {"small": SMALL})
    tier.use(Placement("small", 6))
    assert tier.held == ()
    tier.use(Placement("small", 4))
    tier.use(Placement("small", 6))
    assert tier.held == (("small", 4),), "what was there before stays"
    assert tier.missing_bytes(Placement("small", 6), 0) == 2_000


def test_a_server_says_what_comes_from_disk() -> None:
    models = {"small": SMALL, "large": LARGE}
    actions, _ = served(SWITCH, Loading(host=HostTier(7_000, models)))
    first, second = (a for a in actions if isinstance(a, Load))
    assert (first.disk_bytes, first.host) == (0, (("small", 6),))
    assert (second.disk_bytes, second.host) == (LARGE.weights_bytes(4), (("large", 4),))


# -- what a run says of it --------------------------------------------------------------------------------------------


def test_a_summary_tells_hidden_from_exposed(tmp_path: Any) -> None:
    """The same loads, hidden in part, exposed in whole."""
    profile = write_synthetic_profile(tmp_path / "p", max_rows=64, max_tokens=512)
    switches = {"kind": "helios", "probe_requests": 2, "reassess_interval": 10}
    found = {}
    for loads in ("blocking", "overlapped"):
        memory = {"budget_bytes": 60_000, "loads": loads}
        found[loads] = summarise(run_simulated(scenario(profile, memory=memory, controller=switches), profile))
    blocking, beside = found["blocking"], found["overlapped"]
    assert blocking.exposed_load_s == blocking.load_s
    assert beside.exposed_load_s is not None
    assert beside.load_s is not None
    assert beside.load_s > beside.exposed_load_s > 0
    assert beside.exposed_load_s / beside.transitions < (blocking.load_s or 0.0) / blocking.transitions


def test_a_profile_without_figures_for_a_tier_is_refused(tmp_path: Any) -> None:
    profile = write_synthetic_profile(tmp_path / "p")
    for memory, needs in (({"host": "pageable"}, "pageable"), ({"host_bytes": "1 MB"}, "disk")):
        with pytest.raises(InputError, match=f"a byte from {needs} takes"):
            run_simulated(scenario(profile, memory={"budget_bytes": 40_000, **memory}), profile)


def test_a_scenario_without_these_fields_is_the_one_it_was(tmp_path: Any) -> None:
    plan = scenario(write_synthetic_profile(tmp_path / "p"))
    assert "loads" not in plan.to_yaml()
    other = plan.model_copy(update={"memory": plan.memory.model_copy(update={"loads": "overlapped"})})
    assert "loads: overlapped" in other.to_yaml()
    assert plan.hash != other.hash
