"""``heliosim calibrate tune-exits``. Everything heavy is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from heliosim.errors import InputError


def tune_exits(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or the name of a shipped one.")],
    exits: Annotated[str, typer.Option(help="Layers to train exits behind, separated by commas.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to tune on: documents between blank lines, or JSON Lines (.jsonl).")
    ] = None,
    builtin: Annotated[bool, typer.Option("--builtin", help="Tune on the built-in tasks instead.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder with links to the checkpoint's files; default: write beside them.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="With --out: copies instead of links.")] = False,
    mlp: Annotated[
        int | None, typer.Option(min=0, help="Inner width of each MLP; default: the model's; 0: none.")
    ] = None,
    no_norm: Annotated[bool, typer.Option("--no-norm", help="Use the model's last norm, not one per exit.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Most steps.")] = 600,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Most minutes.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text a step.")] = 8,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 256,
    every: Annotated[int, typer.Option(min=1, help="Steps between looks at the held-out text.")] = 25,
    patience: Annotated[int, typer.Option(min=1, help="Looks without progress before it stops.")] = 6,
    held_out_tokens: Annotated[int, typer.Option(min=256, help="Most held-out tokens to look at.")] = 16_384,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Confidence threshold of the figures.")] = 0.8,
    agreement: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Agreement with the last layer at which exit shares are compared.")
    ] = 0.95,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the backbone; default: float32, on a GPU bfloat16.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random stream.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the exits or the folder there are.")] = False,
) -> None:
    """Train exit heads for a checkpoint, its own weights frozen and untouched, and say what they are worth.

    Ctrl-C ends the training and writes the best heads so far.
    """
    from heliosim.cli import need_live

    if (text is None) != builtin:
        raise InputError(
            "--text", None if text is None else str(text), "give a text or --builtin, one of them", "Choose."
        )
    if copy and out is None:
        raise InputError("--copy", True, "copies are made into a folder", "Name it with --out.")
    need_live()
    from heliosim_calibrate.tuning.train import Recipe
    from heliosim_calibrate.tuning.tune import Asked
    from heliosim_calibrate.tuning.tune import tune_exits as tune

    from heliosim.console import progress_bar

    recipe = Recipe(
        (), 0, has_norm=not no_norm, steps=steps, batch=batch, minutes=minutes, every=every, patience=patience,
        threshold=threshold, agreement=agreement, seed=seed,
    )  # fmt: skip
    asked = Asked(
        checkpoint, _layers(exits), text, out, mlp, length=length, held_out_tokens=held_out_tokens, device=device,
        dtype=dtype, threads=threads, is_copied=copy, overwrite=overwrite, recipe=recipe,
    )  # fmt: skip
    with progress_bar("Tuning exits") as progress:
        answer = tune(asked, progress)
    _show(answer, threshold, agreement)


def _layers(text: str) -> list[int]:
    pieces = [p.strip() for p in text.split(",") if p.strip()]
    if not pieces or not all(p.isdigit() for p in pieces):
        raise InputError("--exits", text, "no list of layers", "Give numbers separated by commas, as 6,12.")
    return [int(p) for p in pieces]


def _show(answer: Any, threshold: float, agreement: float) -> None:
    """A table with a row before and one after tuning for every exit."""
    from heliosim.console import console
    from heliosim.fitted import Column, print_fitted

    columns = [
        Column("exit", is_name=True), Column("", is_name=True), Column(f"tokens at\n>= {threshold:g}"),
        Column("agree\nof these"), Column("agree\nof all"), Column(f"can exit at\n{agreement:.0%} agreement"),
        Column("divergence,\nnats"),
    ]  # fmt: skip
    rows = []
    for e, before in answer.before.items():
        for name, f in (("untuned", before), ("tuned", answer.after[e])):
            sure = "–" if f.agreement_if_confident is None else f"{f.agreement_if_confident:.1%}"
            shares = [f"{f.confident:.1%}", sure, f"{f.agreement:.1%}", f"{f.exit_share:.1%}", f"{f.divergence:.3f}"]
            rows.append([str(e), name, *shares])
    texts = answer.texts
    out = console()
    title = f"Exits on {texts.held_out_tokens:,} held-out tokens of {texts.source}, against the last layer"
    print_fitted(out, title, columns, rows, ends=range(1, len(rows), 2))
    out.print(f"{answer.steps} steps on {texts.train_tokens:,} tokens in {answer.seconds:.0f} s; {answer.why}")
    for e in answer.untuned:
        out.print(f"[yellow]exit {e}: training made it no better, it stays as the model's own norm and head have it[/]")
    out.print(f"Heads written to {answer.folder}. Next: heliosim calibrate --models {answer.folder} --out PROFILE")
