"""Two profiles side by side: sizes, step times over a grid, loads, energy, exits. Differences: B against A, signed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from heliosim.behaviour import ANY_SOURCE, Behaviour
from heliosim.costs import StepCost, StepShape, load_seconds, load_terms
from heliosim.formats.profile import ClockName, ModelFacts, Profile
from heliosim.types import BLOCK_TOKENS, Load, ModelSpec, Placement, blocks_for

ROWS, CONTEXTS, PROMPTS = (1, 8, 32, 128), (128, 1024, 4096), (64, 512, 2048)


class Line(NamedTuple):
    """One thing of both: ``group`` it belongs to (a table), ``model``, ``what``, and its values; None: not known."""

    group: str
    model: str
    what: str
    unit: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """(b - a) / a; None where one is unknown or a is 0."""
        if self.a is None or self.b is None:
            return None
        if self.a == 0:
            return 0.0 if self.b == 0 else None
        return (self.b - self.a) / self.a


@dataclass(frozen=True)
class ProfileDiff:
    """``only_a``, ``only_b``: models that the other does not have; ``notes``: what could not be compared."""

    lines: tuple[Line, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        return not (self.only_a or self.only_b or self.notes) and all(line.a == line.b for line in self.lines)


def compare_profiles(a: Profile, b: Profile) -> ProfileDiff:
    """Everything both say of the models they share."""
    lines: list[Line] = []
    notes: list[str] = []
    ours, theirs = a.facts.models, b.facts.models
    for name in [n for n in ours if n in theirs]:
        one, other = ours[name], theirs[name]
        lines += _sizes(name, one, other)
        for field in ("dtype", "exits", "exit_kind", "architecture"):
            if getattr(one, field) != getattr(other, field):
                notes.append(f"{name}: {field} {_said(getattr(one, field))} and {_said(getattr(other, field))}")
        clocks = _clocks(one, other)
        if clocks is None:
            notes.append(f"{name}: no clock in common")
            continue
        if clocks[0] != clocks[1]:
            notes.append(f"{name}: times of A are on the {clocks[0]} clock, of B on the {clocks[1]} clock")
        costs = (a.step_cost(name, clocks[0]), b.step_cost(name, clocks[1]))
        lines += _steps(name, (one, other), costs)
        lines += _loads(name, (one, other), (a.load_cost(name, clocks[0]), b.load_cost(name, clocks[1])))
    lines.append(Line("energy", "", "power while stepping", "W", a.busy_watts, b.busy_watts))
    lines += _behaviour(a, b)
    only_a, only_b = ([n for n in x if n not in y] for x, y in ((ours, theirs), (theirs, ours)))
    return ProfileDiff(tuple(lines), tuple(only_a), tuple(only_b), tuple(notes))


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _clocks(a: ModelFacts, b: ModelFacts) -> tuple[ClockName, ClockName] | None:
    clocks: tuple[ClockName, ClockName] = ("wall", "cpu")
    common = next((c for c in clocks if c in a.step and c in b.step), None)
    if common is not None:
        return common, common
    ours, theirs = next(iter(a.step), None), next(iter(b.step), None)
    return None if ours is None or theirs is None else (ours, theirs)


def _sizes(name: str, a: ModelFacts, b: ModelFacts) -> list[Line]:
    fields = (
        ("layers", "", 1.0), ("tensor_parallel", "GPUs", 1.0), ("layer_bytes", "MB", 1e6), ("base_bytes", "MB", 1e6),
        ("kv_bytes_per_token_layer", "B", 1.0), ("hidden_bytes", "B", 1.0), ("max_context", "tokens", 1.0),
    )  # fmt: skip
    return [
        Line("sizes", name, field.replace("_", " "), unit, getattr(a, field) / per, getattr(b, field) / per)
        for field, unit, per in fields
    ]


def _steps(name: str, models: tuple[ModelFacts, ModelFacts], costs: tuple[StepCost, StepCost]) -> list[Line]:
    """Milliseconds of steps inside both ranges, at full depth, and of the first exit's decode step."""
    most_rows, most_context = min(c.max_rows for c in costs), min(c.max_context for c in costs)
    most_tokens = min(c.max_tokens for c in costs)
    found = []

    def add(region: str, what: str, shapes: Sequence[StepShape]) -> None:
        a, b = (1e3 * cost.seconds(shape) for cost, shape in zip(costs, shapes, strict=True))
        found.append(Line(f"steps, {region}", name, what, "ms", a, b))

    for rows in ROWS:
        for context in CONTEXTS:
            if rows <= most_rows and context <= most_context:
                shapes = [decode_shape(m.layers, rows, context) for m in models]
                add("decode", f"{rows} x {context}", shapes)
    for prompt in PROMPTS:
        if prompt <= min(most_context, most_tokens):
            add("prefill", f"{prompt}", [prefill_shape(m.layers, prompt) for m in models])
            rows = min(32, most_rows - 1)
            if rows > 0 and prompt + rows <= most_tokens:
                add("mixed", f"{prompt} + {rows} x {prompt}", [mixed_shape(m.layers, prompt, rows) for m in models])
    if models[0].exits == models[1].exits and len(models[0].exits) > 1:
        first = models[0].exits[0]
        context = min(CONTEXTS[0], most_context)
        add("first exit", f"1 x {context}, {first} layers", [decode_shape(first, 1, context)] * 2)
    return found


