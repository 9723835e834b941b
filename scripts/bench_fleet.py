"""What a fleet costs to simulate: CPU seconds per request of 8 replicas at 80 requests/s beside one at 10 requests/s.

The workload is that of ``bench.py``, arriving as many times as fast as there are replicas, metrics and per-step records
on, a process of its own for each case. Either every replica serves ``--requests``, so that both sides simulate the same
time and fill and drain their servers alike, or with ``--same-total`` the fleet shares them, and its servers are filled
and drained eight times over for the same number of requests.

    python scripts/bench_fleet.py [--requests 16000] [--replicas 8] [--router least-outstanding] [--same-total]

``simulate_fleet`` is one case, to be called from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=16_000)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--router", default="least-outstanding")
    parser.add_argument("--same-total", action="store_true", help="the fleet shares the requests")
    parser.add_argument("--case", type=int, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(simulate_fleet(given.requests, given.case, given.router)))
        return
    totals = {n: given.requests * (1 if given.same_total else max(1, n)) for n in (0, 1, given.replicas)}
    print_rows(measure(totals, given.router), totals, given.router)


def measure(totals: dict[int, int], router: str) -> list[tuple[int, dict[str, float]]]:
    """One server (0), a fleet of one and the fleet, each in a process of its own; the least of three runs in turn.

    ``totals``: requests by number of replicas.
    """
    found: dict[int, list[dict[str, float]]] = {}
    for _ in range(3):
        for count, requests in totals.items():
            command = [sys.executable, __file__, "--case", str(count), "--requests", str(requests), "--router", router]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            found.setdefault(count, []).append(json.loads(done.stdout))
    return [(count, min(runs, key=lambda run: run["driver_cpu_s"])) for count, runs in found.items()]


def simulate_fleet(requests: int, replicas: int, router: str = "least-outstanding") -> dict[str, float]:
    """Simulate ``requests`` requests on that many replicas at 10 requests/s each; 0: one server without a fleet."""
    from functools import partial

    import bench

    from heliosim.costs import LOAD_TERMS
    from heliosim.engines.sim import SimEngine
    from heliosim.fleet import FleetRun
    from heliosim.fleet_tables import merged
    from heliosim.formats.results import RunInfo, RunResults
    from heliosim.metrics import summarise
    from heliosim.recorder import TableRecorder
    from heliosim.registry import ROUTERS
    from heliosim.replica import Life
    from heliosim.runs import ANY_STRIDE
    from heliosim.serving.batcher import ContinuousBatcher
    from heliosim.serving.controller import vanilla
    from heliosim.serving.memory import MemoryPool
    from heliosim.serving.server import Server
    from heliosim.simulate import simulate_server
    from heliosim.streams import stream
    from heliosim.types import Arrival, Content, Request, tick
    from heliosim.workload import OpenLoop

    spec = bench.model("7b", 32, 4096, (8, 16, 24, 32))
    costs = {spec.name: bench.roofline(spec)}
    loads = {spec.name: dict.fromkeys(LOAD_TERMS, 0.0) | {"weights_byte": 1 / 20e9}}
    rate = bench.RATE_PER_S * max(1, replicas)
    times = stream(0, "arrivals").exponential(1 / rate, requests).cumsum().tolist()
    lengths = stream(0, "lengths").integers(*bench.OUTPUT_TOKENS, requests, endpoint=True).tolist()
    arrivals = [
        Arrival(Request(k, tick(t), bench.PROMPT_TOKENS, bench.OUTPUT_TOKENS[1]), Content("", None, n))
        for k, (t, n) in enumerate(zip(times, lengths, strict=True))
    ]

    def begin(name: str) -> Life:
        recorder = TableRecorder(keep_tokens=False, replica=name)
        batcher = ContinuousBatcher(bench.MAX_BATCH, bench.TOKEN_BUDGET)
        server = Server(vanilla(spec), batcher, MemoryPool(72 * 10**9), {spec.name: spec}, recorder, ANY_STRIDE)
        return Life(server, SimEngine({spec.name: spec}, costs, loads, None, seed=0, strides=True), recorder)

    started = time.process_time()
    if replicas == 0:
        alone = begin("replica-0")
        simulate_server(alone.server, alone.engine, OpenLoop(arrivals))
        tables = alone.recorder.tables({})
    else:
        members = [(f"r-{k}", lambda life, name=f"r-{k}": begin(name)) for k in range(replicas)]
        nobody = TableRecorder(keep_tokens=False, replica=None)
        made = ROUTERS.get(router)(partial(stream, 0, "router"))
        run = FleetRun(members, made, OpenLoop(arrivals), recorder=nobody)
        run.run()
        lives = [life.recorder for replica in run.replicas for life in replica.lives]
        tables = merged((*lives, nobody), run.retries, {})
    ran = time.process_time()
    info = RunInfo(
        name="bench", mode="simulated", clock="simulated", seed=0, scenario_hash="", profile_hash="", versions={}
    )
    summary = summarise(RunResults(info, "", tables.requests, tables.steps, tables.tokens, tables.events))
    return {
        "process_cpu_s": time.process_time(),
        "driver_cpu_s": ran - started,
        "summary_cpu_s": time.process_time() - ran,
        "steps": summary.steps,
        "tokens": summary.total_output_tokens,
        "mean_ttft_ms": summary.mean_ttft_ms or 0.0,
    }


def per_request_us(row: dict[str, float], requests: int) -> tuple[float, float]:
    """CPU microseconds per request of the whole process, and of running and summarising alone."""
    return 1e6 * row["process_cpu_s"] / requests, 1e6 * (row["driver_cpu_s"] + row["summary_cpu_s"]) / requests


def print_rows(rows: list[tuple[int, dict[str, float]]], totals: dict[int, int], router: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"10 requests per second and replica, {router} router; µs of CPU per request")
    table.add_column("case")
    for name in (
        "requests",
        "whole process",
        "of one server",
        "without start-up",
        "of one server",
        "steps per request",
        "TTFT ms",
    ):
        table.add_column(name, justify="right")
    whole_first, run_first = per_request_us(rows[0][1], totals[rows[0][0]])
    for replicas, row in rows:
        whole, run = per_request_us(row, totals[replicas])
        cells = [f"{totals[replicas]:,}", f"{whole:.1f}", f"{whole / whole_first:.2f}x", f"{run:.1f}"]
        cells += [f"{run / run_first:.2f}x", f"{row['steps'] / totals[replicas]:.2f}", f"{row['mean_ttft_ms']:.1f}"]
        table.add_row("one server" if not replicas else f"fleet of {replicas}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
