"""Exit specs and behaviour tables for a terminal, 80 columns. Every page says whether it shows synthetic exits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heliosim.behaviour import ANY_SOURCE, Behaviour
from heliosim.console import console
from heliosim.fitted import Column, print_fitted
from heliosim.synthetic.exits import autocorrelation
from heliosim.synthetic.solve import Solved
from heliosim.synthetic.spec import Figure, Pair, ends_of
from heliosim.synthetic.table import BehaviourFile

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
SYNTHETIC = "synthetic: drawn from published and assumed figures, not measured"


def print_spec(solved: Solved) -> None:
    """Shares by exit at several thresholds, parameters, pairs, and every assumption."""
    from rich.markup import escape

    spec, out = solved.spec, console()
    out.print(f"[bold]{escape(spec.name)}[/] · [yellow]{SYNTHETIC}[/]")
    if spec.about:
        out.print(escape(spec.about))
    thresholds = sorted({*THRESHOLDS, solved.threshold})
    rows, ends = [], []
    for name, family in solved.families.items():
        for threshold in thresholds:
            left = family.left(threshold)
            said = "given" if threshold == solved.threshold else ""
            shares = " ".join(f"{e}: {x:.1%}" for e, x in zip(family.exits, left, strict=True))
            depth = f"{family.mean_depth(threshold):.1f} of {family.exits[-1]}"
            rows.append([name, f"{threshold:g}", shares, depth, f"{family.perplexity(threshold):.2f}", said])
        ends.append(len(rows) - 1)
    columns = [
        Column("model", is_name=True, wrap=14),
        Column("TH", is_name=True),
        Column("leave at exit", is_name=True, wrap=26),
        Column("mean depth"),
        Column("perpl."),
        Column("", optional=1),
    ]
    print_fitted(out, "Synthetic shares of tokens by exit, at several thresholds", columns, rows, ends=ends)
    rows = []
    for pair in spec.pairs:
        (one, beyond), (other, by) = ends_of(pair)
        beyond = beyond or solved.families[one].exits[0]
        by = by or solved.families[other].exits[0]
        alone = float(solved.families[other].left(solved.threshold)[: solved.families[other].exits.index(by) + 1].sum())
        rows.append(
            [f"beyond {one}@{beyond}", f"left by {other}@{by}", f"{solved.conditional(one, beyond, other, by):.1%}",
             f"{alone:.1%}", f"{solved.correlation_of(one, other):.3f}",
             "solved" if isinstance(pair, Pair) else "given"]
        )  # fmt: skip
    if rows:
        columns = [
            Column("of tokens", is_name=True, wrap=18),
            Column("these have", is_name=True, wrap=18),
            Column("share"),
            Column("of all"),
            Column("correlation"),
            Column("is"),
        ]
        print_fitted(out, "Synthetic joint exits of two models", columns, rows)
    for line in figure_lines(solved):
        out.print(escape(line))


def figure_lines(solved: Solved) -> list[str]:
    """Every figure of the spec with its source, a line each."""
    spec = solved.spec

    def line(what: str, figure: Figure) -> str:
        return f"{what} {figure.value:g} ({figure.source})"

    lines = [line("threshold", spec.threshold)]
    for name, model in spec.models.items():
        lines.append(f"{name}: shares by exit ({model.left.source})")
        for what in ("perplexity", "sigma", "confident_of_rest"):
            figure = getattr(model, what)
            if figure is not None:
                lines.append(line(f"{name}: {what}", figure))
        if model.sigma is None:
            lines.append(f"{name}: sigma {solved.families[name].sigma[0]:.2f} (solved from the perplexity)")
        lines.append(f"{name}: agreement ({model.agreement.source})")
    for pair in spec.pairs:
        names = " and ".join(name for name, _ in ends_of(pair))
        lines.append(line(f"{names}:", pair.share if isinstance(pair, Pair) else pair.correlation))
    for name, task in spec.tasks.items():
        lines.append(f"task {name}: {task.prompt_tokens} prompt, {task.output_tokens} output tokens ({task.source})")
    for what in ("depth_correlation", "autocorrelation", "request_effect", "floor"):
        lines.append(line(what, getattr(spec.tokens, what)))
    return lines


def print_table(said: BehaviourFile, behaviour: Behaviour, name: str) -> None:
    """What a table's texts hold, by model and task: shares by exit, agreement, and what neighbours have in common."""
    from rich.markup import escape

    out = console()
    word = {
        "synthetic": SYNTHETIC,
        "imported": "imported exits, measured by others; see below what is not",
        "measured": "measured",
    }[said.origin]
    texts = sum(said.facts.tasks.values())
    out.print(f"[bold]{escape(name)}[/] · [yellow]{word}[/]")
    out.print(f"{texts:,} texts, {said.facts.rows:,} tokens, threshold {said.facts.threshold:g}")
    rows, ends = [], []
    for model, exits in said.exits.items():
        for task in said.facts.tasks:
            rows.append([model, task, *_task_cells(behaviour, model, exits, task, said.facts.threshold)])
        ends.append(len(rows) - 1)
    columns = [
        Column("model", is_name=True, wrap=14),
        Column("task", is_name=True, wrap=14),
        Column("leave at exit", is_name=True, wrap=26),
        Column("depth"),
        Column("agree"),
        Column("lag-1", optional=1),
    ]
    title = said.origin.capitalize()
    print_fitted(out, f"{title} exits under the threshold, by task", columns, rows, ends=ends)
    for line in said.about:
        out.print(f"  {escape(line)}")


def _task_cells(
    behaviour: Behaviour, model: str, exits: Sequence[int], task: str, threshold: float
) -> tuple[str, str, str, str]:
    """Shares by exit, mean depth, agreement of tokens where they leave, lag-1 autocorrelation of exit depth."""
    from heliosim.types import ExitRule, Placement

    rule, placement = ExitRule("threshold", threshold), Placement(model, exits[-1])
    names = behaviour.sequences[task]
    source = f"{model}:full" if f"{model}:full" in behaviour.sources else ANY_SOURCE
    walks = [behaviour.walk(behaviour.text(q, source), placement, rule) for q in names]
    depths = np.concatenate([w.exit_layers for w in walks])
    agrees = np.concatenate([w.agrees for w in walks])
    shares = " ".join(f"{e}: {float((depths == e).mean()):.1%}" for e in exits)
    lag = autocorrelation(depths)
    return shares, f"{depths.mean():.1f}", f"{agrees.mean():.1%}", "–" if lag is None else f"{lag:+.2f}"