def decode_shape(layers: int, rows: int, context: int) -> StepShape:
    """``rows`` of ``context`` tokens each emit a token."""
    gathered = rows * blocks_for(context) * BLOCK_TOKENS
    return StepShape(rows, rows, rows, gathered, 0, 0, layers, 1, rows, 0, 0, 0, context, rows * context)


def prefill_shape(layers: int, prompt: int) -> StepShape:
    """One whole prompt."""
    return StepShape(1, prompt, 0, 0, 1, prompt * prompt, layers, 1, 1, 0, 1, 0, prompt)


def mixed_shape(layers: int, prompt: int, rows: int) -> StepShape:
    """One whole prompt beside ``rows`` that hold as many tokens."""
    d = decode_shape(layers, rows, prompt)
    return d._replace(
        rows=rows + 1, tokens=rows + prompt, prefill_rows=1, prefill_products=prompt * prompt,
        checked_rows=rows + 1, started=1,
    )  # fmt: skip


def _loads(name: str, models: tuple[ModelFacts, ModelFacts], costs: Sequence[object]) -> list[Line]:
    """Milliseconds to load all layers from nothing, and to add the last exit's layers."""
    found = []
    for what, resident in (("all layers", 0), ("last exit", None)):
        values: list[float | None] = []
        for facts, cost in zip(models, costs, strict=True):
            spec: ModelSpec = facts.spec(name)
            have = resident if resident is not None else (spec.exits[-2] if len(spec.exits) > 1 else None)
            if have is None:
                values.append(None)
                continue
            load = Load(Placement(name, spec.layers), 0, "")
            values.append(1e3 * load_seconds(cost, load_terms(load, spec, have, 0)))  # type: ignore[arg-type]
        if None not in values:
            found.append(Line("loads", name, what, "ms", values[0], values[1]))
    return found


def _behaviour(a: Profile, b: Profile) -> list[Line]:
    """Share of tokens that leave by each exit of the full model, each at its profile's threshold."""
    if not (a.has_behaviour and b.has_behaviour):
        known = [None if not p.has_behaviour else float(p.facts.behaviour.rows) for p in (a, b)]
        return [] if known == [None, None] else [Line("exits", "", "tokens recorded", "", known[0], known[1])]
    found = [
        Line("exits", "", "threshold", "", a.facts.behaviour.threshold, b.facts.behaviour.threshold),
    ]
    for name in [n for n in a.facts.models if n in b.facts.models]:
        ours, theirs = (_shares(p.behaviour, name, p.facts.behaviour.threshold) for p in (a, b))
        for layer in sorted(set(ours) | set(theirs)):
            found.append(Line("exits", name, f"leave at {layer}", "%", _pc(ours, layer), _pc(theirs, layer)))
    return found


def _shares(behaviour: Behaviour, name: str, threshold: float) -> dict[int, float]:
    source = f"{name}:threshold"
    sources = {key for _, key in behaviour.texts}
    return behaviour.exit_shares(name, source if source in sources else ANY_SOURCE, threshold)


def _pc(shares: dict[int, float], layer: int) -> float | None:
    return 100 * shares[layer] if layer in shares else None


def print_diff(a: Profile, b: Profile, diff: ProfileDiff) -> None:
    """Tables by group, at any width; who is who, and what could not be compared."""
    import statistics

    from heliosim.console import console
    from heliosim.fitted import Column, print_fitted
    from heliosim.tables import percent

    out = console()
    for letter, p in (("A", a), ("B", b)):
        device = p.facts.device.get("gpu") or p.facts.device.get("host_cpu")
        out.print(f"{letter}  {p.folder.name} · {p.origin} · {device}")
    out.print("difference = (B − A) / A\n")
    columns = [Column("model", is_name=True), Column("what", is_name=True), *map(Column, ("A", "B", "diff."))]
    for group in dict.fromkeys(line.group for line in diff.lines):
        lines = [line for line in diff.lines if line.group == group]
        rows = [(x.model, f"{x.what}, {x.unit}" if x.unit else x.what, _n(x.a), _n(x.b), percent(x.difference))
                for x in lines]  # fmt: skip
        known = [x.difference for x in lines if x.difference is not None]
        said = ""
        if group.startswith("steps") and known:
            said = f": median {percent(statistics.median(known))}, {percent(min(known))} to {percent(max(known))}"
        print_fitted(out, group + said, columns, rows)
    for letter, names in (("A", diff.only_a), ("B", diff.only_b)):
        if names:
            out.print(f"only in {letter}: {', '.join(names)}")
    for note in diff.notes:
        out.print(note)
    out.print("the same in everything compared" if diff.is_same else "they differ")


def _n(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
