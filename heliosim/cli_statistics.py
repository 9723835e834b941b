"""Replications from the command line: options of ``heliosim run``, ``compare-policies`` and the ``statistics`` studies.

Everything heavy is imported when a command runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from heliosim.errors import InputError

if TYPE_CHECKING:
    from heliosim.formats.results import RunResults
    from heliosim.replicated import Replicated
    from heliosim.scenario import Scenario
    from heliosim.stats import StoppingRule

statistics_app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Replications = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Exactly so many; 1: a single run. Default: until every watched interval is narrow."),
]
HalfWidth = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Replicate until half-widths are within this share of the mean (default 0.05)."),
]
Jobs = Annotated[Optional[int], typer.Option(min=1, help="Processes that simulate at the same time.")]  # noqa: UP045
ProfileUncertainty = Annotated[
    bool, typer.Option("--profile-uncertainty", help="Draw step costs anew for each replication, as measured.")
]
Seed = Annotated[Optional[int], typer.Option(min=0, help="Seed instead of the scenario's.")]  # noqa: UP045
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out if it exists.")]


@dataclass(frozen=True)
class Asked:
    """What a command line says of replications; None: nothing."""

    replications: int | None = None
    half_width: float | None = None
    jobs: int | None = None
    profile_uncertainty: bool = False

    def require_single(self, where: str) -> None:
        """Raise InputError if replications were asked for where there is one run only."""
        given = {
            "--replications": self.replications if self.replications != 1 else None,
            "--half-width": self.half_width,
            "--jobs": self.jobs,
            "--profile-uncertainty": self.profile_uncertainty or None,
        }
        for name, value in given.items():
            if value is not None:
                remedy = f"Leave {name} out, or simulate."
                raise InputError(name, value, f"replications are simulated; {where} is a single run", remedy)

    def rule(self, scenario: Scenario) -> StoppingRule:
        """The scenario's rule with what the command line changes."""
        from heliosim.scenario import StatisticsSpec
        from heliosim.stats import StoppingRule

        said = (scenario.statistics or StatisticsSpec()).replications
        if self.half_width is not None and not 0 < self.half_width < 1:
            raise InputError("--half-width", self.half_width, "must lie between 0 and 1", "Give a share such as 0.02.")
        if self.replications is not None:
            if self.half_width is not None:
                remedy = "Give one of them: a fixed number looks at no width."
                raise InputError("--half-width", self.half_width, "stands beside --replications", remedy)
            return StoppingRule.exactly(self.replications, said.confidence)
        return said.model_copy(update={"relative_half_width": self.half_width or said.relative_half_width}).rule()

    def require_drawable(self, scenario: Scenario) -> None:
        """Raise InputError if step costs are to be drawn anew and cannot be, before anything is simulated."""
        from heliosim.replicate import require_uncertain
        from heliosim.scenario import StatisticsSpec

        if self.profile_uncertainty or (scenario.statistics or StatisticsSpec()).profile_uncertainty:
            require_uncertain(scenario)

    def replicate(self, scenario: Scenario, first: RunResults | None = None) -> Replicated:
        """Replications of a scenario, with progress. ``first``: replication 0."""
        from heliosim.console import now_and_then, progress_bar
        from heliosim.executors import open_executor
        from heliosim.replicate import replicate

        with open_executor("local", self.jobs or 1) as executor, progress_bar("Replicating") as progress:
            return replicate(
                scenario,
                self.rule(scenario),
                executor=executor,
                profile_uncertainty=self.profile_uncertainty or None,
                first=first,
                on_progress=now_and_then(progress),
            )


