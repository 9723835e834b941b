"""Colours and themes of figures, and a few sums with colours.

Systems take ``SYSTEM_PALETTE`` (after Okabe and Ito, told apart by colour-blind readers); models take other hues
(``MODEL_RAMPS``), weak for shallow placements and strong for deep ones, so a placement never looks like a system. On
dark paper the few colours that would sink into it have a lighter twin of the same hue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

SYSTEM_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#8C564B")
"""Blue, vermilion, green, pink, amber, sky, grey, brown; systems beyond the eighth begin again."""
MODEL_RAMPS = (("#D5D9F2", "#3D3F91"), ("#F6E0B5", "#8A4B08"), ("#BFE3DC", "#0F5E56"), ("#F3CFDA", "#8E2447"))
"""From shallow to deep: indigo, ochre, teal, rose; one ramp per model, in order of name."""
DARK_RAMPS = (("#2C2F63", "#A7ADF2"), ("#4B3413", "#F0B866"), ("#12403A", "#7FD6C8"), ("#4E1D2E", "#F2A5BB"))
"""The same hues on dark paper, where the strong end is the bright one."""
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

Ramps = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Theme:
    """Ink and paper. ``twins``: what a colour becomes on this paper, where it would not be seen as it is."""

    name: str
    ink: str
    muted: str
    grid: str
    line: str
    accent: str
    paper: str
    idle: str
    ramps: Ramps
    twins: Mapping[str, str] = field(default_factory=dict)

    def shown(self, colour: str) -> str:
        """A palette colour as this theme shows it."""
        return self.twins.get(colour, colour)

    def ramp(self, number: int) -> tuple[str, str]:
        """Weak and strong end of the ramp of the model with this number."""
        return self.ramps[number % len(self.ramps)]


LIGHT = Theme(
    name="light", ink="#1F2933", muted="#5F6B76", grid="#E6EAEE", line="#C5CDD5", accent="#B3261E", paper="#FFFFFF",
    idle="#9AA5B1", ramps=MODEL_RAMPS,
)  # fmt: skip
DARK = Theme(
    name="dark", ink="#E6EAF0", muted="#A3AEBB", grid="#29313B", line="#4A5562", accent="#FF8A80", paper="#12161A",
    idle="#7A8592", ramps=DARK_RAMPS,
    twins=MappingProxyType({"#0072B2": "#3A9BDC", "#D55E00": "#EE7733", "#009E73": "#1DB88A", "#CC79A7": "#DB8CB8",
                            "#56B4E9": "#8FD0F5", "#4D4D4D": "#B4BCC6", "#8C564B": "#C08A7E"}),
)  # fmt: skip
THEMES: Mapping[str, Theme] = MappingProxyType({"light": LIGHT, "dark": DARK})
INK, MUTED, GRID, ACCENT = LIGHT.ink, LIGHT.muted, LIGHT.grid, LIGHT.accent


def mix(light: str, dark: str, share: float) -> str:
    """A colour between two ``#RRGGBB`` ones: ``share`` 0 is the first, 1 the second."""
    ends = [_parts(c) for c in (light, dark)]
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(*ends, strict=True))


def rgba(colour: str, alpha: float) -> str:
    """A ``#RRGGBB`` colour with an opacity from 0 to 1."""
    r, g, b = _parts(colour)
    return f"rgba({r},{g},{b},{alpha})"


def text_on(colour: str) -> str:
    """White or near black, whichever is read better on a colour."""
    r, g, b = _parts(colour)
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 140 else LIGHT.ink


def _parts(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
