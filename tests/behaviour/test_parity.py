"""Live and simulated drivers act alike: a live log, fed back through the simulated driver, gives the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from heliosim.assembly import build_server
from heliosim.drive import Finished
from heliosim.engines.replay import ReplayDiverged, ReplayEngine
from heliosim.formats.checkpoint import checkpoint_path
from heliosim.formats.profile import Profile
from heliosim.live import LiveClock, serve_live
from heliosim.recorder import TableRecorder
from heliosim.scenario import ChangeSpec, MemoryChange
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.controller import FixedPlacement
from heliosim.serving.helios import Helios, HeliosParameters
from heliosim.serving.memory import MemoryPool
from heliosim.serving.repository import Candidate, Performance, Repository
from heliosim.serving.server import Server
from heliosim.simulate import simulate_server
from heliosim.streams import stream
from heliosim.types import Arrival, ExitRule, InFlight, Load, Outcome, Run, blocks_for
from heliosim.workload import OpenLoop, build, build_arrivals
from tests.helpers import StubEngine, arrival, server, spec

if TYPE_CHECKING:
    from heliosim.engines.torch import TorchEngine

SMALL, LARGE = spec("small"), spec("large", 12, (4, 8, 12))
TABLES = ("requests", "steps", "tokens", "events")
PAIR = ("tiny-opt-s", "tiny-opt-l")
BESIDE = {"loads": "overlapped", "budget_bytes": 80_000_000}
OTHER_LOADS: list[tuple[InFlight, dict[str, Any]]] = [
    ("boundary", BESIDE),
    ("extend", BESIDE),
    ("boundary", {"is_pipelined": True}),
]


class BusyEngine(StubEngine):
    """A stub whose actions really take time, a random part of it asleep, and whose tokens have random exits."""

    def __init__(self, seed: int) -> None:
        self._rng = stream(seed, "busy")

        def exit_of(request: int, position: int, run: Run) -> tuple[int, float]:
            confidence = float(stream(seed, "exit", request, position).random())
            return (4, confidence) if run.exits.kind == "threshold" else (run.placement.depth, confidence)

        super().__init__(exit_of=exit_of)

    def perform(self, action: Run | Load) -> Outcome:
        busy, asleep = self._rng.exponential(3e-4), self._rng.exponential(2e-4)
        end = time.process_time() + busy
        while time.process_time() < end:
            pass
        time.sleep(asleep)
        return super().perform(action)


def helios_server(in_flight: InFlight, recorder: TableRecorder) -> Server:
    """A controller that changes its mind often, in a pool in which requests preempt each other."""

    def offline(*rates: float) -> list[Performance]:
        return [Performance(rate, 1 / rate, 2.0) for rate in rates]

    small = Candidate(SMALL, dict(zip(SMALL.exits, offline(300, 200, 100), strict=True)), {2: 0.8, 4: 0.1, 6: 0.1})
    large = Candidate(LARGE, dict(zip(LARGE.exits, offline(150, 90, 60), strict=True)), {4: 0.8, 8: 0.1, 12: 0.1})
    budget = 16_000
    parameters = HeliosParameters(
        probe_requests=2,
        reassess_interval=15,
        window_tokens=10,
        max_breaches=4,
        load_step="next-exit",
        in_flight=in_flight,
    )
    repository = Repository({"small": small, "large": large}, budget, lambda old, new: 1e-4)
    return server(Helios(repository, parameters), SMALL, LARGE, budget=budget, max_batch=6, recorder=recorder)


def arrivals(seed: int, count: int = 70) -> list[Arrival]:
    rng = stream(seed, "arrivals")
    at, found = 0.0, []
    for k in range(count):
        at += float(rng.exponential(0.002))
        found.append(arrival(k, at, prompt=int(rng.integers(1, 60)), output=int(rng.integers(1, 12))))
    return found


def assert_same_run(live: TableRecorder, again: TableRecorder) -> None:
    for name in TABLES:
        one, other = getattr(live.tables(), name), getattr(again.tables(), name)
        assert one.num_rows > 0
        assert one.equals(other), name


@pytest.mark.parametrize("clock", ["cpu", "wall"])
@pytest.mark.parametrize("in_flight", ["boundary", "reprefill", "extend"])
def test_a_live_log_drives_the_simulated_server_through_the_same_run(clock: LiveClock, in_flight: InFlight) -> None:
    live, again = TableRecorder(), TableRecorder()
    done = serve_live(helios_server(in_flight, live), BusyEngine(1), OpenLoop(arrivals(1)), clock)
    loads = [a for a, _ in done.log if isinstance(a, Load)]
    assert len(loads) > 4
    assert {a.reason for a in loads} >= {"evaluate", "choose"}
    assert in_flight == "extend" or not any(a.kept for a in loads)
    engine = ReplayEngine(done.log)
    simulated = simulate_server(helios_server(in_flight, again), engine, OpenLoop(arrivals(1)))
    assert engine.position == len(done.log)
    assert simulated.end_s == done.end_s
    assert_same_run(live, again)


class Fetching(BusyEngine):
    """Weights come in the background: an engine that knows when they are there only once they are."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._left = 0

    def perform(self, action: Run | Load) -> Outcome:
        outcome = super().perform(action)
        if isinstance(action, Load):
            self._left = 4 if action.part == "begin" else 0
            return outcome._replace(arrives_s=-(2.0**-20)) if action.part == "finish" else outcome
        self._left -= 1
        return outcome._replace(arrives_s=-(2.0**-20)) if self._left == 0 else outcome


