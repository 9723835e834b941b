"""`heliosim demo`: measured, simulated, executed, compared, in one command on the machine at hand."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from heliosim.console import console, progress_bar
from heliosim.errors import UnknownNameError
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint
from heliosim.formats.profile import Profile, load_profile
from heliosim.metrics import SystemResult
from heliosim.profile_view import show_premises

from .calibrate import Request, calibrate
from .device import resolve_device
from .experiment import Bench, Measured, saturated, save_all, workload, write_workload
from .fit import fitted_cells

PAIRS = {"opt": ("tiny-opt-s", "tiny-opt-l"), "llama": ("tiny-llama-s", "tiny-llama-l")}
LOAD = 0.7
"""Arrival rate as a share of what the slowest system is predicted to sustain."""


def run_demo(out: Path, *, pair: str, requests: int, repeats: int, device: str, seed: int) -> None:
    """Run everything into ``out``. A finished demo there is moved to ``out/previous``; an interrupted one goes on
    behind its calibration.
    """
    if pair not in PAIRS:
        raise UnknownNameError("--pair", pair, PAIRS)
    began = time.perf_counter()
    say = console().print
    if (out / "report.html").exists():
        _keep_previous(out)
        say(f"The demo that was finished here is kept in {out / 'previous'}.")
    say(f"[bold]1 · Calibrate[/] {' and '.join(PAIRS[pair])} inside the real serving loop")
    profile = _profile(out / "profile", pair, device, seed)
    show_premises(profile)

    trace = out / "workload.jsonl"
    write_workload(trace, profile, requests, seed)
    bench = Bench(profile, seed, device)
    rate = LOAD * predicted_capacity(bench, trace)
    say(f"\n[bold]2 · Simulate[/] {requests} requests in four task blocks, {rate:.1f} requests/s, five systems")
    items = [bench.predict(name, workload(trace, rate)) for name in bench.systems]

    say(f"[bold]3 · Run live[/] the same scenarios on the torch engine, {repeats} repeats each")
    with progress_bar("Live") as progress:
        _execute(bench, trace, items, repeats, progress)
    parity = {item.name: bench.has_parity(item) for item in items}
    save_all(items, out / "runs")

    say("[bold]4 · Compare[/]\n")
    results = [as_system(item) for item in items]
    from heliosim.tables import print_comparison

    print_comparison(results)
    _say_drift(bench, items)
    same = sum(parity.values())
    say(
        f"Parity: fed live outcomes, the simulated driver asks for the same actions in {same} of {len(parity)} systems."
    )
    report = out / "report.html"
    _write_report(report, results, profile, parity, out)
    say("\nTry next:")
    for line in next_commands(out):
        say(f"  {line}", soft_wrap=True)
    say(f"\nReport: [bold]{report}[/]   ({time.perf_counter() - began:.0f} s in all)")


def _keep_previous(out: Path) -> None:
    """Move what an earlier demo finished out of the way; only the one before that is given up."""
    previous = out / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for part in ("profile", "runs", "workload.jsonl", "report.html"):
        if (out / part).exists():
            (out / part).rename(previous / part)


def _say_drift(bench: Bench, items: Sequence[Measured]) -> None:
    """How the machine ran against its calibration: the first thing to know about the errors above."""
    ratios = [ratio for item in items for ratio in bench.step_time_ratios(item)]
    mean = sum(ratios) / len(ratios)
    text = f"Live steps took {mean:.2f} of the time the profile expects ({min(ratios):.2f} to {max(ratios):.2f})"
    if abs(mean - 1) > 0.05:
        text += ": the machine has changed since it was calibrated, and TPOT, TTFT and E2E are off by at least that"
    console().print(text + ".")


def predicted_capacity(bench: Bench, trace: Path) -> float:
    """Requests per second that the slowest system completes when everything waits, as simulated."""
    rates = [bench.predict(name, saturated(trace)).predicted.request_throughput for name in bench.systems]
    return min(rate for rate in rates if rate)


def as_system(item: Measured) -> SystemResult:
    return SystemResult(item.name, item.simulated, [run.results for run in item.live], clock=item.scenario.clock)


def next_commands(out: Path) -> list[str]:
    """What to try next, as shell lines that work as they stand."""
    me = "heliosim" if shutil.which("heliosim") else os.path.relpath(Path(sys.executable).parent / "heliosim")
    return [
        f"{me} profile show {out}/profile",
        f"{me} example --profile {out}/profile --out {out}/example --overwrite",
        f"{me} run {out}/example/helios.yaml --out {out}/mine --overwrite",
        f"{me} compare {out}/runs/helios-simulated {out}/runs/helios-live-1",
    ]


def _profile(folder: Path, pair: str, device: str, seed: int) -> Profile:
    """Calibrate, or take up the profile an interrupted demo left complete."""
    if (folder / "profile.json").exists():
        profile = load_profile(folder)
        if is_reusable(profile, PAIRS[pair], device, seed):
            console().print(f"  going on with the profile in {folder} (delete the folder to measure again)")
            return profile
    request = Request(
        models=PAIRS[pair],
        out=folder,
        device=device,
        max_batch=16,
        rounds=3,
        prompts_per_task=24,
        seed=seed,
        overwrite=True,
    )
    with progress_bar("Calibrating") as progress:
        return calibrate(request, progress)


def is_reusable(profile: Profile, models: Sequence[str], device: str, seed: int) -> bool:
    """Whether a profile found where one should go is of these models, weights, device and seed."""
    facts = profile.facts
    if sorted(facts.models) != sorted(models) or facts.seed != seed:
        return False
    if facts.device.get("device") != resolve_device(device):
        return False
    return all(
        inspect_checkpoint(checkpoint_path(n), m.dtype).weights_sha256() == m.weights_sha256
        for n, m in facts.models.items()
    )


def _execute(
    bench: Bench, trace: Path, items: list[Measured], repeats: int, progress: Callable[[str, float], None]
) -> None:
    """All systems in turn, once per repeat, so that a drift of the machine meets all alike."""
    progress("warming up", 0.0)
    bench.warm_up(trace)
    total = repeats * len(items)
    for k in range(repeats):
        for i, item in enumerate(items):
            progress(f"{item.name}, repeat {k + 1} of {repeats}", (k * len(items) + i) / total)
            bench.execute(item, 1)


def _write_report(
    path: Path, results: list[SystemResult], profile: Profile, parity: dict[str, bool], out: Path
) -> None:
    from heliosim.report import demo_report

    device = profile.facts.device
    cells = fitted_cells(profile, profile.clock())
    facts: dict[str, Any] = {
        "device": str(device.get("gpu") or device.get("host_cpu")),
        "threads": str(device.get("threads")),
        "models": ", ".join(profile.facts.models),
        "profile": profile.hash[:12],
        "clock": results[0].clock,
        "versions": ", ".join(f"{k} {v}" for k, v in sorted(profile.facts.versions.items())),
        "parity": f"{sum(parity.values())} of {len(parity)} systems: same actions when live outcomes are replayed",
    }
    facts["step_fit"] = {**cells, "caption": f"{len(cells['groups'])} cells, mean of at least 20 steps each"}
    demo_report(path, results, facts, profile.facts.premises, next_commands(out))
