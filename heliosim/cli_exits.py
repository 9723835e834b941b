"""``heliosim exits``: exit batching and skipped-KV methods. Everything heavy is imported when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from heliosim.errors import UnknownNameError
from heliosim.registry import EXIT_BATCHING, SKIPPED_KV

exits_app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@exits_app.command("compare")
def compare_methods(
    model: Annotated[str, typer.Option(help="Shipped name or local checkpoint folder.")] = "tiny-opt-l",
    batching: Annotated[str | None, typer.Option(help="Some, separated by commas; default: all.")] = None,
    skipped_kv: Annotated[str | None, typer.Option(help="Some, separated by commas; default: all.")] = None,
    tasks: Annotated[str, typer.Option(help="Built-in tasks.")] = "chat,qa,arithmetic,lists,code",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Confidence threshold.")] = 0.8,
    quorum: Annotated[int, typer.Option(min=1, help="Rows that take the batch out under eager.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of a text.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of every run; speed is their median.")] = 3,
    profile: Annotated[str | None, typer.Option(help="Profile that rebatch takes its break-even from.")] = None,
    out: Annotated[Path | None, typer.Option(help="Page to put the tables into (Markdown).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts.")] = 0,
) -> None:
    """Generate text under every pair of methods on the real engine: tokens/s beside what it does to quality."""
    from heliosim.cli import need_live
    from heliosim.tasks import FAMILIES

    need_live()
    from heliosim_calibrate.exit_methods import (
        Asked,
        compare,
        page_part,
        speed_table,
        table,
        task_table,
        title,
        write_part,
    )

    from heliosim.console import console, progress_bar
    from heliosim.profile_view import open_profile

    asked = Asked(
        model=model,
        batchings=_names("--batching", batching, EXIT_BATCHING.names()),
        methods=_names("--skipped-kv", skipped_kv, SKIPPED_KV.names()),
        tasks=_names("--tasks", tasks, list(FAMILIES)),
        prompts=prompts,
        rows=batch,
        threshold=threshold,
        quorum=quorum,
        max_tokens=max_tokens,
        repeats=repeats,
        seed=seed,
        profile=open_profile(profile) if profile else None,
    )
    with progress_bar("Comparing") as progress:
        trials = compare(asked, progress)
    tables = [table(trials), task_table(trials) if trials[0].right else [], speed_table(trials)]
    for line in (line for lines in tables for line in (*lines, "")):
        console().print(line, markup=False, soft_wrap=True)
    if out is not None:
        write_part(out, page_part(asked, trials, " ".join(["heliosim", *sys.argv[1:]])), title(asked))


def _names(option: str, given: str | None, known: list[str]) -> list[str]:
    names = [n.strip() for n in given.split(",") if n.strip()] if given else known
    if odd := [name for name in names if name not in known]:
        raise UnknownNameError(option, odd[0], known)
    return names
