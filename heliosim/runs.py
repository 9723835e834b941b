"""One call per kind of run: a scenario in, results out. Dashboard, planner and command line all go through here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliosim import __version__
from heliosim.assembly import build_server, load_costs, needs_beside
from heliosim.behaviour import Behaviour, is_usual_method, source_name
from heliosim.drive import Log
from heliosim.engines.base import Engine
from heliosim.engines.sim import SimEngine
from heliosim.errors import InputError
from heliosim.formats.profile import Profile, ProfileKind
from heliosim.formats.results import Deployed, RunClock, RunInfo, RunResults, save_run
from heliosim.noise import NoisePlayer
from heliosim.profile_view import open_profile
from heliosim.recorder import NullRecorder, TableRecorder
from heliosim.replays import Replay, replaying
from heliosim.scenario import Scenario
from heliosim.streams import stream
from heliosim.types import Arrival, Content, ExitRule, Placement, Request, StepPower
from heliosim.workload import OpenLoop, build, build_arrivals, contents

if TYPE_CHECKING:
    from heliosim.engines.torch import TorchEngine

OnProgress = Callable[[float], None]
ANY_STRIDE = 2**30


@dataclass(frozen=True)
class LiveRun:
    """A live run: its results, its log of actions with outcomes, the ids each request generated, and in words what it
    ran on.
    """

    results: RunResults
    log: Log
    outputs: Mapping[int, Sequence[int]]
    engine: str = ""


def sim_engine(
    scenario: Scenario,
    profile: Profile,
    behaviour: Behaviour | None = None,
    strides: bool = False,
    noise_of: Sequence[str | int] = (),
) -> SimEngine:
    """The simulated engine of a scenario: costs on its clock, behaviour from the profile unless given.

    ``noise_of``: tells the stream of this engine's step-time noise from those of others in the same run.
    """
    return SimEngine(
        models={n: profile.spec(n) for n in scenario.models},
        costs={n: profile.step_cost(n, scenario.clock) for n in scenario.models},
        loads=load_costs(scenario, profile),
        behaviour=behaviour or _behaviour_of(scenario, profile),
        seed=scenario.seed,
        allow_extrapolation=scenario.allow_extrapolation,
        watts=powers(scenario, profile),
        noise=_noise(scenario, profile, noise_of),
        strides=strides,
    )


def powers(scenario: Scenario, profile: Profile) -> dict[str, StepPower] | None:
    """Power of each model of a scenario; None unless all are known."""
    found = {name: profile.step_power(name) for name in scenario.models}
    known = {name: power for name, power in found.items() if power is not None}
    return known if len(known) == len(found) else None


def _behaviour_of(scenario: Scenario, profile: Profile) -> Behaviour | None:
    """The profile's, or one drawn from a model fitted to it; None where it has none and the scenario asks for no exits.
    Raises InputError if it does.
    """
    if not profile.has_behaviour and scenario.controller["kind"] in ("vanilla", "fixed"):
        return None
    if scenario.behaviour == "replay":
        return profile.behaviour
    threshold = getattr(scenario.controller_kind(), "threshold", profile.facts.behaviour.threshold)
    return profile.fitted_behaviour(scenario.behaviour, scenario.models, threshold, scenario.seed)


def _noise(scenario: Scenario, profile: Profile, noise_of: Sequence[str | int]) -> NoisePlayer | None:
    if scenario.step_noise is None:
        return None
    return profile.noise(scenario.clock).player(stream(scenario.seed, "step noise", *noise_of), scenario.step_noise)


def run_simulated(
    scenario: Scenario,
    profile: Profile | None = None,
    *,
    engine: Engine | None = None,
    behaviour: Behaviour | None = None,
    replay: Replay | None = None,
    on_progress: OnProgress | None = None,
    max_stride: int = ANY_STRIDE,
) -> RunResults:
    """Simulate a scenario. ``engine`` and ``behaviour`` replace the profile's (replays of recorded runs). ``replay``:
    recorded exits that the controller knows offline as well, as in a live run with the same ones.

    ``max_stride``: decode steps the simulated engine may do at once; it changes how long the answer takes, never what
    it is. Other engines do one, or what they recorded (``engines.replay``).
    """
    if scenario.fleet is not None:
        if engine is not None:
            raise ValueError("a fleet's replicas have engines of their own; run it without one")
        if replay is not None:
            remedy = "Give its groups profiles with these exits."
            raise InputError("--replay-exits", replay.label, "a fleet's groups have exits of their own", remedy)
        return _run_fleet(scenario, profile, behaviour, on_progress, max_stride)
    from heliosim.simulate import simulate_server

    profile = profile or open_profile(scenario.profile)
    if replay is not None:
        profile = replaying(profile, scenario, replay)
    recorder = TableRecorder()
    engine = engine or sim_engine(scenario, profile, behaviour, strides=max_stride > 1)
    stride = max_stride if isinstance(engine, SimEngine) else getattr(engine, "max_stride", 1)
    server = build_server(scenario, profile, recorder, stride)
    cpu, wall = time.process_time(), time.perf_counter()
    simulate_server(server, engine, build(scenario.workload, scenario.seed), on_progress)
    host = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    if isinstance(engine, SimEngine):
        host["extrapolated_steps"] = engine.extrapolated_steps
    is_own = isinstance(engine, SimEngine) and behaviour is None
    unknown = unknown_quality(scenario, {scenario.profile: profile}) if is_own else ""
    return _results(scenario, profile, recorder, "simulated", host, unknown, replay)


def _run_fleet(
    scenario: Scenario,
    profile: Profile | None,
    behaviour: Behaviour | None,
    on_progress: OnProgress | None,
    max_stride: int,
) -> RunResults:
    from heliosim.fleet_runs import run_fleet

    cpu, wall = time.process_time(), time.perf_counter()
    done = run_fleet(scenario, profile, behaviour, on_progress, max_stride)
    host = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    tables = done.tables(_tasks(scenario))
    return RunResults(
        _info(
            scenario,
            done.profile_hash,
            done.profile_kind,
            "simulated",
            "" if behaviour else unknown_quality(scenario),
            {group: deployment(one, count) for group, (one, count) in done.profiles.items()},
        ),
        scenario.to_yaml(),
        tables.requests,
        tables.steps,
        tables.tokens,
        tables.events,
        {**host, "extrapolated_steps": done.extrapolated_steps},
    )


def make_engine(
    scenario: Scenario,
    profile: Profile,
    *,
    device: str = "auto",
    threads: int | None = None,
    replay: Replay | None = None,
) -> TorchEngine:
    """The real engine for a scenario; ``replay``: whose exits stand in for its own. Raises InputError if a checkpoint
    is not the one the profile was measured on.
    """
    from heliosim.engines.torch import TorchEngine
    from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint

    if not profile.is_measured:
        remedy = "Simulate it, or calibrate the models on this machine."
        problem = "figures that were not measured have no model to run"
        raise InputError(f"{profile.folder}: kind", profile.facts.kind, problem, remedy)
    folders = {}
    for name in scenario.models:
        facts = profile.model(name)
        folder = checkpoint_path(facts.checkpoint)
        info = inspect_checkpoint(folder, facts.dtype)
        if info.weights_sha256() != facts.weights_sha256:
            raise InputError(
                f"profile model {name}",
                facts.weights_sha256[:12],
                f"was measured on other weights than {folder.name} holds",
                "Calibrate again, or give the checkpoint of the profile.",
            )
        folders[name] = folder
    measured_on = str(profile.facts.device.get("device") or "cpu")
    if device not in ("auto", measured_on):
        remedy = f"Use --device {measured_on}, or calibrate on {device}."
        raise InputError("--device", device, f"the profile was measured on {measured_on}", remedy)
    device = measured_on
    degrees = {profile.model(name).tensor_parallel for name in scenario.models}
    if len(degrees) > 1:
        problem = "the models of one live engine share the same GPUs"
        raise InputError(f"{profile.folder}: tensor_parallel", sorted(degrees), problem, "Calibrate them alike.")
    mode = engine_mode(scenario.live.engine, device)
    return TorchEngine(
        folders,
        device=device,
        dtype=profile.model(scenario.models[0]).dtype,
        threads=threads or int(profile.facts.device.get("threads") or 1),
        is_pageable=scenario.memory.host == "pageable",
        replay=None if replay is None else replay.behaviour,
        seed=scenario.seed,
        tensor_parallel=degrees.pop(),
        budget_bytes=_largest_budget(scenario) - needs_beside(scenario, profile).fixed,
        host_bytes=scenario.memory.host_bytes,
        sampling=scenario.sampling,
        mode=mode,
        attention=scenario.live.attention,
    )


def _largest_budget(scenario: Scenario) -> int:
    """The most device memory that a scenario gives its server at any time."""
    later = [change.memory.budget_bytes for change in scenario.changes if change.memory is not None]
    return max((scenario.memory.budget_bytes, *later))


def live_stride(scenario: Scenario, engine: TorchEngine) -> int:
    """Steps that a live engine does at once at most. Raises InputError if a stride is asked of one that has none."""
    asked = scenario.live.max_stride
    if engine.mode == "plain" and asked not in (None, 1):
        remedy = "Give live.engine fast, or leave it out."
        raise InputError("live.max_stride", asked, "the plain engine goes step by step", remedy)
    return engine.default_stride if asked is None else asked


def engine_mode(asked: str, device: str) -> str:
    """The engine that ``live.engine`` stands for on a device, in calibration as in live runs."""
    if asked != "auto":
        return asked
    return "plain" if device == "cpu" else "fast"


def run_live(
    scenario: Scenario,
    profile: Profile | None = None,
    *,
    device: str = "auto",
    engine: TorchEngine | None = None,
    score_agreement: bool = True,
    replay: Replay | None = None,
    on_progress: OnProgress | None = None,
    tensor_parallel: int | None = None,
    progress_log: Path | None = None,
) -> LiveRun:
    """Execute a scenario on the real engine, then score agreement of every token with its model's last layer (not
    timed; neither of random weights nor of replayed exits, whose record says it).

    ``replay``: recorded exits in place of the models' own. An engine made here is warmed up first with the scenario's
    own first requests. Raises InputError for an ``engine`` that takes tokens otherwise than the scenario says, or that
    was not made for the replay.
    ``tensor_parallel``: GPUs that share each layer, where the profile was measured on one; its step times, by which a
    controller may judge, stay those of one.
    ``progress_log``: file to say in about once a second how it goes (``progress_log.py``).
    """
    refuse_live_fleet(scenario)
    refuse_live_fits(scenario)
    profile = profile or open_profile(scenario.profile)
    if "energy" in (scenario.controller.get("objective"), *(change.objective for change in scenario.changes)):
        remedy = "Simulate it from a profile with energy figures, or use another objective."
        raise InputError("controller.objective", "energy", "the live engine reads no energy per step", remedy)
    if tensor_parallel is not None:
        from heliosim.engines.parallel.facts import ranked

        profile = ranked(profile, scenario.models, tensor_parallel)
    if replay is not None:
        profile = replaying(profile, scenario, replay)
    if engine is not None:
        return _run_on(engine, scenario, profile, score_agreement, replay, on_progress, progress_log)
    engine = make_engine(scenario, profile, device=device, replay=replay)
    try:
        _warm_up(scenario, profile, engine)
        return _run_on(engine, scenario, profile, score_agreement, replay, on_progress, progress_log)
    finally:
        engine.close()


def _run_on(
    engine: TorchEngine,
    scenario: Scenario,
    profile: Profile,
    score_agreement: bool,
    replay: Replay | None,
    on_progress: OnProgress | None,
    progress_log: Path | None,
) -> LiveRun:
    from heliosim.live import serve_live

    if engine.sampling != scenario.sampling:
        problem = "the engine given was made for other settings"
        raise InputError("sampling", str(scenario.sampling), problem, "Make it for this scenario.")
    if (engine.replay is None) != (replay is None):
        problem = "the engine given was made for other exits"
        raise InputError("--replay-exits", replay and replay.label, problem, "Make it with this replay.")
    engine.reset()
    log = None
    if progress_log is not None:
        from heliosim.progress_log import LoggingRecorder

        log = LoggingRecorder(progress_log, scenario, profile, "" if replay is None else replay.label)
    recorder = log or TableRecorder()
    has_ended = False
    try:
        server = build_server(scenario, profile, recorder, live_stride(scenario, engine))
        cpu, wall = time.process_time(), time.perf_counter()
        source = build(scenario.workload, scenario.seed)
        done = serve_live(server, engine, source, scenario.clock, on_progress=on_progress)
        host = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        has_ended = True
    finally:
        if log is not None:
            log.close(has_ended)
    outputs = engine.take_outputs()
    results = _results(scenario, profile, recorder, scenario.clock, host, replay=replay)
    if score_agreement and replay is None and not profile.random_models:
        results = with_agreement(results, engine, contents(scenario.workload, scenario.seed), outputs)
    stride = server.max_stride
    ran_on = engine.describe() + (f", strides of up to {stride} steps" if stride > 1 else "")
    return LiveRun(results, done.log, outputs, ran_on)


def refuse_live_fleet(scenario: Scenario) -> None:
    """Raise InputError for a scenario with a fleet: the live engine is one server."""
    if scenario.fleet is not None:
        remedy = "Simulate it (without --live), or take the fleet out of the scenario to run one replica live."
        raise InputError("fleet", f"{len(scenario.fleet.names)} replicas", "a fleet cannot run live", remedy)


def refuse_live_fits(scenario: Scenario) -> None:
    """Raise InputError for a scenario with exits of a fitted model: real models have their own."""
    if scenario.behaviour != "replay":
        remedy = "Simulate it (without --live), or leave behaviour out."
        raise InputError("behaviour", scenario.behaviour, "a live run meets its models' own exits", remedy)


def _warm_up(scenario: Scenario, profile: Profile, engine: TorchEngine, requests: int = 16) -> None:
    """Serve a few of the scenario's requests, unrecorded, so that first-use costs fall on no measured step."""
    from heliosim.live import serve_live

    known = contents(scenario.workload, scenario.seed)
    firsts = [(k, c) for k, c in known.items() if c.prompt_ids is not None][:requests]
    arrivals = [Arrival(Request(k, 0.0, len(c.prompt_ids or ()), 4), replace(c, output_tokens=4)) for k, c in firsts]
    if engine.texts.made_up is not None and not firsts:
        room = min(64, *(profile.spec(name).max_context - 4 for name in scenario.models))
        some = [(k, c) for k, c in known.items()][:requests]
        arrivals = [Arrival(Request(k, 0.0, room, 4), replace(c, output_tokens=4)) for k, c in some]
    bare = scenario.model_copy(update={"changes": ()})
    server = build_server(bare, profile, NullRecorder(), live_stride(scenario, engine))
    serve_live(server, engine, OpenLoop(arrivals), "cpu", keep_log=False)
    engine.take_outputs()