@pytest.mark.parametrize("in_flight", ["boundary", "extend"])
def test_a_log_of_loads_beside_steps_replays(in_flight: InFlight) -> None:
    live, again = TableRecorder(), TableRecorder()

    def made(recorder: TableRecorder) -> Server:
        server = helios_server(in_flight, recorder)
        server.loading.overlaps = True
        server.pool.total_bytes = 60_000
        return server

    done = serve_live(made(live), Fetching(1), OpenLoop(arrivals(1)), "cpu")
    parts = [a.part for a, _ in done.log if isinstance(a, Load)]
    assert parts.count("begin") > 3
    assert parts.count("finish") > 3
    engine = ReplayEngine(done.log)
    simulate_server(made(again), engine, OpenLoop(arrivals(1)))
    assert engine.position == len(done.log)
    assert_same_run(live, again)


def test_a_replay_notices_a_different_controller() -> None:
    done = serve_live(helios_server("reprefill", TableRecorder()), BusyEngine(2), OpenLoop(arrivals(2)), "cpu")
    with pytest.raises(ReplayDiverged, match="differs"):
        simulate_server(helios_server("extend", TableRecorder()), ReplayEngine(done.log), OpenLoop(arrivals(2)))


def test_idle_time_is_skipped_on_the_cpu_clock_and_waited_for_on_the_wall_clock() -> None:
    """Two requests 0.15 s apart: the log holds only work, the clock holds the gap, and only one clock lives it."""
    spent: dict[LiveClock, float] = {}
    for clock in ("cpu", "wall"):
        recorder = TableRecorder()
        began = time.perf_counter()
        done = serve_live(server(recorder=recorder), StubEngine(), OpenLoop([arrival(0, 0.0), arrival(1, 0.15)]), clock)
        spent[clock] = time.perf_counter() - began
        assert done.end_s >= 0.15
        assert sum(outcome.seconds for _, outcome in done.log) <= done.end_s
        admitted = recorder.tables().requests["admitted_s"].to_pylist()
        assert admitted[1] >= 0.15
    assert spent["wall"] >= 0.15


# --- the real engine --------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A minimal profile of the shipped pair, an engine over it, and a workload of 24 short texts."""

    profile: Profile
    engine: TorchEngine
    trace: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    torch = pytest.importorskip("torch")
    for name in PAIR:
        assert (Path(__file__).parents[2] / "heliosim" / "checkpoints" / name / "model.safetensors").exists()
    from heliosim_calibrate import calibrate as calibration
    from heliosim_calibrate.experiment import write_workload

    from heliosim.engines.torch import TorchEngine

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("live")
    profile = calibration.calibrate(
        calibration.Request(
            models=PAIR,
            out=folder / "profile",
            device="cpu",
            max_batch=4,
            rounds=1,
            prompts_per_task=2,
            tokens_per_text=12,
            max_context=128,
            tasks=("chat", "code"),
        )
    )
    write_workload(folder / "trace.jsonl", profile, 24, 0, tasks=("chat", "code"))
    engine = TorchEngine({name: checkpoint_path(name) for name in PAIR}, device="cpu", threads=1, record_ids=True)
    yield Bench(profile, engine, folder / "trace.jsonl")
    torch.set_num_threads(threads)


