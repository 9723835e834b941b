"""How fast the simulator is: CPU seconds, memory and start-up of whole processes, beside a bare SimPy loop.

The workload: Poisson arrivals at 10 requests/s, prompts of 512 tokens, outputs uniform on 128 to 256, one replica of a
7B model on an A100-80GB (a roofline, not a measurement), batches of up to 128 rows, 512 tokens per step with chunked
prefill, per-request metrics and per-step records on. ``exits`` adds a second model, per-token exits and HELIOS.

Behind that: 8 replicas at 80 requests/s beside one server at 10, and what a warm process takes to answer a what-if of
2,000 requests with exits (``run_simulated`` and ``summarise`` of a HELIOS scenario on the shipped derived profile).

    python scripts/bench.py [--sizes 1000,16000] [--json FILE]

Times are machine-dependent; the ratios to the bare loop, which runs in turn with the rest, are what to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bench_fleet

RATE_PER_S, PROMPT_TOKENS, OUTPUT_TOKENS = 10.0, 512, (128, 256)
MAX_BATCH, TOKEN_BUDGET = 128, 512
CASES = ("bare-simpy", "no-exits", "exits")
TEXT_TOKENS, TEXTS = 256, 64
FLEET_REQUESTS, FLEET_REPLICAS, FLEET_ROUTERS = 16_000, 8, ("round-robin", "least-outstanding")
WHAT_IF = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="1000,16000,100000", help="numbers of requests")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    parser.add_argument("--case", choices=CASES, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run_case(given.case, given.requests)))
        return
    rows = [measure(case, int(size)) for size in given.sizes.split(",") for case in CASES]
    print_rows(rows)
    totals = {count: FLEET_REQUESTS * max(1, count) for count in (0, 1, FLEET_REPLICAS)}
    fleets = {router: bench_fleet.measure(totals, router) for router in FLEET_ROUTERS}
    for router, measured in fleets.items():
        bench_fleet.print_rows(measured, totals, router)
    answer_s = what_if()
    print(f"a what-if of {WHAT_IF:,} requests with exits and HELIOS, warm: {answer_s:.2f} CPU s")
    if given.json:
        given.json.write_text(json.dumps({"runs": rows, "fleets": fleets, "what_if_cpu_s": answer_s}, indent=1) + "\n")


def measure(case: str, requests: int) -> dict[str, float | str]:
    """One case in a process of its own: what it reports, its CPU seconds and its peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--case", case, "--requests", str(requests)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"case": case, "requests": requests, "process_cpu_s": cpu, **found}


def run_case(case: str, requests: int) -> dict[str, float]:
    run = {"bare-simpy": bare_simpy, "no-exits": no_exits, "exits": with_exits}[case]
    started = time.process_time()
    counts = run(requests)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "start_up_cpu_s": counts.pop("ready_s"),
        "run_cpu_s": time.process_time() - started,
        "peak_bytes": peak,
    } | counts


def bare_simpy(requests: int) -> dict[str, float]:
    """The same arrivals and lengths; every step is one timeout and a few additions. No memory, no records, no exits."""
    import simpy

    from heliosim.streams import stream

    ready = time.process_time()
    times = stream(0, "arrivals").exponential(1 / RATE_PER_S, requests).cumsum().tolist()
    lengths = stream(0, "lengths").integers(*OUTPUT_TOKENS, requests, endpoint=True).tolist()
    env = simpy.Environment()
    counted = {"steps": 0, "tokens": 0}

    def serve() -> object:
        at, context, reading, tick = 0, 0, 0, 0
        decoding: list[tuple[int, int]] = []  # last tick, tokens in KV then
        while at < requests or decoding:
            if not decoding and not reading and times[at] > env.now:
                yield env.timeout(times[at] - env.now)
            budget = TOKEN_BUDGET - len(decoding)
            joining = []
            while at < requests and times[at] <= env.now and len(decoding) + len(joining) < MAX_BATCH and budget > 0:
                count = min(budget, PROMPT_TOKENS - reading)
                reading, budget = reading + count, budget - count
                if reading == PROMPT_TOKENS:
                    joining.append(lengths[at])
                    reading, at = 0, at + 1
            tick += 1
            yield env.timeout(0.0075 + 7.1e-5 * (TOKEN_BUDGET - budget) + 2.6e-7 * context)
            counted["steps"] += 1
            counted["tokens"] += len(decoding) + len(joining)
            context += len(decoding) + PROMPT_TOKENS * len(joining)
            context -= sum(kv for end, kv in decoding if end <= tick)
            decoding = [row for row in decoding if row[0] > tick]
            decoding += [(tick + n - 1, PROMPT_TOKENS + n - 1) for n in joining]

    env.process(serve())
    env.run()
    return {"ready_s": ready, **counted}