def with_agreement(
    results: RunResults, engine: TorchEngine, known: Mapping[int, Content], outputs: Mapping[int, Sequence[int]]
) -> RunResults:
    """Fill ``agrees``: whether each emitted token is what all layers of the same model would have said to the same
    text.
    """
    import pyarrow as pa

    tokens = results.tokens
    prompts = {request: content.prompt_ids or () for request, content in known.items()}
    models = tokens["model"].to_pylist()
    ids, positions, emitted = (tokens[c].to_pylist() for c in ("request_id", "position", "token_id"))
    final: dict[tuple[str, int], Any] = {}
    for model in sorted(set(models)):
        wanted = sorted({r for r, m in zip(ids, models, strict=True) if m == model and r in outputs})
        layers = engine.specs[model].layers
        texts = [[*prompts[r], *outputs[r]] for r in wanted]
        for request, scored in zip(wanted, engine.score(model, texts, (layers,)), strict=True):
            final[model, request] = scored.ids[0]
    agrees = [
        bool(final[m, r][len(prompts[r]) - 1 + p] == t) if (m, r) in final else None
        for m, r, p, t in zip(models, ids, positions, emitted, strict=True)
    ]
    at = tokens.schema.get_field_index("agrees")
    filled = tokens.set_column(at, tokens.schema.field(at), pa.array(agrees, pa.bool_()))
    return replace(results, tokens=filled)