def add_statistics(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command("compare-policies")(compare_policies)
    app.add_typer(statistics_app, name="statistics", help="Studies of the statistics themselves, against known truths.")


def compare_policies(
    first: Annotated[Path, typer.Argument(help="Scenario file of the one policy.")],
    second: Annotated[Path, typer.Argument(help="Scenario file of the other.")],
    replications: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Exactly so many pairs. Default: until every difference is narrow."),
    ] = None,
    half_width: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Until half-widths of differences are within this share of the larger mean (default 0.02)."),
    ] = None,
    jobs: Jobs = None,
    profile_uncertainty: ProfileUncertainty = False,
    seed: Seed = None,
    out: Annotated[Optional[Path], typer.Option(help="Also write every figure to this JSON file.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
) -> None:
    """Simulate two scenarios under common random numbers: paired differences with their intervals."""
    from heliosim.console import now_and_then, progress_bar, say_derived
    from heliosim.executors import open_executor
    from heliosim.formats.files import require_new_file, write_json
    from heliosim.paired import pair, paired_dict
    from heliosim.scenario import load_scenario
    from heliosim.statistics_view import print_paired

    require_new_file(out, overwrite=overwrite)
    a, b = load_scenario(first), load_scenario(second)
    if a.name == b.name:
        remedy = "Give them names of their own: they head the columns."
        raise InputError(f"{second}, field name", b.name, "both scenarios have this name", remedy)
    chosen = a.seed if seed is None else seed
    a, b = (s.model_copy(update={"seed": chosen}) for s in (a, b))
    default = None if replications else 0.02
    rule = Asked(replications, default if half_width is None else half_width).rule(a)
    with open_executor("local", jobs or 1) as executor, progress_bar("Comparing") as progress:
        found = pair(
            a,
            b,
            rule,
            executor=executor,
            profile_uncertainty=profile_uncertainty or None,
            on_progress=now_and_then(progress),
        )
    print_paired(found)
    say_derived((a, b))
    if out is not None:
        write_json(out, paired_dict(found))
        typer.echo(f"Figures written to {out}")


@statistics_app.command()
def coverage(
    out: Annotated[Path, typer.Option(help="JSON file of every seed's intervals; continued if it exists.")] = Path(
        "coverage.json"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each queue.")] = 200,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    length: Annotated[
        float, typer.Option(min=0.01, help="Scales the length of every run; short ones cover less.")
    ] = 1.0,
    jobs: Jobs = None,
) -> None:
    """How often nominal 95 % intervals hold the truth: M/M/1, M/D/1, M/M/4 and M/E2/1 through the serving code.

    Exit code 1 if a queue's intervals hold it in fewer than 90 or more than 99 % of the seeds.
    """
    from heliosim.console import progress_bar
    from heliosim.coverage import run_coverage
    from heliosim.executors import open_executor
    from heliosim.statistics_view import print_coverage

    with open_executor("local", jobs or 1) as executor, progress_bar("Coverage") as progress:
        rows = run_coverage(
            out, seeds=seeds, first_seed=first_seed, length=length, executor=executor, on_progress=progress
        )
    print_coverage(rows)
    typer.echo(f"Intervals of every seed written to {out}")
    if not all(row.passes for row in rows):
        raise typer.Exit(1)


@statistics_app.command()
def crn(
    profile: Annotated[str, typer.Option(help="Profile folder, or the name of a shipped one.")] = "tiny-opt-cpu",
    pairs: Annotated[int, typer.Option(min=5, help="Pairs of runs, paired and independent.")] = 60,
    rate: Annotated[float, typer.Option(min=0.001, help="Poisson arrivals per second.")] = 20.0,
    requests: Annotated[int, typer.Option(min=20, help="Requests in each run.")] = 240,
    jobs: Jobs = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random stream.")] = 0,
    out: Annotated[Optional[Path], typer.Option(help="Also write the figures to this JSON file.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
) -> None:
    """How much common random numbers narrow the difference of two policies, against independent seeds.

    Exit code 1 if the variance of a difference does not fall to a third or less in one of the metrics.
    """
    from heliosim.console import progress_bar, say_derived_profiles
    from heliosim.executors import open_executor
    from heliosim.formats.files import require_new_file, write_json
    from heliosim.randomness import run_crn, to_dict
    from heliosim.statistics_view import print_crn

    require_new_file(out, overwrite=overwrite)
    with open_executor("local", jobs or 1) as executor, progress_bar("Common random numbers") as progress:
        rows = run_crn(
            profile, pairs=pairs, rate_per_s=rate, requests=requests, seed=seed, executor=executor, on_progress=progress
        )
    print_crn(rows, pairs, rate, requests)
    say_derived_profiles({profile})
    if out is not None:
        write_json(out, [to_dict(row) for row in rows])
        typer.echo(f"Figures written to {out}")
    if not all(row.passes for row in rows):
        raise typer.Exit(1)