def live_scenario(bench: Bench, **controller: Any) -> Any:
    from heliosim_calibrate.experiment import workload

    from heliosim.examples import scenario_for

    helios = {
        "kind": "helios",
        "probe_requests": 2,
        "reassess_interval": 8,
        "window_tokens": 20,
        "max_breaches": 4,
        "load_step": "next-exit",
    }
    made = scenario_for("parity", helios | controller, bench.profile, workload(bench.trace, 400.0), max_batch=4)
    return made.model_copy(update={"allow_extrapolation": True})


@pytest.mark.slow
@pytest.mark.parametrize(("in_flight", "loads"), [("boundary", {}), ("extend", {}), *OTHER_LOADS])
def test_a_real_live_run_replays_and_its_books_are_the_engines(
    bench: Bench, in_flight: InFlight, loads: dict[str, Any]
) -> None:
    plan = live_scenario(bench, in_flight=in_flight)
    plan = plan.model_copy(update={"memory": plan.memory.model_copy(update=loads)})
    check_a_live_run(bench, plan, is_pipelined="is_pipelined" in loads)


@pytest.mark.slow
@pytest.mark.parametrize("loads", [{}, BESIDE], ids=str)
def test_memory_that_shrinks_and_grows_live(bench: Bench, loads: dict[str, Any]) -> None:
    """Both storages, the pool's and the engine's, follow; the log drives the simulated server through the same run."""
    plan = live_scenario(bench)
    plan = plan.model_copy(update={"memory": plan.memory.model_copy(update=loads)})
    facts = bench.profile.spec(PAIR[0])
    least = facts.weights_bytes(facts.layers) + 10 * facts.block_bytes(facts.layers)
    changes = (
        ChangeSpec(at_s=0.02, memory=MemoryChange(budget_bytes=least)),
        ChangeSpec(at_s=0.1, memory=MemoryChange(budget_bytes=plan.memory.budget_bytes)),
    )
    events = check_a_live_run(bench, plan.model_copy(update={"changes": changes}))
    assert events.count("changed") == events.count("reshortlisted") == 2


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", ["boundary", "extend"])
def test_a_fast_live_run_replays_with_its_strides(bench: Bench, in_flight: InFlight) -> None:
    from heliosim.engines.torch import TorchEngine

    engine = TorchEngine({name: checkpoint_path(name) for name in PAIR}, mode="fast")
    runner: Any = engine._runner
    runner.lag, runner.pads = 1, True
    strides: list[int] = []
    perform = engine.perform

    def noted(action: Run | Load) -> Outcome:
        outcome = perform(action)
        strides.append(1 if outcome.stride is None else len(outcome.stride))
        return outcome

    engine.perform = noted  # type: ignore[method-assign]
    check_a_live_run(replace(bench, engine=engine), live_scenario(bench, in_flight=in_flight), max_stride=16)
    assert max(strides) > 3


@pytest.mark.slow
def test_a_device_with_less_memory_than_the_budget_live(bench: Bench) -> None:
    """The first load finds out; HELIOS shortlists what fits, and the log replays."""
    torch = pytest.importorskip("torch")
    from heliosim.engines.models.arena import Arena, allocate
    from heliosim.engines.torch import TorchEngine

    plan = live_scenario(bench)
    facts = bench.profile.spec(PAIR[0])
    there = facts.weights_bytes(facts.layers) + 40 * facts.block_bytes(facts.layers)
    assert there < bench.profile.spec(PAIR[1]).weights_bytes(12) < plan.memory.budget_bytes

    def scarce(values: int, device: Any, dtype: Any) -> Any:
        if values * dtype.itemsize > there:
            raise torch.OutOfMemoryError("cannot allocate")
        return allocate(values, device, dtype)

    engine = TorchEngine({name: checkpoint_path(name) for name in PAIR}, budget_bytes=plan.memory.budget_bytes)
    engine.residency.arena = Arena(engine.device, engine.residency.dtype, scarce)
    events = check_a_live_run(replace(bench, engine=engine), plan, placements=1)
    assert events.count("failed") == events.count("changed") == events.count("reshortlisted") == 1