def model(name: str, layers: int, hidden: int, exits: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from heliosim.types import ModelSpec

    return ModelSpec(
        name=name, layers=layers, exits=exits, kind="anywhere", layer_bytes=24 * hidden * hidden,
        base_bytes=4 * 32_000 * hidden, kv_bytes_per_token_layer=4 * hidden, hidden_bytes=2 * hidden,
        max_context=4096, vocabulary="llama",
    )  # fmt: skip


def roofline(spec):  # type: ignore[no-untyped-def]
    """Step cost of a model on 2.0 TB/s and 190 TFLOP/s: weights once per step, arithmetic per token, KV per context."""
    from heliosim.costs import TERMS, StepCost

    seconds = dict.fromkeys(TERMS, 0.0) | {
        "step": 1e-3,
        "row": 2e-6,
        "layer": spec.layer_bytes / 2.0e12,
        "layer_token_more": spec.layer_bytes / 190e12,
        "layer_decode_kv": spec.kv_bytes_per_token_layer / 2.0e12,
        "layer_prefill_kv": spec.kv_bytes_per_token_layer / 100e12,
        "check": 1.5e-4,
    }
    return StepCost(tuple(seconds[t] for t in TERMS), 4096, 4096, 8192)


def arrivals(requests: int):  # type: ignore[no-untyped-def]
    from heliosim.streams import stream
    from heliosim.types import Arrival, Content, Request, tick

    times = stream(0, "arrivals").exponential(1 / RATE_PER_S, requests).cumsum().tolist()
    lengths = stream(0, "lengths").integers(*OUTPUT_TOKENS, requests, endpoint=True).tolist()
    return [
        Arrival(Request(k, tick(t), PROMPT_TOKENS, OUTPUT_TOKENS[1]), Content("", None, n))
        for k, (t, n) in enumerate(zip(times, lengths, strict=True))
    ]


def no_exits(requests: int) -> dict[str, float]:
    """Vanilla decoding of one model; no behaviour, so no token is recorded."""
    from heliosim.serving.controller import vanilla

    spec = model("7b", 32, 4096, (8, 16, 24, 32))
    return simulate(requests, vanilla(spec), {spec.name: spec}, None)


def with_exits(requests: int) -> dict[str, float]:
    """HELIOS over a 7B and a 3B model with per-token exits replayed from made-up texts."""
    import numpy as np

    from heliosim.behaviour import Behaviour, Text
    from heliosim.serving.helios import Helios, HeliosParameters
    from heliosim.serving.repository import Candidate, Performance, Repository

    specs = {s.name: s for s in (model("7b", 32, 4096, (8, 16, 24, 32)), model("3b", 28, 3072, (7, 14, 21, 28)))}
    rng = np.random.default_rng(1)
    texts = {}
    for name, spec in specs.items():
        for source in (f"{name}:threshold", f"{name}:full", *(f"{name}:greedy@{e}" for e in spec.exits[:-1])):
            for k in range(TEXTS):
                hard = rng.random(TEXT_TOKENS)
                confidence = {
                    f"{n}@{e}": np.clip(1.15 - hard * (1.2 - e / s.layers), 0, 1).astype(np.float32)
                    for n, s in specs.items() for e in s.exits
                }  # fmt: skip
                agrees = {key: c > 0.5 for key, c in confidence.items()}
                texts[f"text-{k}", source] = Text("", PROMPT_TOKENS, TEXT_TOKENS, None, confidence, agrees)
    behaviour = Behaviour(texts, {"": [f"text-{k}" for k in range(TEXTS)]}, {n: s.exits for n, s in specs.items()})
    offline = {
        n: {e: Performance(1000.0 * s.layers / e, 0.1, 1.5 + (s.layers - e) / 100, None) for e in s.exits}
        for n, s in specs.items()
    }
    shares = {n: behaviour.exit_shares(n, f"{n}:threshold", 0.8) for n in specs}
    candidates = {n: Candidate(s, offline[n], shares[n]) for n, s in specs.items()}
    repository = Repository(candidates, 80 * 10**9, lambda _old, _new: 0.5)
    return simulate(requests, Helios(repository, HeliosParameters()), specs, behaviour)


def simulate(requests: int, controller, specs, behaviour) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from heliosim.costs import LOAD_TERMS
    from heliosim.engines.sim import SimEngine
    from heliosim.formats.results import RunInfo, RunResults
    from heliosim.metrics import summarise
    from heliosim.recorder import TableRecorder
    from heliosim.runs import ANY_STRIDE
    from heliosim.serving.batcher import ContinuousBatcher
    from heliosim.serving.memory import MemoryPool
    from heliosim.serving.server import Server
    from heliosim.simulate import simulate_server
    from heliosim.workload import OpenLoop

    ready = time.process_time()
    costs = {n: roofline(s) for n, s in specs.items()}
    loads = {n: dict.fromkeys(LOAD_TERMS, 0.0) | {"weights_byte": 1 / 20e9} for n in specs}
    engine = SimEngine(specs, costs, loads, behaviour, seed=0, strides=True)
    recorder = TableRecorder(keep_tokens=False)
    batcher = ContinuousBatcher(MAX_BATCH, TOKEN_BUDGET)
    server = Server(controller, batcher, MemoryPool(72 * 10**9), specs, recorder, ANY_STRIDE)
    simulate_server(server, engine, OpenLoop(arrivals(requests)))
    info = RunInfo(
        name="bench", mode="simulated", clock="simulated", seed=0, scenario_hash="", profile_hash="", versions={}
    )
    summary = summarise(RunResults.of(recorder, info, "", tasks={}, host={}))
    return {"ready_s": ready, "steps": summary.steps, "tokens": summary.total_output_tokens}


def what_if() -> float:
    """CPU seconds of the second of two answers in this process."""
    from heliosim.metrics import summarise
    from heliosim.profile_view import open_profile
    from heliosim.runs import run_simulated
    from heliosim.scenario import Scenario

    profile = open_profile("llama2-a100-80gb")
    lengths = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": {"kind": "uniform", "low": 128, "high": 256}}
    scenario = Scenario(
        name="what-if",
        profile="llama2-a100-80gb",
        models=tuple(profile.facts.models),
        workload={
            "requests": WHAT_IF,
            "arrivals": {"kind": "poisson", "rate_per_s": RATE_PER_S},
            "tasks": [{"task": "chat", **lengths}],
        },
        memory={"budget_bytes": "72 GB"},
        batcher={"max_batch": MAX_BATCH, "token_budget": TOKEN_BUDGET},
        controller={"kind": "helios"},
        clock="wall",
    )
    for _ in range(2):
        started = time.process_time()
        summarise(run_simulated(scenario, profile))
    return time.process_time() - started


def print_rows(rows: list[dict[str, float | str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Simulator speed, whole processes")
    headers: tuple[str, ...] = ("case", "requests", "CPU s", "of the bare loop", "start-up, CPU s")
    headers += ("requests per CPU s", "steps per CPU s", "tokens per CPU s", "kB per request")
    for name in headers:
        table.add_column(name, justify="left" if name == "case" else "right")
    least = {case: min(float(r["peak_bytes"]) for r in rows if r["case"] == case) for case in CASES}
    for row in rows:
        bare = next(r for r in rows if (r["case"], r["requests"]) == (CASES[0], row["requests"]))
        cpu, requests = float(row["process_cpu_s"]), float(row["requests"])
        memory = (float(row["peak_bytes"]) - least[str(row["case"])]) / requests
        ratio, start_up = cpu / float(bare["process_cpu_s"]), float(row["start_up_cpu_s"])
        rates = [f"{float(count) / cpu:,.0f}" for count in (requests, row["steps"], row["tokens"])]
        cells = [f"{requests:,.0f}", f"{cpu:.2f}", f"{ratio:.2f}x", f"{start_up:.2f}", *rates, f"{memory / 1e3:.1f}"]
        table.add_row(str(row["case"]), *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
