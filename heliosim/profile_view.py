"""Profiles for people: open by folder or shipped name, show what was measured and how well it fits, check the books."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from heliosim.errors import UnknownNameError
from heliosim.formats.profile import ModelFacts, Profile, load_profile
from heliosim.memory_model import STEP_TOKENS, largest_batch, needs_of


def shipped_profiles() -> dict[str, Path]:
    """Reference profiles in the package, by name."""
    root = Path(str(resources.files("heliosim.profiles")))
    return {p.parent.name: p.parent for p in sorted(root.glob("*/profile.json"))}


def open_profile(name_or_folder: str) -> Profile:
    """A profile by folder, or by the name of a shipped one."""
    folder = Path(name_or_folder)
    shipped = shipped_profiles()
    if not folder.exists() and name_or_folder in shipped:
        folder = shipped[name_or_folder]
    elif not folder.exists() and "/" not in name_or_folder:
        raise UnknownNameError("profile", name_or_folder, shipped)
    return load_profile(folder)


def show_profile(profile: Profile) -> None:
    """Print device, sizes, costs with errors, behaviour and premises."""
    from rich.table import Table

    from heliosim.console import console

    facts = profile.facts
    device = facts.device
    name = device.get("gpu") or device.get("host_cpu")
    out = console()
    out.print(
        f"[bold]{profile.folder.name}[/] · {profile.origin}, {name}"
        f"{f' ({threads} thread(s))' if (threads := device.get('threads')) else ''} · seed {facts.seed}"
    )
    _show_derivation(profile)
    energy = facts.energy
    shown = (
        "unavailable"
        if energy.source == "unavailable"
        else f"{energy.busy_w:g} W while stepping, {energy.source}"
        if energy.busy_w is not None
        else f"{_watts(energy.idle_w)} idle, {_watts(energy.decode_w)} decoding, {_watts(energy.prefill_w)} reading, "
        f"on each of {profile.gpus} GPU(s), {energy.source}"
        if energy.decode_w is not None
        else f"{energy.idle_w} W idle, {energy.joules_per_step_second} W more while stepping"
    )
    out.print(f"energy: {shown} {f'({energy.reason})' if energy.reason else ''}")
    sizes = Table(title="Models", title_justify="left")
    for column in ("model", "layers", "exits", "dtype", "weights MB", "layer kB", "KV B/token/layer", "context"):
        sizes.add_column(column, justify="left" if column in ("model", "exits", "dtype") else "right")
    for model, m in facts.models.items():
        weights = m.spec(model).weights_bytes(m.layers)
        exits = f"{', '.join(map(str, m.exits))} ({m.exit_kind})"
        sizes.add_row(
            model, str(m.layers), exits, m.dtype, f"{weights / 1e6:.2f}", f"{m.layer_bytes / 1e3:.1f}",
            str(m.kv_bytes_per_token_layer), str(m.max_context),
        )  # fmt: skip
    out.print(sizes)
    scored = {
        "measured": "error on held-out cells",
        "derived": "error on held-out composed steps",
        "composed": "terms against the operator times they were made of (no error of an engine's steps)",
    }
    fits = Table(title=f"Step times: fit and {scored[facts.kind]}", title_justify="left")
    for column in (
        "model",
        "clock",
        "steps",
        "cell spread",
        "noise floor",
        "median |error|",
        "p90 |error|",
        "signed mean",
        "range",
    ):
        fits.add_column(column, justify="left" if column in ("model", "clock", "range") else "right")
    for model, m in facts.models.items():
        for clock, fit in m.step.items():
            h = fit.holdout
            limits = f"batch ≤ {fit.max_rows}, context ≤ {fit.max_context}, {fit.max_tokens} tok/step"
            fits.add_row(
                model, clock, f"{fit.steps:,}", f"{fit.cell_spread:.1%}",
                "–" if h.repeat_error is None else f"{h.repeat_error:.1%}", f"{h.median_abs_error:.1%}",
                f"{h.p90_abs_error:.1%}", f"{h.mean_signed_error:+.1%}", limits,
            )  # fmt: skip
    out.print(fits)
    show_premises(profile)


def _watts(watts: float | None) -> str:
    return "unknown W" if watts is None else f"{watts:.0f} W"


def _show_derivation(profile: Profile) -> None:
    """Print where a derived profile comes from; nothing for a measured one."""
    from heliosim.console import console

    derivation = profile.facts.derivation
    if derivation is None:
        return
    out = console()
    out.print(f"[yellow]{derivation.method}[/]")
    for source in derivation.sources:
        out.print(f"  from {source.name}: {source.used_for} ({source.licence})")
    for word, lines in (
        ("assumed", derivation.assumptions),
        ("synthetic", derivation.synthetic),
        ("cross-check", derivation.cross_checks),
    ):
        for line in lines:
            out.print(f"  {word}: {line}")


def show_premises(profile: Profile) -> None:
    """Print the three premises of HELIOS as they stand in this profile."""
    from rich.table import Table

    from heliosim.console import console

    if not profile.facts.premises:
        return
    origin = "measured" if profile.is_measured else "of synthetic exits"
    table = Table(title=f"HELIOS premises, {origin}", title_justify="left")
    for column in ("premise", "subject", "value", "holds from", "verdict", "detail"):
        table.add_column(column, justify="right" if column in ("value", "holds from") else "left", overflow="fold")
    colour = {"holds": "green", "partly": "yellow", "weak": "red"}
    for row in profile.facts.premises:
        verdict = str(row["verdict"])
        table.add_row(
            row["premise"], row["subject"], f"{row['value']:.2f}", f"{row['holds_from']:.2f}",
            f"[{colour.get(verdict, 'white')}]{verdict}[/]", row["detail"],
        )  # fmt: skip
    console().print(table)


def check_profile(profile: Profile) -> int:
    """Print one line per check; 0 if the profile can be used, 2 if not. Reading it checked schema and digests."""
    from heliosim.console import console

    out = console()
    problems = []
    out.print("schema and digests: ok")
    for name, facts in profile.facts.models.items():
        problems += _check_model(name, facts)
    rows = sum(t.tokens for t in profile.behaviour.texts.values()) if profile.has_behaviour else 0
    if rows != profile.facts.behaviour.rows:
        problems.append(f"behaviour: {rows} rows in the table, {profile.facts.behaviour.rows} in profile.json")
    for problem in problems:
        out.print(f"[red]problem[/] {problem}")
    if not problems:
        out.print(f"{len(profile.facts.models)} models, {rows:,} behaviour rows: all checks passed")
    return 2 if problems else 0


def _check_model(name: str, facts: ModelFacts) -> list[str]:
    """What cannot be true of one model, as sentences."""
    problems = []
    spec = facts.spec(name)
    if list(facts.exits) != sorted(set(facts.exits)) or facts.exits[-1] != facts.layers:
        problems.append(f"{name}: exits {facts.exits} must ascend to the last of {facts.layers} layers")
    needs = needs_of(facts, STEP_TOKENS)
    for batch in facts.largest_batch:
        rows = largest_batch(spec, batch.depth, batch.context_tokens, batch.budget_bytes, needs)
        if rows != batch.rows:
            problems.append(
                f"{name}@{batch.depth}: {batch.rows} rows in {batch.budget_bytes} B, the byte model says {rows}"
            )
    for clock, fit in facts.step.items():
        if fit.holdout.median_abs_error > 0.25:
            problems.append(
                f"{name}: {clock} step times miss held-out cells by {fit.holdout.median_abs_error:.0%}; calibrate again"
            )
    return problems
