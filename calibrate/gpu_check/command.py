"""What `scripts/gpu_check` does, from options to report."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from heliosim.errors import HelioSimError, InputError

from . import report
from .figures import VERDICTS
from .plan import Options
from .runner import Runner

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(
    out: Annotated[Path, typer.Option(help="Folder for the report, profiles and raw rows.")] = Path("gpu-check"),
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu (stand-ins, to see that it works).")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="One load, short budgets.")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Time for everything; default 520, quick 170, on a CPU 600.")
    ] = None,
    parts: Annotated[str, typer.Option(help="Only these groups, separated by commas: machine, tests, ...")] = "",
    train_pair: Annotated[bool, typer.Option("--train-pair", help="Also train a pair of 30M and 120M here.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    work: Annotated[Path | None, typer.Option(help="What is under way; default OUT-work beside OUT.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier call measured.")] = False,
) -> None:
    """Measure on this machine's GPU what is claimed or left open; the same command goes on behind an interruption."""
    options = Options(
        device=resolved(device),
        is_quick=quick,
        seconds=seconds or seconds_for(resolved(device), quick),
        seed=seed,
        parts=tuple(p.strip() for p in parts.split(",") if p.strip()),
        trains_pair=train_pair,
    )
    work = work or out.parent / f"{out.name}-work"
    if fresh and (work / "options.json").exists():
        shutil.rmtree(work)
    raise SystemExit(run(options, work.resolve(), out.resolve()))


def run(options: Options, work: Path, out: Path) -> int:
    """0: every measure ran, whatever its figures; 1: some broke; 130: interrupted. A report is written in any case."""
    runner = Runner(options, work, lambda text: print(text, flush=True))
    code = 0
    try:
        runner.run()
    except KeyboardInterrupt:
        runner.interrupted()
        print("Interrupted. The same command goes on with what is missing.", file=sys.stderr)
        code = 130
    found = report.write(options, work, out)
    many = report.counts(found)
    print(", ".join(f"{many[verdict]} {verdict}" for verdict in VERDICTS))
    for outcome in report.failures(found):
        print(f"{outcome.group.name} {outcome.measure.name}: {outcome.state}: {outcome.error}")
    print(f"Report: {out / 'report.md'}")
    return code or int(bool(report.failures(found)))


def seconds_for(device: str, is_quick: bool) -> float:
    """Within the ten minutes that a machine may be lent for; on a CPU, what even a busy one needs."""
    return (170.0 if is_quick else 520.0) if device.startswith("cuda") else 600.0


def resolved(device: str) -> str:
    """``auto`` is a GPU if there is one. Raises InputError for a GPU that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device", device, "torch sees no GPU here", "Use --device cpu to see that the check works.")
    if device != "cpu" and not device.startswith("cuda"):
        raise InputError("--device", device, "unknown device", "Use auto, cuda, cuda:N or cpu.")
    return device


def main() -> None:
    try:
        app(standalone_mode=False)
    except HelioSimError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except typer.Abort:
        raise SystemExit(130) from None
