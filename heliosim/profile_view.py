"""Profiles for people: open by folder or shipped name, show what was measured and how well it fits, check the books."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from heliosim.errors import UnknownNameError
from heliosim.fitted import Column, print_fitted
from heliosim.formats.profile import ModelFacts, Profile, load_profile
from heliosim.hardware_view import hardware_problems, show_hardware, show_verdicts
from heliosim.memory_model import STEP_TOKENS, largest_batch, needs_of
from heliosim.tables import counted


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


def show_profile(profile: Profile, *, sources: bool = False) -> None:
    """Print device, sizes, costs with errors, and premises; with ``sources`` every word of where they are from."""
    from heliosim.console import console

    facts = profile.facts
    device = facts.device
    name = device.get("gpu") or device.get("host_cpu")
    out = console()
    out.print(
        f"[bold]{profile.folder.name}[/] · {profile.origin}, {name}"
        f"{f' ({threads} thread(s))' if (threads := device.get('threads')) else ''} · seed {facts.seed}"
    )
    _show_derivation(profile, sources)
    if profile.random_models:
        seeds = ", ".join(f"{n} (seed {facts.models[n].weights_seed})" for n in profile.random_models)
        out.print(f"[yellow]random weights: {seeds}. Times and bytes are real; there are no exits and no texts[/]")
    out.print(f"energy: {_energy(profile, sources)}\n")
    print_fitted(out, "Models", *_sizes(facts.models))
    memory = device.get("gpu_memory_bytes")
    for model, m in facts.models.items():
        weights = m.spec(model).weights_bytes(m.layers)
        if isinstance(memory, int) and weights > memory:
            out.print(
                f"[yellow]{model} does not fit: {_bytes(weights)} of weights per GPU, {_bytes(memory)} of memory; "
                "give more GPUs (--tp), or serve fewer layers[/]\n"
            )
    scored = {
        "measured": "error on held-out cells",
        "derived": "error on held-out composed steps",
        "composed": "terms against the operator times they were made of (no error of an engine's steps)",
    }
    print_fitted(out, f"Step times: fit and {scored[facts.kind]}", *_fits(facts.models))
    show_verdicts(profile)
    show_hardware(profile)
    show_premises(profile)


def _energy(profile: Profile, sources: bool) -> str:
    energy = profile.facts.energy
    if energy.source == "unavailable":
        shown = "unavailable"
    elif energy.busy_w is not None:
        shown = f"{energy.busy_w:g} W while stepping, {energy.source}"
    elif energy.decode_w is not None:
        each = "" if profile.gpus == 1 else f", on each of {profile.gpus} GPUs"
        watts = f"{_watts(energy.idle_w)} idle, {_watts(energy.decode_w)} decoding, {_watts(energy.prefill_w)} reading"
        shown = f"{watts}{each}, {energy.source}"
    else:
        shown = f"{energy.idle_w} W idle, {energy.joules_per_step_second} W more while stepping"
    if not energy.reason:
        return shown
    is_long = profile.facts.kind == "composed" and energy.source != "unavailable" and not sources
    return f"{shown} ({_short(energy.reason) if is_long else energy.reason.rstrip(' ;')})"


def _sizes(models: Mapping[str, ModelFacts]) -> tuple[list[Column], list[list[str]]]:
    """Bytes are those of one rank; the number of ranks is shown where there are several."""
    several = any(m.tensor_parallel > 1 for m in models.values())
    columns = [
        Column("model", is_name=True),
        *([Column("GPUs")] if several else []),
        Column("layers"),
        Column("exits"),
        Column("exit kind", optional=2),
        Column("dtype", optional=1),
        Column("weights\nper GPU" if several else "weights"),
        Column("a layer"),
        Column("KV B per\ntoken and\nlayer"),
        Column("longest\ncontext"),
    ]
    rows = [
        [
            model,
            *([str(m.tensor_parallel)] if several else []),
            str(m.layers),
            ", ".join(map(str, m.exits)),
            m.exit_kind,
            m.dtype,
            _bytes(m.spec(model).weights_bytes(m.layers)),
            _bytes(m.layer_bytes),
            f"{m.kv_bytes_per_token_layer:,}",
            f"{m.max_context:,}",
        ]
        for model, m in models.items()
    ]
    return columns, rows


def _fits(models: Mapping[str, ModelFacts]) -> tuple[list[Column], list[list[str]]]:
    """Errors of the fits and up to where they hold; what repeats say only where something was repeated."""
    fits = [(model, clock, fit) for model, m in models.items() for clock, fit in m.step.items()]
    was_repeated = any(fit.cell_spread or fit.holdout.repeat_error is not None for _, _, fit in fits)
    columns = [
        Column("model", is_name=True),
        Column("clock", is_name=True),
        Column("steps", optional=1),
        *([Column("cell\nspread"), Column("noise\nfloor")] if was_repeated else []),
        Column("median\n|err|"),
        Column("p90\n|err|"),
        Column("signed\nmean"),
        Column("rows\n≤"),
        Column("context\n≤"),
        Column("tokens\n≤"),
    ]
    rows = []
    for model, clock, fit in fits:
        h = fit.holdout
        repeated = [f"{fit.cell_spread:.1%}", "–" if h.repeat_error is None else f"{h.repeat_error:.1%}"]
        errors = [f"{h.median_abs_error:.1%}", f"{h.p90_abs_error:.1%}", f"{h.mean_signed_error:+.1%}"]
        limits = [f"{fit.max_rows:,}", f"{fit.max_context:,}", f"{fit.max_tokens:,}"]
        rows.append([model, clock, f"{fit.steps:,}", *(repeated if was_repeated else []), *errors, *limits])
    return columns, rows


def _watts(watts: float | None) -> str:
    return "unknown W" if watts is None else f"{watts:.0f} W"


def _bytes(count: int) -> str:
    """Three or four figures in the unit that suits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _short(text: str) -> str:
    """A source's name, or a text, up to its first comma, semicolon, colon or bracket."""
    return re.split(r"[,;:(]", text, maxsplit=1)[0].strip()


