"""Made-up runs with plausible shapes, for tests of what reads runs: no server, no engine, no profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from heliosim.formats.results import RunInfo, RunResults
from heliosim.metrics import Slo, SystemResult
from heliosim.recorder import TableRecorder
from heliosim.types import Batch, ExitRule, Load, Outcome, Placement, Run, Served, StepRecord, Tokens, tick

LAYERS = {"tiny-opt-s": 8, "tiny-opt-m": 12}
EXITS = {"tiny-opt-s": (2, 4, 8), "tiny-opt-m": (3, 6, 12)}
TASKS = ("copy", "sort", "chat", "sums")
BUDGET = 24_000_000


@dataclass
class _Going:
    id: int
    arrival: float
    prompt: int
    output: int
    task: str
    admitted: float = 0.0
    first: float = 0.0
    done: int = 0
    logprob: float = 0.0
    is_probe: bool = False


def synthetic_run(
    kind: str, model: str, *, requests: int = 60, seed: int = 7, mode: str = "simulated", jitter: float = 0.0
) -> RunResults:
    """A run of ``vanilla``, ``early-exit`` or ``helios``; ``jitter`` is the relative noise of step times."""
    rng, noise = Random(seed), Random(f"{seed} {mode} {jitter}")
    arrivals: list[_Going] = []
    now = 0.0
    for i in range(requests):
        now += rng.expovariate(45)
        task = TASKS[i * len(TASKS) // requests]
        arrivals.append(_Going(i, tick(now), rng.randint(12, 80), rng.randint(8, 40), task))
    recorder = TableRecorder()
    plan = _plan(kind, model, requests)
    tasks = {a.id: a.task for a in arrivals}
    _serve(recorder, arrivals, plan, kind, rng, noise, jitter)
    yaml = (
        f"schema_version: 1\nname: {kind} {model}\nseed: {seed}\nmemory:\n  budget_bytes: {BUDGET}\n"
        f"controller:\n  kind: {kind}\n  threshold: 0.8\n"
    )
    info = RunInfo(
        name=f"{kind} {model}",
        mode="simulated" if mode == "simulated" else "live",
        clock="simulated" if mode == "simulated" else "cpu",
        seed=seed,
        scenario_hash="5ce0a1" * 4,
        profile_hash="9f0f11e" * 4,
        versions={"heliosim": "0.1.0", "python": "3.11"},
    )
    return RunResults.of(recorder, info, yaml, tasks=tasks, host={"wall_s": 1.0, "cpu_s": 0.9})


def synthetic_systems(requests: int = 60, repeats: int = 3, names: Sequence[str] = ()) -> list[SystemResult]:
    """Four systems, each simulated once and measured ``repeats`` times."""
    table = [("vanilla", m) for m in LAYERS] + [("early-exit", "tiny-opt-m"), ("helios", "tiny-opt-s")]
    systems = []
    for kind, model in table:
        name = "HELIOS" if kind == "helios" else f"{kind} {model}"
        if names and name not in names:
            continue
        live = [
            synthetic_run(kind, model, requests=requests, mode="live", jitter=0.04 + 0.01 * i) for i in range(repeats)
        ]
        slo = Slo(ttft_ms=60, tpot_ms=8)
        systems.append(SystemResult(name, synthetic_run(kind, model, requests=requests), live, "cpu", slo=slo))
    return systems


def _plan(kind: str, model: str, requests: int) -> list[tuple[int, Placement, bool, str]]:
    """(from how many admitted requests, placement, is probe, reason)."""
    if kind != "helios":
        return [(0, Placement(model, LAYERS[model]), False, "serve")]
    s, m = "tiny-opt-s", "tiny-opt-m"
    return [
        (0, Placement(s, 8), True, "evaluate"),
        (5, Placement(m, 12), True, "evaluate"),
        (10, Placement(s, 2), False, "choose"),
        (requests // 2, Placement(m, 3), False, "switch"),
        (3 * requests // 4, Placement(m, 12), False, "load"),
    ]


def _serve(
    recorder: TableRecorder,
    arrivals: list[_Going],
    plan: list[tuple[int, Placement, bool, str]],
    kind: str,
    rng: Random,
    noise: Random,
    jitter: float,
) -> None:
    now, admitted, breaches, is_probing = 0.0, 0, 0, False
    waiting = list(arrivals)
    running: list[_Going] = []
    placement: Placement | None = None
    while waiting or running:
        if not running and waiting[0].arrival > now:
            now = waiting[0].arrival
        _, wanted, is_probe, reason = [p for p in plan if p[0] <= admitted][-1]
        if wanted != placement and not running:
            placement, breaches, is_probing = wanted, 0, is_probe
            seconds = tick(0.006 * wanted.depth)
            now += seconds
            outcome = Outcome(seconds)
            recorder.tokens(now, Load(wanted, 100, reason), outcome)
            recorder.step(_step(now, outcome, "load", reason, wanted, 0, 0, 0, 0, 0, False, 0))
        assert placement is not None
        prefill = 0
        limit = min([p[0] for p in plan if p[0] > admitted], default=10**9)
        while wanted == placement and waiting and waiting[0].arrival <= now and len(running) < 8 and admitted < limit:
            going = waiting.pop(0)
            going.admitted, going.is_probe = now, is_probe
            prefill += going.prompt
            admitted += 1
            running.append(going)
        exits, confidences, agrees = _leave(running, placement, kind, rng)
        ran = placement.depth if prefill or not exits else max(exits)
        seconds = (0.0004 * ran + 0.0002 * len(running) + 0.00002 * prefill) * (1 + jitter * (noise.random() - 0.4))
        outcome = Outcome(tick(seconds), layers_run=ran)
        now += outcome.seconds
        lasts = []
        for going, confidence in zip(running, confidences, strict=True):
            going.first = going.first or now
            going.done += 1
            going.logprob += math.log(confidence)
            lasts.append(going.done == going.output)
        tokens = Tokens(
            requests=tuple(g.id for g in running),
            exit_layers=tuple(exits),
            confidences=tuple(confidences),
            logprobs=tuple(math.log(c) for c in confidences),
            lasts=tuple(lasts),
            agrees=tuple(agrees),
        )
        breaches += sum(c < 0.8 for c in confidences) if placement.depth < LAYERS[placement.model] else 0
        breaches = int(breaches * 0.97)
        batch = Batch(tokens.requests, (0,) * len(running), (1,) * len(running), (True,) * len(running))
        run = Run(placement, ExitRule("greedy"), batch, is_probe=is_probing)
        outcome = Outcome(outcome.seconds, tokens, ran)
        recorder.tokens(now, run, outcome)
        rows, kv = len(running), sum(g.prompt + g.done for g in running) * placement.depth * 900
        for going in [g for g, last in zip(running, lasts, strict=True) if last]:
            running.remove(going)
            recorder.served(_served(going, now, placement))
        late = sum(1 for w in waiting if w.arrival <= now)
        step = _step(now, outcome, "run", "", placement, ran, rows, prefill, kv, breaches, run.is_probe, late)
        recorder.step(step)


def _leave(
    running: list[_Going], placement: Placement, kind: str, rng: Random
) -> tuple[list[int], list[float], list[bool]]:
    exits, confidences, agrees = [], [], []
    for going in running:
        hard = 0.15 * TASKS.index(going.task)
        leave = placement.depth
        ladder = [e for e in EXITS[placement.model] if e <= placement.depth]
        for exit_layer in ladder:
            share = exit_layer / LAYERS[placement.model]
            confidence = min(0.999, max(0.05, rng.betavariate(2 + 3 * share, 1.2) * (1.1 - hard / 2)))
            if confidence >= 0.8 and kind != "vanilla":
                leave = exit_layer if placement.depth == LAYERS[placement.model] else placement.depth
                break
        is_full = leave == LAYERS[placement.model]
        exits.append(leave)
        confidences.append(confidence)
        agrees.append(is_full or rng.random() < 0.72 + 0.26 * confidence)
    return exits, confidences, agrees


def _served(going: _Going, now: float, placement: Placement) -> Served:
    return Served(
        id=going.id,
        arrival_s=going.arrival,
        admitted_s=going.admitted,
        first_token_s=going.first,
        finish_s=now,
        prompt_tokens=going.prompt,
        max_tokens=64,
        output_tokens=going.done,
        status="finished",
        logprob_sum=going.logprob,
        is_probe=going.is_probe,
        placement=placement,
    )


def _step(
    now: float,
    outcome: Outcome,
    kind: str,
    reason: str,
    placement: Placement,
    layers_run: int,
    rows: int,
    prefill: int,
    kv: int,
    breaches: int,
    is_probe: bool,
    waiting: int,
) -> StepRecord:
    weights = 1_200_000 + placement.depth * 900_000
    return StepRecord(
        start_s=now - outcome.seconds,
        seconds=outcome.seconds,
        kind="load" if kind == "load" else "run",
        reason=reason,
        model=placement.model,
        depth=placement.depth,
        layers_run=layers_run,
        rows=rows,
        decode_rows=rows,
        prefill_tokens=prefill,
        tokens_out=len(outcome.tokens),
        waiting=waiting,
        running=rows,
        weights_bytes=weights,
        kv_used_bytes=kv,
        kv_total_bytes=BUDGET - weights,
        breaches=breaches,
        is_probe=is_probe,
        energy_j=None,
    )
