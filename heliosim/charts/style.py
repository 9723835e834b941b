"""What figures of one report or page share: a colour per system, a caption, light or dark paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from heliosim.charts.theme import LIGHT, SYSTEM_PALETTE, Theme, mix
from heliosim.formats.profile import ORIGINS, least_sure
from heliosim.formats.results import RunResults
from heliosim.metrics import SystemResult

ROLES: tuple[tuple[str, tuple[int, ...]], ...] = (("vanilla", (0, 5)), ("early exit", (1, 4)), ("helios", (2,)))
"""Places in the palette of what a system's name begins with: the first such system, and the second."""


@dataclass(frozen=True)
class Style:
    """A colour per system, the line that says what figures rest on, and the theme they are drawn in. ``signs``: of a
    caption that stand in one line.
    """

    colours: Mapping[str, str]
    caption: str = ""
    theme: Theme = LIGHT
    signs: int = 112

    @classmethod
    def of(cls, systems: Sequence[SystemResult], theme: Theme = LIGHT) -> Style:
        return cls.named([s.name for s in systems], caption_of(systems), theme)

    @classmethod
    def named(cls, names: Iterable[str], caption: str = "", theme: Theme = LIGHT) -> Style:
        """A style for systems known by name only."""
        return cls(system_colours(names, theme), caption, theme)

    def noted(self, note: str) -> Style:
        """The same with a note before the caption."""
        return replace(self, caption=" · ".join(part for part in (note, self.caption) if part))


def system_colours(names: Iterable[str], theme: Theme = LIGHT) -> dict[str, str]:
    """A colour per system: what vanilla, early exit and HELIOS are called keep theirs whatever stands beside them,
    others take what is left, by order of first mention.
    """
    unique = list(dict.fromkeys(names))
    places: dict[str, int] = {}
    for prefix, own in ROLES:
        of_role = [name for name in unique if name.lower().replace("-", " ").startswith(prefix)]
        if prefix == "helios":
            of_role.sort(key=len)  # HELIOS itself before its variants
        places |= dict(zip(of_role, own, strict=False))
    reserved = {own[0] for _, own in ROLES}
    spare = [*(3, 4, 5, 6, 7), *reserved]
    for name in unique:
        if name not in places:
            free = [place for place in spare if place not in places.values()] or list(range(len(SYSTEM_PALETTE)))
            places[name] = free[len(places) % len(free)] if len(free) == len(SYSTEM_PALETTE) else free[0]
    return {name: theme.shown(SYSTEM_PALETTE[places[name]]) for name in unique}


def caption_of(systems: Sequence[SystemResult]) -> str:
    """Sample sizes and seeds of all runs, in one line."""
    runs = [run for s in systems for run in s.runs]
    simulated = [s.simulated for s in systems if s.simulated is not None]
    live = [run for s in systems for run in s.live]
    parts = [f"{span(run.requests.num_rows for run in runs)} requests per run"]
    parts += [f"seed {span(run.info.seed for run in runs)}"]
    parts += ["1 simulated run per system"] if simulated else []
    if live:
        clocks = "/".join(sorted({run.info.clock for run in live}))
        parts.append(f"{span(len(s.live) for s in systems if s.live)} measured runs each ({clocks} clock)")
    if any(run.info.replayed_exits for run in runs):
        parts.append("exits replayed")
    kind = least_sure(run.info.profile_kind for run in runs)
    if kind != "measured":
        parts.append(f"profile {ORIGINS[kind]}")
    if fitted := sorted({run.info.behaviour for run in runs} - {"replay"}):
        parts.append(f"exits drawn from a fitted model ({', '.join(fitted)})")
    return " · ".join(parts)


def run_caption(run: RunResults) -> str:
    """Sample size, seed and origin of one run."""
    origin = "simulated" if run.info.mode == "simulated" else f"measured, {run.info.clock} clock"
    origin += "" if run.info.profile_kind == "measured" else f", {run.info.profile_kind} profile"
    origin += ", exits replayed" if run.info.replayed_exits else ""
    origin += "" if run.info.behaviour == "replay" else f", exits of a fitted model ({run.info.behaviour})"
    return f"{run.requests.num_rows} requests · {run.tokens.num_rows:,} tokens · seed {run.info.seed} · {origin}"


def span(values: Iterable[int]) -> str:
    """One number, or the least and the greatest of several."""
    found = sorted(set(values))
    if not found:
        return "0"
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,}–{found[-1]:,}"


def placement_colours(placements: Iterable[tuple[str, int]], theme: Theme = LIGHT) -> dict[tuple[str, int], str]:
    """A colour per (model, layer): a ramp per model, from its shallowest layer here to its deepest."""
    unique = sorted(set(placements))
    colours: dict[tuple[str, int], str] = {}
    for i, model in enumerate(sorted({m for m, _ in unique})):
        weak, strong = theme.ramp(i)
        layers = [layer for m, layer in unique if m == model]
        for k, layer in enumerate(layers):
            share = 0.75 if len(layers) == 1 else 0.3 + 0.7 * k / (len(layers) - 1)
            colours[model, layer] = mix(weak, strong, share)
    return colours
