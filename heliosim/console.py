"""What the command line prints: progress, a run's summary, comparisons, the doctor's findings."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from heliosim.errors import InputError
from heliosim.tables import counted, percent

if TYPE_CHECKING:
    from rich.console import Console

    from heliosim.formats.profile import ProfileKind
    from heliosim.formats.results import RunInfo, RunResults
    from heliosim.metrics import Slo, Summary
    from heliosim.runs import LiveRun
    from heliosim.scenario import Scenario

NARROWEST, USUAL = 60, 120


@cache
def console() -> Console:
    """Standard output; 120 columns when it is no terminal, so that piped tables keep their shape."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", USUAL))
    return Console(width=width, highlight=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A progress line on standard error; yields ``report(what, share)``. Without a terminal: a line per tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    err = Console(stderr=True)
    if not err.is_terminal:
        yield _plain_progress(title)
        return
    columns = (
        TextColumn(f"[bold]{title}[/]"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    # No refresh thread: its processor time would be charged to the steps of a live run.
    described = TextColumn("{task.description}")
    with Progress(*columns, described, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1.0)

        def report(what: str, share: float) -> None:
            bar.update(task, completed=share, description=what, refresh=True)

        yield report


def _plain_progress(title: str) -> Callable[[str, float], None]:
    last = -1

    def report(what: str, share: float) -> None:
        nonlocal last
        tenth = int(share * 10)
        if tenth > last:
            last = tenth
            sys.stderr.write(f"{title}: {share:4.0%} {what}\n")
            sys.stderr.flush()

    return report


def run_progress(
    report: Callable[[str, float], None], horizon_s: float | None, every_s: float = 1.0
) -> Callable[[float], None]:
    """Turns a driver's times into progress, one report per ``every_s``. ``horizon_s``: last arrival, if known."""
    import time

    due = time.monotonic() + every_s

    def on_progress(now: float) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        due = time.monotonic() + every_s
        report(f"{now:.1f} s on the run's clock", min(0.99, now / horizon_s) if horizon_s else 0.0)

    return on_progress


def now_and_then(report: Callable[[str, float], None], every_s: float = 1.0) -> Callable[[str, float], None]:
    """Progress at most once per ``every_s``, so that what is quick says nothing."""
    import time

    due = time.monotonic() + every_s

    def on_progress(what: str, share: float) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + every_s
            report(what, share)

    return on_progress


def say_derived(scenarios: Iterable[Scenario]) -> None:
    """Say it if any of these rests on a profile that was not measured."""
    from heliosim.vary import of_groups

    say_derived_profiles({group.profile for scenario in scenarios for group in of_groups(scenario)})


def say_derived_profiles(named: Iterable[str]) -> None:
    """Say it if one of these profiles was not measured."""
    from heliosim.profile_view import open_profile

    for kind in sorted({open_profile(name).facts.kind for name in named}):
        say_kind(kind)


def say_kind(kind: ProfileKind) -> None:
    """Say it if figures rest on a profile of a kind that was not measured."""
    from heliosim.formats.profile import CAUTIONS

    if kind in CAUTIONS:
        console().print(f"[yellow]{CAUTIONS[kind]}[/]")


def say_replayed(runs: Iterable[RunInfo]) -> None:
    """Say it if exits of runs were replayed."""
    from heliosim.formats.results import replay_caution

    if caution := replay_caution(runs):
        console().print(f"[yellow]{caution}[/]")


def print_summary(run: RunResults | LiveRun, slo: Slo | None) -> None:
    """The metrics of one run, one per line, best known first."""
    from rich.table import Table

    from heliosim.metrics import metric_spec, summarise
    from heliosim.runs import LiveRun

    results = run.results if isinstance(run, LiveRun) else run
    summary = summarise(results, slo=slo)
    print_refused_first(results, summary)
    table = Table(
        title=f"{results.info.name} · {results.info.mode}{', exits replayed' if results.info.replayed_exits else ''}, "
        f"{results.info.clock} clock, seed {results.info.seed}"
    )
    table.add_column("metric")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit")
    for name in (
        "offered", "completed", "refused", "duration", "output_throughput", "total_token_throughput",
        "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "mean_e2el_ms", "p99_e2el_ms",
        "mean_queue_ms", "slo_attainment", "request_goodput", "mean_batch_size", "max_batch_size", "peak_weights_bytes",
        "peak_kv_bytes", "layers_per_token", "low_confidence_share", "perplexity", "agreement", "transitions",
        "probe_request_share", "preemptions", "recomputed_tokens", "energy_j", "joules_per_token",
        "wh_per_prompt", "utilisation",
    ):  # fmt: skip
        spec, value = metric_spec(name), summary.value(name)
        if name in ("slo_attainment", "request_goodput") and slo is None:
            continue
        unavailable = "unavailable" if name == "energy_j" and value is None else spec.text(value)
        table.add_row(spec.label, unavailable, spec.unit)
    console().print(table)
    if (line := growth_line(results)) is not None:
        console().print(line)
    say_kind(results.info.profile_kind)
    say_quality(results.info.quality_unknown)
    say_replayed([results.info])
    say_behaviour(results.info.behaviour)
    print_details(results, summary)
    if (noise := _noise_of(results)) is not None:
        console().print(noise)


def _noise_of(results: RunResults) -> str | None:
    """What is to be said of the evaluations of a simulated HELIOS run; None of any other."""
    from heliosim.errors import HelioSimError
    from heliosim.evaluation_noise import evaluation_noise, noise_line
    from heliosim.profile_view import open_profile

    scenario = results.scenario
    kinds = (scenario.get("controller", {}).get("kind"), results.info.mode, scenario.get("fleet"))
    if kinds != ("helios", "simulated", None) or results.info.replayed_exits:
        return None
    try:
        profile = open_profile(str(scenario["profile"]))
    except HelioSimError:
        return None  # a run may be looked at where its profile is not
    return noise_line(evaluation_noise(results, profile))


def say_quality(methods: str) -> None:
    """Say it if a run's profile has no texts generated under its exit methods."""
    if methods:
        problem = f"Quality unknown under {methods}: the profile holds no texts generated so."
        remedy = "Record them with heliosim calibrate --exit-methods, or see heliosim exits compare."
        console().print(f"[yellow]{problem} {remedy}[/]")


def say_behaviour(kind: str) -> None:
    """Say it if exits were drawn from a fitted model."""
    if kind != "replay":
        console().print(f"[yellow]Exits are synthetic: drawn from a fitted model ({kind}), not replayed.[/]")


def growth_line(results: RunResults) -> str | None:
    """What to say of a run in which waiting grew to the end; None where it did not."""
    import yaml

    from heliosim.replicate import drift_of, grew, horizon_of
    from heliosim.scenario import Scenario

    scenario = Scenario.model_validate(yaml.safe_load(results.scenario_yaml))
    if not grew(results, scenario):
        return None
    gained = f"waiting grew by {drift_of(results, scenario) or 0.0:.2f} s per second of arrivals"
    if horizon_of(scenario) == "terminating":
        return f"[yellow]{gained} from beginning to end: longer days would be worse.[/]"
    return f"[yellow]saturated: {gained}, without end. Waiting times and percentiles only tell how long the run is.[/]"


def print_refused_first(results: RunResults, summary: Summary) -> None:
    """The line that must stand above all figures: most requests were refused."""
    if 2 * summary.refused > summary.offered:
        served = f"the figures are those of the {counted(summary.completed, 'request')} served"
        of = served if summary.completed else "there are no figures of any"
        console().print(
            f"[bold red]{summary.refused:,} of {counted(summary.offered, 'request')} were refused: {of}.[/]"
        )


def print_details(results: RunResults, summary: Summary) -> None:
    """What no table of one-number metrics says of a run: exits, refusals, steps outside the calibrated range."""
    from heliosim.costing import token_cost
    from heliosim.metrics import CLASS_METRICS, metric_spec

    out = console()
    for model, mix in summary.exit_mix.items():
        out.print(
            f"tokens by exit, {model}: " + "  ".join(f"layer {e}: {percent(s, signed=False)}" for e, s in mix.items())
        )
    for number, of in summary.by_class.items():
        values = [(metric_spec(name), of[name]) for name in CLASS_METRICS[1:]]
        said = ", ".join(f"{spec.label} {spec.text(value)} {spec.unit}" for spec, value in values if value is not None)
        out.print(f"class {number}, {counted(int(of['requests'] or 0), 'request')}: {said}")
    if summary.prediction_mae_tokens is not None:
        tau, error = metric_spec("prediction_tau"), metric_spec("prediction_mae_tokens")
        right = tau.text(summary.prediction_tau)
        missed = error.text(summary.prediction_mae_tokens)
        out.print(f"predicted lengths: Kendall tau {right}, mean absolute error {missed} tokens")
    if summary.energy_j:
        parts = {"reading": summary.prefill_energy_j, "decoding": summary.decode_energy_j}
        parts |= {"loads": summary.load_energy_j, "evaluations": summary.probe_energy_j}
        shares = ", ".join(f"{k} {percent((j or 0.0) / summary.energy_j, signed=False)}" for k, j in parts.items())
        idle, joules = summary.idle_energy_j, metric_spec("energy_j")
        beside = "what idle time draws is not known" if idle is None else f"beside it {joules.text(idle)} J idle"
        out.print(f"energy by cause: {shares}; {beside}")
    if results.info.deployed:
        out.print(f"cost: {token_cost(results, summary).text}")
    for reason, count in sorted(_refusals(results).items()):
        were = "was" if count == 1 else "were"
        out.print(f"[yellow]{count:,} of {counted(summary.offered, 'request')} {were} refused: {reason}.[/]")
    extrapolated = results.host.get("extrapolated_steps")
    if extrapolated:
        out.print(
            f"[yellow]{counted(extrapolated, 'step')} lay outside the calibrated range; "
            "these figures are extrapolated.[/]"
        )


def _refusals(results: RunResults) -> dict[str, int]:
    """Refused requests by reason."""
    found: dict[str, int] = {}
    table = results.requests
    for status, reason in zip(table["status"].to_pylist(), table["refusal"].to_pylist(), strict=True):
        if status == "refused":
            found[reason] = found.get(reason, 0) + 1
    return found


def print_comparison(folders: Sequence[Path], report: Path | None) -> None:
    """Compare run folders and optionally write a report. Runs of one scenario name are one system: simulated beside its
    live repeats.
    """
    from heliosim.costing import ENERGY_COLUMNS, energy_rows
    from heliosim.formats.results import load_run
    from heliosim.metrics import SystemResult
    from heliosim.tables import print_comparison as print_table

    found: dict[str, tuple[list[RunResults], list[RunResults]]] = {}
    for folder in folders:
        run = load_run(folder)
        simulated, live = found.setdefault(run.info.name, ([], []))
        (simulated if run.info.mode == "simulated" else live).append(run)
    systems = []
    for name, (simulated, live) in found.items():
        if len(simulated) > 1:
            remedy = "Give one simulated run per scenario, or rename scenarios."
            raise InputError("runs", name, f"{len(simulated)} simulated runs of one scenario", remedy)
        runs = (*simulated, *live)
        if len({(run.info.scenario_hash, run.info.profile_hash, run.info.replayed_exits) for run in runs}) > 1:
            remedy = (
                "Compare runs of one scenario, seed, clock, profile and replay, or rename the scenario that differs."
            )
            problem = "runs of this name differ in scenario, seed, clock, profile or replayed exits"
            raise InputError("runs", name, problem, remedy)
        clocks = {run.info.clock for run in live}
        if len(clocks) > 1:
            raise InputError(
                "runs", name, f"live runs on different clocks ({', '.join(sorted(clocks))})", "Compare them apart."
            )
        clock = clocks.pop() if clocks else "cpu"
        systems.append(SystemResult(name, simulated[0] if simulated else None, live, clock=clock))
    print_table(systems)
    for row in energy_rows(systems):
        cells = zip(ENERGY_COLUMNS[1:], row[1:], strict=True)
        console().print(f"{row[0]}: " + ", ".join(f"{title} {cell}" for title, cell in cells if cell is not None))
    for line in _replicated_lines(folders):
        console().print(line)
    if report is not None:
        from heliosim.report import demo_report

        demo_report(report, systems, {}, [], [], title="HelioSim: runs compared")
        console().print(f"Report written to {report}")


def _replicated_lines(folders: Sequence[Path]) -> list[str]:
    """Which of the runs are one of several replications."""
    from rich.markup import escape

    from heliosim.formats.replications import load_replications

    lines = []
    for folder in folders:
        found = load_replications(folder)
        if found is not None and found.count > 1:
            lines.append(
                f"[yellow]{escape(str(folder))} shows replication 0 alone[/], one of {found.count}: its tables are of "
                "that run. Means and intervals over all of them are in its replications.json."
            )
    return lines


def print_doctor() -> int:
    """What is installed and what this machine can do; 0 if at least the simulator works."""
    from importlib import metadata

    from rich.markup import escape
    from rich.table import Table

    table = Table(title="HelioSim doctor", title_justify="left")
    for column in ("what", "found", "needed for", "if missing"):
        table.add_column(column)
    table.add_row("Python", platform.python_version(), "everything", "3.11 or newer")
    missing = []
    for package, purpose, remedy in (
        ("simpy", "simulation", "pip install heliosim"),
        ("pyarrow", "profiles and runs", "pip install heliosim"),
        ("plotly", "reports", "pip install heliosim"),
        ("torch", "calibration and live runs", "pip install 'heliosim[live]'"),
        ("transformers", "training the tiny models, reference tests", "pip install 'heliosim[live]'"),
        ("tokenizers", "calibration and live runs", "pip install 'heliosim[live]'"),
        ("streamlit", "dashboard", "pip install 'heliosim[app]'"),
        ("distributed", "sweeps and plans on Dask", "pip install 'heliosim[dask]'"),
        ("ray", "sweeps and plans on Ray", "pip install 'heliosim[ray]'"),
        ("optuna", "heliosim tune", "pip install 'heliosim[tune]'"),
        ("duckdb", "heliosim sweep --sql", "pip install 'heliosim[sql]'"),
    ):
        try:
            table.add_row(package, metadata.version(package), purpose, "")
        except metadata.PackageNotFoundError:
            table.add_row(package, "[yellow]absent[/]", purpose, escape(remedy))
            missing.append(package)
    table.add_row("CPU cores", str(os.cpu_count()), "", "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table.add_row("memory", f"{memory / 2**30:.1f} GiB", "", "")
    gpu = "not looked for (torch absent)" if "torch" in missing else _gpu()
    table.add_row("GPU", gpu, "GPU calibration", "the CPU is used instead")
    console().print(table)
    return 0 if not {"simpy", "pyarrow"} & set(missing) else 2


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
