"""``heliosim behaviour``: exits, measured or without weights. Everything heavy is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliosim.errors import InputError, UnknownNameError

behaviour_app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
KINDS = ("green-code", "ee-llama")

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write (for ee-llama: the exit spec, YAML).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random stream.")]
Table = Annotated[str, typer.Argument(help="Profile (folder or shipped name) or folder of a behaviour table.")]
Models = Annotated[str | None, typer.Option(help="Some of its models, separated by commas; default: all.")]
Task = Annotated[str | None, typer.Option(help="One task; default: all together.")]
Source = Annotated[
    str | None, typer.Option(help="Whose texts open-loop figures rest on; default: each model's own at full depth.")
]
Threshold = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Default: the one the table was made with.")]


@behaviour_app.command()
def synthesize(
    spec: Annotated[str, typer.Argument(help="Exit spec (YAML or JSON), or the name of a shipped one.")],
    out: Out,
    models: Annotated[str | None, typer.Option(help="Some of its models, separated by commas; default: all.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Draw texts from an exit spec: a synthetic behaviour table in the form of a profile's."""
    from heliosim.formats.files import require_free
    from heliosim.synthetic.draw import behaviour_for
    from heliosim.synthetic.spec import load_spec
    from heliosim.synthetic.table import BEHAVIOUR_FOLDER, load_table
    from heliosim.synthetic.view import print_table

    require_free(out, BEHAVIOUR_FOLDER, overwrite=overwrite)
    loaded = load_spec(spec)
    names = [m.strip() for m in models.split(",") if m.strip()] if models else list(loaded.models)
    if odd := [name for name in names if name not in loaded.models]:
        raise UnknownNameError("--models", odd[0], loaded.models)
    behaviour_for({name: loaded.models[name].exits for name in names}, loaded, seed).save(out, overwrite=overwrite)
    print_table(*load_table(out), out.name)
    typer.echo(f"Synthetic behaviour written to {out}")