def _results(
    scenario: Scenario,
    profile: Profile,
    recorder: TableRecorder,
    clock: str,
    host: dict[str, Any],
    quality_unknown: str = "",
    replay: Replay | None = None,
) -> RunResults:
    info = _info(scenario, profile.hash, profile.facts.kind, clock, quality_unknown, {"replica": deployment(profile)})
    if replay is not None:
        info = info.model_copy(update={"replayed_exits": replay.label})
    return RunResults.of(recorder, info, scenario.to_yaml(), tasks=_tasks(scenario), host=host)


def unknown_quality(scenario: Scenario, opened: Mapping[str, Profile] | None = None) -> str:
    """Exit methods of a scenario, or of a fleet's groups, whose texts a profile lacks: ``batching+skipped_kv, ...``."""
    found: set[str] = set()
    groups = scenario.fleet.replicas if scenario.fleet is not None else ()
    for group in [scenario.of_group(g) for g in groups] or [scenario]:
        kind: Any = group.controller_kind()
        if not hasattr(kind, "batching") or not hasattr(kind, "skipped_kv"):
            continue
        rule = ExitRule("threshold", 0.0, kind.batching, kind.skipped_kv)
        if is_usual_method(rule):
            continue
        profile = (opened or {}).get(group.profile) or open_profile(group.profile)
        for model in (kind.model,) if hasattr(kind, "model") else group.models:
            layers = profile.spec(model).layers
            name = source_name(Placement(model, layers), rule, layers, is_exact=True)
            if name not in profile.behaviour.sources:
                found.add(f"{kind.batching}+{kind.skipped_kv}")
    return ", ".join(sorted(found))


