"""The command line. Every command imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_args

import typer

from heliosim import __version__, cli_profile
from heliosim.cli_behaviour import behaviour_app
from heliosim.cli_dashboard import dashboard
from heliosim.cli_exits import exits_app
from heliosim.cli_export import export_trace
from heliosim.cli_plan import max_rate, plan
from heliosim.cli_reproduce import reproduce
from heliosim.cli_statistics import Asked, HalfWidth, Jobs, ProfileUncertainty, Replications, add_statistics
from heliosim.cli_sweep import sweep
from heliosim.cli_trace import trace_app
from heliosim.cli_tune import tune
from heliosim.cli_tune_exits import tune_exits
from heliosim.errors import HelioSimError, InputError, UnknownNameError, about

if TYPE_CHECKING:
    from heliosim.scenario import LiveSpec

app = typer.Typer(
    name="heliosim",
    help="Plan and run early-exit LLM serving: calibrate, simulate HELIOS, run the same controller live, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
profile_app = typer.Typer(help="Look at and check profiles.", no_args_is_help=True)
app.add_typer(profile_app, name="profile")
profile_app.command("compose")(cli_profile.compose)
profile_app.command("diff")(cli_profile.diff)
profile_app.command("memory")(cli_profile.memory)
profile_app.command("import")(cli_profile.import_tables)
profile_app.command("device")(cli_profile.device_file)
app.command()(sweep)
app.command()(tune)
app.command()(export_trace)
app.add_typer(trace_app, name="trace", help="Make, import and describe request traces.")
app.add_typer(exits_app, name="exits", help="Exit batching and skipped-KV methods: speed beside quality.")
app.add_typer(behaviour_app, name="behaviour", help="Exits: measure, synthesize, import, show and report behaviour.")

calibrate_app = typer.Typer(help="Measure models on this machine and write a profile.", invoke_without_command=True)
calibrate_app.command("tune-exits")(tune_exits)
app.add_typer(calibrate_app, name="calibrate")

GO_ON = (
    ["calibrate"],
    ["reproduce"],
    ["sweep"],
    ["tune"],
    ["plan"],
    ["max-rate"],
    ["statistics", "coverage"],
    ["behaviour", "measure"],
)
"""Commands that keep what they did when they are interrupted, and go on from there."""
Models = Annotated[str, typer.Option(help="Shipped names or local checkpoint folders, separated by commas.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random stream.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"heliosim {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for profile, runs and report.")] = Path("demo"),
    pair: Annotated[str, typer.Option(help="Which shipped pair to serve: opt or llama.")] = "opt",
    requests: Annotated[int, typer.Option(min=40, help="Requests in the workload.")] = 320,
    repeats: Annotated[int, typer.Option(min=1, help="Live repeats of each system.")] = 3,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Calibrate the shipped models, simulate five systems, run them live, compare: the whole idea in one command."""
    need_live()
    from heliosim_calibrate.demo import run_demo

    run_demo(out, pair=pair, requests=requests, repeats=repeats, device=device, seed=seed)


