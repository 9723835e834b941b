"""``heliosim export-trace``. Everything heavy is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from heliosim.errors import InputError


def export_trace(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Optional[Path], typer.Option(help="JSON file to write; required.")] = None,  # noqa: UP045
    requests: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Only the first so many requests; default: all."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a run as a Chrome trace, to be opened in ui.perfetto.dev or chrome://tracing."""
    if out is None:
        raise InputError("--out", None, "is missing", "Name the file to write, such as trace.json.")
    if out.is_dir():
        raise InputError("--out", str(out), "is a folder", "Name a file in it, such as trace.json.")
    if out.exists() and not overwrite:
        raise InputError("--out", str(out), "exists already", "Choose another name, or add --overwrite.")
    if not out.parent.is_dir():
        raise InputError("--out", str(out), f"there is no folder {out.parent}", "Make it first.")
    from heliosim.formats.results import load_run
    from heliosim.perfetto import write_trace

    count = write_trace(load_run(run), out, requests)
    typer.echo(f"{count:,} events written to {out}. Open it at https://ui.perfetto.dev")