@behaviour_app.command("import")
def import_exits(
    kind: Annotated[str, typer.Argument(help=f"Form of the data: {', '.join(KINDS)}.")],
    source: Annotated[Path, typer.Argument(help="Its folder or file.")],
    out: Out,
    model: Annotated[str | None, typer.Option(help="green-code: opt (default) or llama.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="green-code: the recorded threshold to replay. ee-llama: that of the spec's shares (0.8)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="green-code: seed of drawn agreement; default: 0.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Read exits that others measured: GREEN-CODE's tokens to replay, or the early-exit Llama's sweep as a spec."""
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    if kind == "ee-llama":
        for option, value in (("--model", model), ("--seed", seed)):
            if value is not None:
                raise InputError(option, value, f"has no effect on {kind}", "Leave it out.")
        _import_sweep(source, out, threshold, overwrite)
        return
    from heliosim.formats.files import require_free
    from heliosim.synthetic.replay import import_green_code
    from heliosim.synthetic.table import BEHAVIOUR_FOLDER, load_table
    from heliosim.synthetic.view import print_table

    require_free(out, BEHAVIOUR_FOLDER, overwrite=overwrite, source=source)
    import_green_code(source, model or "opt", threshold, seed or 0).save(out, overwrite=overwrite)
    print_table(*load_table(out), out.name)
    typer.echo(f"Imported behaviour written to {out}")


def _import_sweep(source: Path, out: Path, threshold: float | None, overwrite: bool) -> None:
    import yaml

    from heliosim.formats.files import require_new_file, write_text
    from heliosim.synthetic.exits import read_ee_llama
    from heliosim.synthetic.replay import spec_of_sweep
    from heliosim.synthetic.solve import solve
    from heliosim.synthetic.view import print_spec

    require_new_file(out, overwrite=overwrite)
    at = 0.8 if threshold is None else threshold
    if not 0.05 <= at <= 0.99:
        raise InputError("--threshold", at, "lies outside 0.05 to 0.99", "Choose one inside.")
    spec = spec_of_sweep(read_ee_llama(source), at)
    write_text(out, yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120))
    print_spec(solve(spec))
    typer.echo(f"Exit spec written to {out}. Next: heliosim behaviour synthesize {out} -o FOLDER")


@behaviour_app.command()
def show(
    what: Annotated[
        str, typer.Argument(help="Exit spec (file or shipped name), folder with a behaviour table, or profile.")
    ],
) -> None:
    """Print an exit spec with what follows from it, or a behaviour table with what its texts hold."""
    from heliosim.profile_view import shipped_profiles
    from heliosim.synthetic.solve import solve
    from heliosim.synthetic.spec import load_spec
    from heliosim.synthetic.table import load_table
    from heliosim.synthetic.view import print_spec, print_table

    path = Path(what)
    if (path / "profile.json").is_file() or (not path.exists() and what in shipped_profiles()):
        stats(what, tables="shares,depth,quality")
    elif path.is_dir():
        print_table(*load_table(path), path.name)
    else:
        print_spec(solve(load_spec(what)))


@behaviour_app.command()
def stats(
    what: Table,
    models: Models = None,
    task: Task = None,
    source: Source = None,
    threshold: Threshold = None,
    tables: Annotated[
        str | None,
        typer.Option(
            help="Some of: shares, depth, confidence, reliability, joint, complement, correlation, runs, breaches, "
            "quality, lengths, fits; separated by commas. Default: all but fits."
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Print what a behaviour table says: exits, quality, reliability, order; ``fits`` compares fitted models with
    it.
    """
    from heliosim.behaviour_source import open_behaviour
    from heliosim.behaviour_summary import summarise_behaviour
    from heliosim.behaviour_view import PARTS, print_behaviour

    parts = _listed(tables) or [name for name in PARTS if name != "fits"]
    if odd := [name for name in parts if name not in PARTS]:
        raise UnknownNameError("--tables", odd[0], PARTS)
    opened = open_behaviour(what)
    at = opened.facts.threshold if threshold is None else threshold
    summary = summarise_behaviour(
        opened.tokens, at, models=_listed(models), source=source, task=task, fits="fits" in parts, seed=seed
    )
    print_behaviour(opened, summary, parts)


@behaviour_app.command()
def report(
    what: Table,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("behaviour.html"),
    models: Models = None,
    task: Task = None,
    source: Source = None,
    threshold: Threshold = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write what a behaviour table says as one HTML file with figures, fitted models included."""
    from heliosim.behaviour_report import write_opened
    from heliosim.behaviour_source import open_behaviour
    from heliosim.behaviour_summary import summarise_behaviour
    from heliosim.formats.files import require_new_file

    require_new_file(out, overwrite=overwrite)
    opened = open_behaviour(what)
    at = opened.facts.threshold if threshold is None else threshold
    summary = summarise_behaviour(
        opened.tokens, at, models=_listed(models), source=source, task=task, fits=True, seed=seed
    )
    write_opened(opened, summary, out)
    typer.echo(f"Report written to {out}")


def _listed(text: str | None) -> list[str] | None:
    """Names separated by commas; None where there are none."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    return names or None


@behaviour_app.command()
def measure(
    out: Out,
    models: Annotated[
        str, typer.Option(help="Shipped names or local checkpoint folders, separated by commas.")
    ] = "tiny-opt-s,tiny-opt-l",
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of your own: .jsonl (prompt, completion, task, id, is_exact; or text) or .txt, a line each."
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Some of the built-in tasks, separated by commas.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts of each built-in task; default: 24.")] = None,
    closed_loop_prompts: Annotated[
        int, typer.Option(min=0, help="Of each task, prompts that texts are generated behind under every policy.")
    ] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each generated text.")] = 48,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Threshold of the recorded policies.")] = 0.8,
    exit_methods: Annotated[
        str, typer.Option(help="Exit methods to record texts under: all, or batching+skipped_kv separated by commas.")
    ] = "all",
    max_context: Annotated[int, typer.Option(min=16, help="Longest text, tokens.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")] = 1,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Measure behaviour alone, without timing anything: a behaviour table of real models. Goes on where it was left."""
    from heliosim.cli import need_live
    from heliosim.errors import InputError

    need_live()
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UnknownNameError("--dtype", dtype, ("float32", "float16", "bfloat16"))
    for option, value in (("--tasks", tasks), ("--prompts", prompts)):
        if prompts_file is not None and value is not None:
            raise InputError(option, value, "has no effect with --prompts-file", "Leave one of them out.")
    from heliosim_calibrate.behaviour_alone import measure_table
    from heliosim_calibrate.behaviour_stage import BehaviourPlan

    from heliosim.behaviour_source import open_behaviour
    from heliosim.behaviour_summary import summarise_behaviour
    from heliosim.behaviour_view import print_behaviour
    from heliosim.console import progress_bar

    plan = BehaviourPlan(
        tasks=_known_tasks(tasks),
        prompts_per_task=prompts or 24,
        prompts_file=prompts_file,
        closed_loop_prompts=closed_loop_prompts,
        tokens_per_text=tokens,
        threshold=threshold,
        exit_methods=_listed(exit_methods) or [],
        rows=batch,
        seed=seed,
    )
    with progress_bar("Measuring behaviour") as progress:
        measure_table(
            plan, _listed(models) or [], out, device=device, dtype=dtype, threads=threads,
            max_context=max_context, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    opened = open_behaviour(str(out))
    print_behaviour(opened, summarise_behaviour(opened.tokens, threshold, seed=seed), ("depth", "quality"))
    typer.echo(f"Behaviour written to {out}. Next: heliosim behaviour report {out}")


def _known_tasks(text: str | None) -> list[str]:
    from heliosim.tasks import FAMILIES

    names = _listed(text) or []
    if odd := [name for name in names if name not in FAMILIES]:
        raise UnknownNameError("--tasks", odd[0], FAMILIES)
    return names


@behaviour_app.command()
def replace(
    profile: Annotated[Path, typer.Argument(help="Profile folder whose hardware facts to keep.")],
    table: Annotated[Path, typer.Argument(help="Folder of a behaviour table of the same models and exits.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Profile folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Put another behaviour into a profile: times, sizes and energy stay, exits become those of a table."""
    from heliosim.behaviour_swap import replace_behaviour

    replace_behaviour(profile, table, out, overwrite=overwrite)
    typer.echo(f"Profile written to {out}. Next: heliosim profile show {out}")