@calibrate_app.callback()
def calibrate(
    context: typer.Context,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the profile to write; required.")] = None,  # noqa: UP045
    models: Models = "tiny-opt-s,tiny-opt-l",
    random_weights: Annotated[
        str,
        typer.Option(
            help="Architectures to calibrate with random weights instead of models: shipped names or configuration "
            "files, separated by commas, each alone or as NAME@exits=6,12,24,seed=0. Times and bytes, no exits."
        ),
    ] = "",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")] = 1,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs of this machine that share each layer (CPU: processes).")
    ] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch to measure.")] = 32,
    max_context: Annotated[int, typer.Option(min=64, help="Longest context to measure, tokens.")] = 256,
    token_budget: Annotated[int, typer.Option(min=16, help="Largest tokens per step to measure.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of every measured situation.")] = 4,
    prompts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Prompts per built-in task for behaviour; default: 24."),
    ] = None,
    prompts_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Prompts of your own instead: .jsonl (prompt, completion, task, ...) or .txt."),
    ] = None,
    closed_loop_prompts: Annotated[
        int, typer.Option(min=0, help="Of each task, prompts that texts are generated behind under every policy.")
    ] = 24,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Confidence threshold of recorded policies.")
    ] = 0.8,
    exit_methods: Annotated[
        str,
        typer.Option(help="Further exit methods to record texts of: batching+skipped_kv, separated by commas, or all."),
    ] = "",
    hardware: Annotated[
        str, typer.Option(help="Cells of single parts beside the steps: full, quick, off; auto: full on a GPU.")
    ] = "auto",
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=1.0, help="Seconds for steps and cells together; default: no end, on a GPU 540 a model."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be measured and how long it takes.")
    ] = False,
    dry_device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --dry-run: shipped GPUs to estimate for, separated by commas; default: this machine."),
    ] = None,
    device_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Device file to write as well, to compose other models for this device."),
    ] = None,
    device_base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --device-out: device that stands in for what one GPU cannot show (all-reduce, ...)."),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Measure models on this machine, inside the real serving loop, and write a profile.

    What was measured is kept in OUT.partial until the profile is there; the same command goes on from it.
    """
    if (command := context.invoked_subcommand) is not None:
        refuse_options(context, given_options(context), f"is no option of {command}", f"Put it behind {command}.")
        return
    if out is None:
        raise InputError("--out", None, "is missing", "Name the folder of the profile to write.")
    if random_weights:
        unused = given_options(context) & {"models", "prompts", "prompts_file", "closed_loop_prompts", "exit_methods"}
        refuse_options(context, unused, "random weights say nothing and stand alone", "Leave it out.")
    need_live()
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UnknownNameError("--dtype", dtype, ("float32", "float16", "bfloat16"))
    if prompts is not None and prompts_file is not None:
        raise InputError("--prompts", prompts, "has no effect with --prompts-file", "Leave one of them out.")
    from heliosim_calibrate.calibrate import Request
    from heliosim_calibrate.calibrate import calibrate as measure

    from heliosim.console import progress_bar
    from heliosim.formats.random_weights import split_names
    from heliosim.profile_view import show_profile

    request = Request(
        models=split_names(random_weights or models, random_only=bool(random_weights)),
        out=out,
        device=device,
        dtype=dtype,
        threads=threads,
        tensor_parallel=tensor_parallel,
        max_batch=max_batch,
        max_context=max_context,
        token_budget=token_budget,
        rounds=rounds,
        prompts_per_task=prompts or 24,
        prompts_file=prompts_file,
        closed_loop_prompts=closed_loop_prompts,
        threshold=threshold,
        exit_methods=[m.strip() for m in exit_methods.split(",") if m.strip()],
        seed=seed,
        overwrite=overwrite,
        hardware=hardware,
        budget_s=budget,
        device_out=device_out,
        device_base=device_base,
    )
    for option, value, needs, has in (
        ("--dry-device", dry_device, "--dry-run", dry_run),
        ("--device-base", device_base, "--device-out", device_out is not None),
    ):
        if value is not None and not has:
            raise InputError(option, value, f"has no effect without {needs}", f"Leave it out, or add {needs}.")
    if dry_run:
        from heliosim_calibrate.dry_run import show_plan

        show_plan(request, [d.strip() for d in dry_device.split(",")] if dry_device else [])
        return
    with progress_bar("Calibrating") as progress:
        profile = measure(request, progress)
    show_profile(profile)
    if device_out is not None:
        typer.echo(
            f"\nDevice file written to {device_out}. Compose with: heliosim profile compose --device {device_out}"
        )
    typer.echo(f"\nReport: {out}/calibration.html")
    following = f"heliosim example --profile {out} --out example"
    if profile.random_models:
        following = "heliosim run SCENARIO --live --replay-exits PROFILE"
    else:
        typer.echo(f"\nBehaviour, with figures: {out / 'behaviour.html'}")
    typer.echo(f"Profile written to {out}. Next: {following}")


@app.command()
def run(
    scenario: Annotated[Path, typer.Argument(help="Scenario file (YAML).")],
    out: Annotated[Optional[Path], typer.Option(help="Run folder to write; default runs/NAME-MODE.")] = None,  # noqa: UP045
    live: Annotated[bool, typer.Option("--live", help="Execute on the real engine instead of simulating.")] = False,
    clock: Annotated[Optional[str], typer.Option(help="cpu or wall; default: the scenario's.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="With --live: auto, cpu, cuda or cuda:N.")] = None,  # noqa: UP045
    tensor_parallel: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="With --live: GPUs of this machine that share each layer; default: as in the profile."),
    ] = None,
    seed: Annotated[Optional[int], typer.Option(min=0, help="Seed instead of the scenario's.")] = None,  # noqa: UP045
    replay_exits: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Profile or behaviour table whose recorded exits stand in for the models' own: thresholds, breaches, "
            "lengths and quality follow them while steps, memory and loads are the models'. One run, no replications."
        ),
    ] = None,
    engine: Annotated[Optional[str], typer.Option(help="With --live: auto, plain, fast or conditional.")] = None,  # noqa: UP045
    max_stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --live: steps between two decisions of the server; default 32, plain engine 1."),
    ] = None,
    allow_extrapolation: Annotated[
        bool, typer.Option("--allow-extrapolation", help="Answer outside the calibrated range, and say so.")
    ] = False,
    replications: Replications = None,
    half_width: HalfWidth = None,
    jobs: Jobs = None,
    profile_uncertainty: ProfileUncertainty = False,
    overwrite: Overwrite = False,
) -> None:
    """Run a scenario: simulated from its profile, until its figures are sharp, or live on the torch engine."""
    from heliosim.console import print_summary, progress_bar, run_progress
    from heliosim.formats.files import require_free, require_new_file
    from heliosim.formats.results import RUN_FOLDER
    from heliosim.progress_log import log_path
    from heliosim.scenario import load_scenario, parse_clock

    loaded = load_scenario(scenario)
    changes: dict[str, Any] = {"clock": parse_clock(clock)} if clock else {}
    if seed is not None:
        changes["seed"] = seed
    if allow_extrapolation:
        changes["allow_extrapolation"] = True
    changes["live"] = live_of(loaded.live, engine, max_stride)
    loaded = loaded.model_copy(update=changes)
    if replay_exits is not None and replications is None:
        replications = 1
    asked = Asked(replications, half_width, jobs, profile_uncertainty)
    if live:
        asked.require_single("--live")
    elif replay_exits is not None:
        asked.require_single("--replay-exits")
    elif replications == 1:
        asked.require_single("--replications 1")
    if device is not None and not live:
        raise InputError("--device", device, "a simulation runs on no device", "Add --live, or leave it out.")
    if tensor_parallel is not None and not live:
        remedy = "Add --live, or leave it out (the profile says on how many GPUs a simulated model runs)."
        raise InputError("--tensor-parallel", tensor_parallel, "a simulation runs on no device", remedy)
    for option, given in (("--engine", engine), ("--max-stride", max_stride)):
        if given is not None and not live:
            raise InputError(option, given, "a simulation does not look at it", "Add --live, or leave it out.")
    target = out or Path("runs") / f"{loaded.name}-{'live' if live else 'simulated'}"
    require_free(target, RUN_FOLDER, overwrite=overwrite, source=scenario)  # said now, not after a long run
    from heliosim.runs import last_arrival, refuse_live_fleet, run_live, run_simulated, save

    if live:
        refuse_live_fleet(loaded)
        need_live()
        followed = log_path(target)
        require_new_file(followed, overwrite=overwrite)
        typer.echo(f"Progress, a line a second: {followed}")
    elif replications != 1:
        with about(scenario):
            asked.require_drawable(loaded)
    replay = None
    if replay_exits is not None:
        from heliosim.replays import open_replay

        replay = open_replay(replay_exits)
    ran_on = ""
    with about(scenario), progress_bar("Live" if live else "Simulating") as progress:
        on_progress = run_progress(progress, last_arrival(loaded))
        if live:
            ran = run_live(
                loaded,
                device=device or "auto",
                replay=replay,
                on_progress=on_progress,
                tensor_parallel=tensor_parallel,
                progress_log=followed,
            )
            results, ran_on = ran.results, ran.engine
        else:
            results = run_simulated(loaded, replay=replay, on_progress=on_progress)
    replicated = None
    if not live and replications != 1:
        from heliosim.statistics_view import print_replicated

        with about(scenario):
            replicated = asked.replicate(loaded, results)
    save(results, target, overwrite=overwrite)
    if replicated is None:
        print_summary(results, loaded.slo)
    else:
        from heliosim.formats.replications import save_replications

        save_replications(target, replicated)
        print_replicated(replicated, results, loaded.slo)
    if loaded.fleet is not None:
        from heliosim.fleet_view import print_fleet

        print_fleet(results, loaded.fleet)
    if ran_on:
        typer.echo(f"Run on the {ran_on}.")
    if not (live or loaded.sampling.is_greedy):
        typer.echo("The profile's behaviour stands for whatever the scenario's sampling says; only a live run draws.")
    typer.echo(f"Run written to {target}")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders; those of one scenario name are one system."),
    ],
    report: Annotated[Optional[Path], typer.Option(help="Also write a self-contained HTML report here.")] = None,  # noqa: UP045
) -> None:
    """Compare runs: one simulated run against its live repeats, or several systems side by side."""
    from heliosim.console import print_comparison

    print_comparison(runs, report)


@app.command()
def validate(
    out: Annotated[Path, typer.Option(help="Folder for runs and the JSON of every figure.")] = Path("validation"),
    doc: Annotated[Optional[Path], typer.Option(help="Markdown page to (re)write.")] = None,  # noqa: UP045
    repeats: Annotated[int, typer.Option(min=3, help="Live repeats of each system and load.")] = 3,
    requests: Annotated[int, typer.Option(min=100, help="Requests in each run.")] = 400,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Predict, then measure: the published fidelity figures, regenerated on this machine."""
    need_live()
    from heliosim_calibrate.validate import run_validation

    run_validation(out, doc, repeats=repeats, requests=requests, device=device, seed=seed)


