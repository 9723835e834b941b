"""``heliosim behaviour``: exits without weights. Everything heavy is imported when a command runs."""

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
    what: Annotated[str, typer.Argument(help="Exit spec (file or shipped name), or a folder with a behaviour table.")],
) -> None:
    """Print an exit spec with what follows from it, or a behaviour table with what its texts hold."""
    from heliosim.synthetic.solve import solve
    from heliosim.synthetic.spec import load_spec
    from heliosim.synthetic.table import load_table
    from heliosim.synthetic.view import print_spec, print_table

    path = Path(what)
    if path.is_dir():
        print_table(*load_table(path), path.name)
    else:
        print_spec(solve(load_spec(what)))