def deployment(profile: Profile, count: int = 1) -> Deployed:
    """What servers of a profile run on."""
    gpu = profile.facts.device.get("gpu")
    return Deployed(count=count, gpu=None if gpu is None else str(gpu), gpus=profile.gpus, idle_w=profile.idle_watts)


def _info(
    scenario: Scenario,
    profile_hash: str,
    kind: ProfileKind,
    clock: str,
    quality_unknown: str,
    deployed: dict[str, Deployed],
) -> RunInfo:
    is_live = clock != "simulated"
    named: RunClock = "simulated" if not is_live else scenario.clock
    return RunInfo(
        name=scenario.name,
        mode="live" if is_live else "simulated",
        clock=named,
        seed=scenario.seed,
        scenario_hash=scenario.hash,
        profile_hash=profile_hash,
        profile_kind=kind,
        quality_unknown=quality_unknown,
        behaviour=scenario.behaviour,
        versions={"heliosim": __version__},
        deployed=deployed,
    )


def _tasks(scenario: Scenario) -> dict[int, str]:
    return {request: content.task for request, content in contents(scenario.workload, scenario.seed).items()}


def last_arrival(scenario: Scenario) -> float | None:
    """When the last request arrives, s; None for a closed loop, whose arrivals answer to the server."""
    if scenario.workload.arrivals is not None and scenario.workload.arrivals.kind == "closed":
        return None
    return max((a.request.arrival_s for a in build_arrivals(scenario.workload, scenario.seed)), default=None)


def save(results: RunResults | LiveRun, folder: Path, *, overwrite: bool = False) -> None:
    """Write a run folder."""
    save_run(folder, results.results if isinstance(results, LiveRun) else results, overwrite=overwrite)