@app.command()
def example(
    out: Annotated[Path, typer.Option(help="Folder to write scenarios into.")] = Path("example"),
    profile: Annotated[
        Path | None, typer.Option(help="Profile to use; default: the shipped reference profile.")
    ] = None,
    plans: Annotated[
        bool, typer.Option("--plans", help="Write example plans and the price table instead of scenarios.")
    ] = False,
    example_set: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--set", help="HELIOS's models on A100-40GB: opt-pair, llama-three or codellama-llama2."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write example scenarios (vanilla, early exit, HELIOS, a fleet), or plans, ready to run and to change."""
    from heliosim.examples import write_examples, write_plans

    if example_set is not None:
        for option, given in (("--profile", profile), ("--plans", plans or None)):
            if given is not None:
                raise InputError(option, str(given), "an example set has its own profile", "Leave it out.")
        from heliosim.example_sets import write_set

        for path in write_set(out, example_set, overwrite=overwrite):
            typer.echo(path)
        return
    if plans:
        if profile is not None:
            raise InputError("--profile", str(profile), "the example plans name their own", "Leave it out.")
        for path in write_plans(out, overwrite=overwrite):
            typer.echo(path)
        return
    for path in write_examples(out, profile, overwrite=overwrite):
        typer.echo(path)


app.command()(plan)
app.command("max-rate")(max_rate)
app.command()(reproduce)
app.command()(dashboard)


@app.command()
def doctor() -> None:
    """Say what is installed, what this machine can do, and what to install for the rest."""
    from heliosim.console import print_doctor

    raise typer.Exit(print_doctor())


@profile_app.command("show")
def profile_show(
    folder: Annotated[Path, typer.Argument(help="Profile folder, or the name of a shipped one.")],
    sources: Annotated[bool, typer.Option("--sources", help="Every source and assumption in full.")] = False,
) -> None:
    """Print what a profile says, with its errors."""
    from heliosim.profile_view import open_profile, show_profile

    show_profile(open_profile(str(folder)), sources=sources)


@profile_app.command("check")
def profile_check(
    folder: Annotated[Path, typer.Argument(help="Profile folder, or the name of a shipped one.")],
) -> None:
    """Check a profile: schema, digests, books, fit errors. Exit code 2 if it cannot be used."""
    from heliosim.profile_view import check_profile, open_profile

    raise typer.Exit(check_profile(open_profile(str(folder))))


add_statistics(app)  # behind the commands above in the list of help


def given_options(context: typer.Context) -> set[str]:
    """Options of a command that were given, not left at their defaults."""
    return {n for n in context.params if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}


def refuse_options(context: typer.Context, names: Iterable[str], problem: str, remedy: str) -> None:
    """Raise InputError for the first of these options of a command."""
    for name in sorted(names):
        raise InputError(f"--{name.replace('_', '-')}", str(context.params[name]), problem, remedy)


def live_of(known: LiveSpec, engine: str | None, max_stride: int | None) -> LiveSpec:
    """A scenario's ``live`` section with what the command line says. Raises InputError or UnknownNameError."""
    from heliosim.formats.files import validate
    from heliosim.scenario import LiveSpec

    names = get_args(LiveSpec.model_fields["engine"].annotation)
    if engine is not None and engine not in names:
        raise UnknownNameError("--engine", engine, names)
    given = {"engine": engine, "max_stride": max_stride}
    return validate(LiveSpec, known.model_dump() | {k: v for k, v in given.items() if v is not None}, "--live")


def need_live() -> None:
    """Raise HelioSimError unless what the live engine needs is installed."""
    from importlib.util import find_spec

    missing = [m for m in ("torch", "transformers", "safetensors", "tokenizers") if find_spec(m) is None]
    if missing:
        raise HelioSimError(f"live mode needs {', '.join(missing)}: install them with  pip install 'heliosim[live]'")


def main() -> None:
    """Entry point: one line for anything a user can correct (exit code 2), and a way on after an interruption (130)."""
    usage_error: Any = typer.BadParameter.__mro__[2]  # click's base of them all, wherever typer keeps its click
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # typer makes this of an interruption
            raise KeyboardInterrupt
        sys.exit(code)
    except HelioSimError as error:
        _fail(str(error))
    except usage_error as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}. Check the path, its permissions and free space.")
    except (KeyboardInterrupt, typer.Abort):
        goes_on = sys.argv[1:2] in GO_ON or sys.argv[1:3] in GO_ON
        said = "run the same command to go on" if goes_on else "run it again"
        sys.stderr.write(f"\ninterrupted. No half-written file was left; {said}.\n")
        sys.exit(130)


def _fail(line: str) -> None:
    sys.stderr.write(f"error: {line}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
