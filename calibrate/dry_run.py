"""`heliosim calibrate --dry-run`: what would be measured, and how long it takes, here or on a GPU that is not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heliosim.formats.checkpoint import CheckpointInfo, checkpoint_path, inspect_checkpoint
from heliosim.types import Seconds

from .calibrate import Request, require_usable
from .device import resolve_device
from .hardware.estimate import Estimator, Line, by_group, estimated, steps_seconds
from .stages import STEPS_SHARE, Mode, budget_of, cells_of, estimators_of, mode_of


@dataclass(frozen=True)
class Plan:
    """What would be done. ``steps_s``: in the serving loop without a budget; ``cells_s``: all hardware cells."""

    where: str
    mode: Mode
    points: int
    steps_s: Seconds
    lines: Sequence[Line]
    budget_s: Seconds | None
    has_behaviour: bool = True

    @property
    def cells_s(self) -> Seconds:
        return sum(line.seconds for line in self.lines)

    @property
    def total_s(self) -> Seconds:
        """With a budget, steps end at their share of it, if every situation was met by then."""
        whole = self.steps_s + self.cells_s
        if self.budget_s is None:
            return whole
        return min(whole, self.budget_s)


def plan_of(request: Request, like: str | None) -> Plan:
    """The plan for this machine, or for a shipped device."""
    require_usable(request)
    device = "cuda" if like is not None else resolve_device(request.device)
    mode = mode_of(request.hardware, device)
    infos = {i.spec.name: i for i in (inspect_checkpoint(checkpoint_path(m), request.dtype) for m in request.models)}
    context = min(request.max_context, *(i.spec.max_context for i in infos.values()))
    extent, cells = cells_of(request, infos, mode if mode != "off" else "quick", context, _budgets(request, infos))
    estimators = estimators_of(request, infos, extent, "cuda" if like else device, like)
    lines = by_group(estimated(cells, estimators)) if mode != "off" else []
    has_behaviour = all(info.random is None for info in infos.values())
    count, seconds = _steps(request, infos, estimators, context)
    return Plan(
        like or device, mode, count, seconds, lines, budget_of(request.budget_s, device, len(infos)), has_behaviour
    )


def _budgets(request: Request, infos: Mapping[str, CheckpointInfo]) -> list[int]:
    from .calibrate import _budgets as budgets

    return budgets(request, {name: info.spec for name, info in infos.items()})


def _steps(
    request: Request, infos: Mapping[str, CheckpointInfo], estimators: Mapping[str, Estimator], context: int
) -> tuple[int, Seconds]:
    count, seconds = 0, 0.0
    limits = (request.threshold, request.max_batch, request.token_budget, context, request.rounds)
    for name, info in infos.items():
        n, s = steps_seconds(info.spec, estimators[name].speed, *limits)
        count, seconds = count + n, seconds + s
    return count, seconds


def show_plan(request: Request, likes: Sequence[str]) -> None:
    """Print the plan for this machine, or for each of the devices."""
    from rich.table import Table

    from heliosim.console import console

    out = console()
    for plan in [plan_of(request, like) for like in (likes or [None])]:  # type: ignore[list-item]
        out.print(f"[bold]{', '.join(request.models)}[/] in {request.dtype} on {plan.where}, cells {plan.mode}")
        table = Table(box=None)
        table.add_column("what")
        table.add_column("cells", justify="right")
        table.add_column("about", justify="right")
        table.add_row("steps in the serving loop (points)", f"{plan.points:,}", _time(plan.steps_s))
        for line in plan.lines:
            table.add_row(line.group, f"{line.cells:,}", _time(line.seconds))
        cells = plan.points + sum(line.cells for line in plan.lines)
        table.add_row("all, if no region ends early", f"{cells:,}", _time(plan.steps_s + plan.cells_s))
        out.print(table)
        more = ", and behaviour on top" if plan.has_behaviour else "; random weights have no behaviour"
        if plan.budget_s is not None:
            out.print(
                f"Budget {_time(plan.budget_s)}: at most {STEPS_SHARE:.0%} of it for steps, whose situations are each "
                f"visited once at least; with it about {_time(plan.total_s)}{more}."
            )
        else:
            out.print(f"No budget: about {_time(plan.total_s)}{more}.")
        how = "a composed profile of the device" if plan.where not in ("cpu",) else "nominal speeds of a CPU thread"
        out.print(f"[dim]Times are estimated from {how}, not measured.[/]\n")


def _time(seconds: Seconds) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