def _show_derivation(profile: Profile, sources: bool) -> None:
    """Print where a derived or composed profile comes from, in short or in full; nothing for a measured one."""
    from heliosim.console import console

    derivation = profile.facts.derivation
    if derivation is None:
        return
    out = console()
    out.print(f"[yellow]{derivation.method}[/]")
    composition = profile.facts.composition
    lines = [("assumed", line) for line in derivation.assumptions]
    lines += [("cross-check", line) for line in derivation.cross_checks]
    if sources:
        for source in derivation.sources:
            out.print(f"  from {source.name}: {source.used_for} ({source.licence})")
            if source.url:
                out.print(f"       {source.url}", soft_wrap=True)
    else:
        used: dict[str, list[str]] = {}
        for source in derivation.sources:
            used.setdefault(_short(source.name), []).append(source.used_for.split("(")[0].strip())
        for name, uses in used.items():
            out.print(f"  from {name}: {', '.join(dict.fromkeys(uses))}")
        extrapolated = composition.extrapolated if composition is not None else ()
        lines = [("EXTRAPOLATED beyond the device's curves", line) for line in extrapolated]
    made_up = derivation.synthetic if sources else derivation.synthetic[:1]
    for word, line in [*(("synthetic", line) for line in made_up), *lines]:
        out.print(f"  {word}: {line}")
    if not sources:
        counts = [counted(len(derivation.assumptions), "assumption")]
        counts += [counted(len(derivation.cross_checks), "cross-check")] if derivation.cross_checks else []
        out.print(f"  {' and '.join(counts)}, and every source in full: heliosim profile show --sources")


def show_premises(profile: Profile) -> None:
    """Print the three premises of HELIOS as they stand in this profile."""
    from heliosim.console import console

    if not profile.facts.premises:
        return
    out = console()
    room = max(0, out.width - 80)
    columns = [
        Column("premise", is_name=True, wrap=16 + room // 3),
        Column("subject", is_name=True, wrap=16 + room // 3),
        Column("detail", is_name=True, wrap=19 + room // 3),
        Column("value"),
        Column("holds\nfrom"),
        Column("verdict"),
    ]
    colour = {"holds": "green", "partly": "yellow", "weak": "red"}
    rows = [
        [
            str(row["premise"]), str(row["subject"]), str(row["detail"]), f"{row['value']:.2f}",
            f"{row['holds_from']:.2f}", f"[{colour.get(str(row['verdict']), 'white')}]{row['verdict']}[/]",
        ]
        for row in profile.facts.premises
    ]  # fmt: skip
    print_fitted(out, f"HELIOS premises, {'measured' if profile.is_measured else 'of synthetic exits'}", columns, rows)


def _behaviour_rows(profile: Profile) -> int:
    """Rows of the behaviour table, given texts included; 0 without one. Reading it checks it."""
    import pyarrow.parquet as pq

    if not profile.has_behaviour or not profile.behaviour.texts:
        return 0
    return int(pq.read_metadata(profile.folder / "behaviour.parquet").num_rows)


def check_profile(profile: Profile) -> int:
    """Print one line per check; 0 if the profile can be used, 2 if not. Reading it checked schema and digests."""
    from heliosim.console import console

    out = console()
    problems = []
    out.print("schema and digests: ok")
    for name, facts in profile.facts.models.items():
        problems += _check_model(name, facts)
    problems += hardware_problems(profile)
    rows = _behaviour_rows(profile)
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