def check_a_live_run(
    bench: Bench, plan: Any, *, is_pipelined: bool = False, placements: int = 2, max_stride: int = 1
) -> list[str]:
    """Serve a scenario live and replay its log; returns the kinds of events."""
    live, again = TableRecorder(), TableRecorder()
    srv = build_server(plan, bench.profile, live, max_stride)
    compared: list[tuple[int, int]] = []
    bench.engine.take_outputs()

    def compare_books(now: float) -> None:
        held, pool = bench.engine.books(), srv.pool
        if is_pipelined:  # layers come while the next step runs
            assert held["weights_bytes"] <= pool.weights_bytes
        else:
            assert held["weights_bytes"] == pool.weights_bytes
        assert held["kv_blocks"] == pool.total_blocks
        assert held["kv_bytes"] == pool.kv_total_bytes
        # the pool sets blocks aside for a whole prompt when it starts, the engine takes them chunk by chunk
        assert held["kv_used_blocks"] == sum(blocks_for(tokens) for _, tokens in srv.batcher.in_kv())
        assert held["kv_used_bytes"] <= pool.kv_used_bytes
        compared.append((pool.weights_bytes, pool.kv_total_bytes))

    done = serve_live(srv, bench.engine, build(plan.workload, plan.seed), "cpu", on_progress=compare_books)
    outputs = bench.engine.take_outputs()
    lengths = {a.request.id: a.content.output_tokens for a in build_arrivals(plan.workload, plan.seed)}
    assert {request: len(ids) for request, ids in outputs.items()} == lengths
    assert len(compared) == len(done.log)
    assert len(set(compared)) > placements, "the run changed its placement"
    engine = ReplayEngine(done.log, max_stride)
    simulate_server(build_server(plan, bench.profile, again, max_stride), engine, build(plan.workload, plan.seed))
    assert engine.position == len(done.log)
    assert_same_run(live, again)
    return [str(kind) for kind in live.tables().events["kind"].to_pylist()]


def run_fixed(bench: Bench, model: str, depth: int, arrivals: Sequence[Arrival]) -> dict[int, list[int]]:
    """Greedy decoding at one depth, everything waiting from the start; the ids of each request."""
    facts = bench.profile.spec(model)
    controller = FixedPlacement(facts, ExitRule("greedy"), depth)
    bench.engine.take_outputs()
    pool = MemoryPool(2 * facts.weights_bytes(facts.layers))
    srv = Server(controller, ContinuousBatcher(4, 64), pool, {model: facts}, TableRecorder())
    finished: Finished = serve_live(srv, bench.engine, OpenLoop(arrivals), "cpu")
    assert finished.end_s > 0
    return bench.engine.take_outputs()


@pytest.mark.slow
def test_a_load_and_a_switch_change_no_token(bench: Bench) -> None:
    """The same partial model gives the same text when it comes fresh, after its own full depth, and after the other."""
    small, large = PAIR
    exits = bench.profile.spec(small).exits
    texts = [
        replace(a, request=replace(a.request, arrival_s=0.0))
        for a in build_arrivals(live_scenario(bench).workload, 0)[:8]
    ]
    fresh = run_fixed(bench, small, exits[0], texts)
    assert len(fresh) == 8
    deeper = run_fixed(bench, small, exits[-1], texts)
    assert deeper != fresh, "another depth says something else"
    assert run_fixed(bench, small, exits[0], texts) == fresh
    run_fixed(bench, large, bench.profile.spec(large).exits[0], texts)
    assert run_fixed(bench, small, exits[0], texts) == fresh
    assert run_fixed(bench, small, exits[-1], texts) == deeper
