"""Hardware cells of a profile for the terminal: a few lines of what they found; the report has it all."""

from __future__ import annotations

from heliosim.fitted import Column, print_fitted
from heliosim.formats.hardware_facts import HardwareFacts, ModelHardware
from heliosim.formats.profile import Profile
from heliosim.hold_out import sentence

DECODE_ROWS, DECODE_CONTEXT = 1, 128
"""The decode step whose layer is shown."""


def show_hardware(profile: Profile) -> None:
    """Print what the cells of a profile say; nothing where it has none."""
    from heliosim.console import console

    hardware = profile.facts.hardware
    if hardware is None:
        return
    out = console()
    drift = hardware.drift
    steady = "" if drift is None else f"; reference {drift.low:.2f} to {drift.high:.2f} of usual, "
    steady += "" if drift is None else f"{drift.rejected} cells measured again, {drift.unsteady} unsteady"
    out.print(
        f"hardware cells: {hardware.cells} ({hardware.mode}, {hardware.spent_s:.0f} s, {hardware.clock} clock; "
        f"{hardware.skipped} skipped for the budget, {hardware.saved} not needed{steady})"
    )
    print_fitted(out, "Single parts (medians)", *_parts(hardware))
    if hardware.links:
        print_fitted(out, "Ways to the device", *_links(hardware))
    for kind, reason in hardware.unavailable.items():
        out.print(f"  not measured: {kind.replace('_', ' ')} ({reason})")
    out.print()


def show_verdicts(profile: Profile) -> None:
    """Print whether held-out step times meet their bar, of a measured profile."""
    from heliosim.console import console

    if not profile.is_measured:
        return
    clock = profile.clock()
    for name, model in profile.facts.models.items():
        console().print(f"{name}, {clock} clock: {sentence(model.step[clock].holdout)}")
    console().print()


def hardware_problems(profile: Profile) -> list[str]:
    """What the cells of a profile found that cannot be true of it, as sentences."""
    hardware, found = profile.facts.hardware, []
    for name, model in ({} if hardware is None else hardware.models).items():
        if name not in profile.facts.models:
            found.append(f"hardware cells of {name}, of which the profile knows nothing else")
        for b in model.largest_batch:
            if b.rows > b.formula_rows or (b.limit == "arena budget" and b.rows != b.formula_rows):
                where = f"{name}@{b.depth}, {b.context_tokens} tokens in {b.budget_bytes} B"
                found.append(f"{where}: {b.rows} rows were allocated, the byte model says {b.formula_rows}")
        for k in model.kv_blocks:
            if k.engine_blocks != k.pool_blocks:
                found.append(
                    f"{name}@{k.depth}: the engine holds {k.engine_blocks} KV blocks, the pool {k.pool_blocks}"
                )
    return found


def _parts(hardware: HardwareFacts) -> tuple[list[Column], list[list[str]]]:
    columns = [
        Column("model", is_name=True), Column("layer,\ndecode\n1 row"), Column("layer\nerror"),
        Column("head\n1 row"), Column("check\n1 row"), Column("host\na step"), Column("ingress\n100 tokens"),
        Column("activations\nB/token"), Column("graph\nreplay"), Column("largest\nbatches"),
    ]  # fmt: skip
    rows = [[name, *_part(model)] for name, model in hardware.models.items()]
    return columns, rows


def _part(model: ModelHardware) -> list[str]:
    layer = model.layer
    per = layer.seconds_per if layer is not None else {}
    decode = per.get("launch", 0.0) + per.get("decode", 0.0) + per.get("decode_row", 0.0)
    decode += per.get("decode_kv", 0.0) * DECODE_CONTEXT
    score = None if layer is None else layer.holdout.get("all")
    activations = model.bytes.get("activations per token")
    agree = sum(b.rows == b.formula_rows for b in model.largest_batch)
    return [
        _us(decode) if layer is not None else "–",
        "–" if score is None else f"{score.median_abs_error:.1%}",
        _at(model, "head", 1),
        _at(model, "check:max-prob", 1),
        _host(model, "host_step", 1),
        _host(model, "ingress", 100),
        "–" if activations is None else f"{activations.measured_bytes:,.0f}",
        _us(model.graphs[0].replay.value) if model.graphs else "–",
        f"{agree} of {len(model.largest_batch)} as the byte model" if model.largest_batch else "–",
    ]


def _at(model: ModelHardware, part: str, count: int) -> str:
    line = model.parts.get(part)
    return "–" if line is None else _us(line.fixed_s + line.per_unit_s * count)


def _host(model: ModelHardware, part: str, count: int) -> str:
    line = model.host.get(part)
    return "–" if line is None else _us(line.fixed_s + line.per_unit_s * count)


def _links(hardware: HardwareFacts) -> tuple[list[Column], list[list[str]]]:
    columns = [
        Column("source", is_name=True), Column("alone"), Column("beside\ndecoding"), Column("decode\nslows by"),
        Column("transfer\nslows by"),
    ]  # fmt: skip
    rows = []
    for source, link in hardware.links.items():
        beside = "–" if link.beside_decode is None else f"{link.beside_decode.value / 1e9:.2f} GB/s"
        slows = ["–" if s is None else f"{s:.2f}" for s in (link.decode_slowdown, link.transfer_slowdown)]
        rows.append([source, f"{link.alone.value / 1e9:.2f} GB/s", beside, *slows])
    return columns, rows


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} µs"
