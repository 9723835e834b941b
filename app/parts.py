"""Pieces of every page: tiles, captions, charts with a description, downloads, uploads, and how trouble is shown."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import streamlit as st
from heliosim_app.jobs import Trouble, trouble_of
from heliosim_app.work import Ticket, desk

from heliosim.formats.profile import CAUTIONS, ORIGINS, ProfileKind
from heliosim.plan_words import number
from heliosim.stats import Interval

Verdict = Literal["meets", "misses", "undecided", "none"]
VERDICTS: dict[str, tuple[str, str]] = {
    "meets": ("green", ":material/check_circle:"),
    "misses": ("red", ":material/cancel:"),
    "undecided": ("orange", ":material/help:"),
}
KINDS: dict[str, tuple[str, str]] = {
    "measured": ("green", "Measured: step times and exits come from runs of these models on this device."),
    "derived": ("orange", CAUTIONS["derived"]),
    "composed": ("orange", CAUTIONS["composed"]),
    "synthetic exits": ("orange", "Exits are drawn from a specification, not from text that a model wrote."),
    "imported exits": ("orange", "Exits were measured by others and taken over; what they did not publish is drawn."),
    "replayed": ("blue", "Exits are played back from a recording, not what the served models said."),
    "simulated": ("blue", "A simulation: nothing ran on a device."),
    "live": ("green", "A live run: steps really ran on this device."),
}


# --- numbers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A number worth a glance. ``value`` with its unit, ``spread`` the interval, ``note`` what to hold it against."""

    label: str
    value: str
    spread: str = ""
    note: str = ""
    verdict: Verdict = "none"
    help: str = ""


def tile(label: str, interval: Interval | None, unit: str, *, scale: float = 1.0, **more: Any) -> Tile:
    """A tile of a mean over replications. Without a mean it says why there is none."""
    if interval is None or interval.mean is None:
        reason = (interval.reason if interval else "") or "unavailable"
        return Tile(label, "–", reason, **more)
    value = f"{number(scale * interval.mean)} {unit}".strip()
    if interval.is_constant or interval.half_width is None:
        said = "the same in every run" if interval.is_constant else "interval unavailable"
        return Tile(label, value, said, **more)
    return Tile(label, value, f"± {number(scale * interval.half_width)} {unit}".strip(), **more)


def tiles(shown: Sequence[Tile], *, columns: int = 4) -> None:
    """Tiles in rows; on a narrow window they wrap."""
    cells = "".join(_tile(one) for one in shown)
    st.html(f'<div class="hs-tiles" style="--hs-columns:{columns}">{cells}</div>')


def _tile(one: Tile) -> str:
    mark = {"meets": "meets", "misses": "misses", "undecided": "undecided"}.get(one.verdict, "")
    badge = f'<span class="hs-mark hs-{mark}">{mark}</span>' if mark else ""
    title = f' title="{escape(one.help)}"' if one.help else ""
    return (
        f'<div class="hs-tile"{title}><div class="hs-label">{escape(one.label)}{badge}</div>'
        f'<div class="hs-value">{escape(one.value)}</div>'
        f'<div class="hs-spread">{escape(one.spread) or "&nbsp;"}</div>'
        f'<div class="hs-note">{escape(one.note)}</div></div>'
    )


STYLE = """<style>
.hs-tiles {display: grid; gap: .75rem; margin: .25rem 0 .5rem;
  grid-template-columns: repeat(auto-fit, minmax(max(10.5rem, 100% / var(--hs-columns) - .75rem), 1fr));}
.hs-tile {border: 1px solid color-mix(in srgb, currentColor 18%, transparent); border-radius: .5rem;
  padding: .65rem .85rem .6rem; min-width: 0;}
.hs-label {font-size: .85rem; opacity: .8; display: flex; justify-content: space-between; gap: .5rem;
  align-items: center;}
.hs-value {font-size: 1.55rem; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums;}
.hs-spread {font-size: .9rem; font-variant-numeric: tabular-nums;}
.hs-note {font-size: .8rem; opacity: .75; overflow-wrap: anywhere;}
.hs-mark {font-size: .75rem; border-radius: 1rem; padding: .05rem .5rem; white-space: nowrap; font-weight: 600;}
.hs-meets {background: #009E7326; color: light-dark(#00694d, #4fd6b0);}
.hs-misses {background: #D55E0026; color: light-dark(#a34700, #ff9a52);}
.hs-undecided {background: #E69F0026; color: light-dark(#7d5700, #f4c152);}
.hs-sentence {font-size: 1.45rem; line-height: 1.4; font-weight: 500; margin: .25rem 0 .5rem;}
[data-testid="stMainBlockContainer"] {max-width: 78rem; padding-top: 3.25rem;}
[class*="st-key-hs-pair"] [data-testid="stHorizontalBlock"] {flex-wrap: wrap;}
[class*="st-key-hs-pair"] [data-testid="stColumn"] {min-width: min(30rem, 100%);}
</style>"""


def caption(*said: str) -> None:
    """What a figure or table rests on: sample size, seed, units, origin. Empty parts are left out."""
    st.caption(" · ".join(part for part in said if part))


def badges(*kinds: str) -> None:
    """Where figures come from, for all to see. Kinds are keys of ``KINDS``."""
    with st.container(horizontal=True, gap="small"):
        for kind in dict.fromkeys(kinds):
            colour, said = KINDS[kind]
            label = ORIGINS.get(kind, kind) if kind in ORIGINS else kind
            st.badge(label, color=colour, help=said)


def kinds_of(profile: Any) -> list[str]:
    """What must be said of a profile's figures."""
    kind: ProfileKind = profile.facts.kind
    return ["simulated", kind, *(["synthetic exits"] if kind != "measured" and profile.has_behaviour else [])]


def is_dark() -> bool:
    """Whether the reader's theme is dark."""
    return getattr(st.context.theme, "type", None) == "dark"


def chart(figure: Any, alt: str, *, key: str, said: Sequence[str] = ()) -> None:
    """A plotly figure in the reader's theme, with ``alt`` for those who cannot see it and a caption below."""
    st.plotly_chart(
        themed(figure),
        alt=alt,
        key=key,
        theme=None,
        config={"displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d"]},
    )
    if said:
        caption(*said)


INKS = {"#1F2933": "#E8ECEF", "#5F6B76": "#A9B4BE", "#E6EAEE": "#37414A", "#B3261E": "#FF8A80"}
"""Ink of figures on light paper, and what it becomes on dark paper."""


def themed(figure: Any) -> Any:
    """A figure on the reader's paper: the same picture with light ink if the theme is dark."""
    import plotly.graph_objects as go

    content = figure.to_plotly_json()
    if is_dark():
        content = _inked(content)
    made = go.Figure(content)
    made.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    if is_dark():
        made.update_layout(hoverlabel={"bgcolor": "#20262B", "font": {"color": "#E8ECEF"}})
    return made


def _inked(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _inked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_inked(v) for v in value]
    if isinstance(value, str):
        for light, dark in INKS.items():
            value = value.replace(light, dark).replace(light.lower(), dark)
        return value.replace("rgba(255,255,255", "rgba(18,22,26") if value.startswith("rgba") else value
    return value


# --- waiting and trouble --------------------------------------------------------------------------------------


def show_trouble(trouble: Trouble, on: Any = None) -> None:
    """Why there is nothing to show: one line, and for the unexpected what to send us."""
    where = on or st
    if trouble.is_expected:
        where.error(plain(trouble.text), icon=":material/error:")
        return
    where.error(
        f"Something went wrong that should not have: {plain(trouble.text)}. The other pages work on. "
        "Please report it with the file below and the address of this page.",
        icon=":material/bug_report:",
    )
    where.download_button(
        "Report for the developers",
        report_text(trouble),
        "heliosim-dashboard-report.txt",
        "text/plain",
        key=f"report-{abs(hash(trouble.details))}",
        on_click="ignore",
    )


def report_text(trouble: Trouble) -> str:
    """What a developer needs: versions, the inputs, where it happened."""
    from importlib import metadata

    names = ("heliosim", "streamlit", "plotly", "numpy", "pandas", "pyarrow")
    versions = "\n".join(f"{name} {metadata.version(name)}" for name in names)
    inputs = "\n".join(f"{k} = {v!r}" for k, v in sorted(st.session_state.get("_kept", {}).items()))
    return f"{trouble.text}\n\nPython {platform.python_version()}\n{versions}\n\n{inputs}\n\n{trouble.details}"


def escaped(text: str) -> str:
    """Text as HTML that shows it as it is."""
    return escape(text)


def style_of(names: Sequence[str], said: str = "") -> Any:
    """Colours and paper of figures: one colour per system on every page, light or dark as the reader has it."""
    from heliosim.charts import Style
    from heliosim.charts.theme import DARK, LIGHT

    return Style.named(names, said, DARK if is_dark() else LIGHT)


def plain(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]#$~<>|:" else c for c in text)


def guarded(page: Callable[[], None]) -> Callable[[], None]:
    """A page that explains what it meets: a user's error in one line, the unexpected with what to report."""

    def run() -> None:
        try:
            page()
        except Exception as error:  # nobody should see a traceback
            show_trouble(trouble_of(error))

    return run


def await_ticket(ticket: Ticket, what: str, *, at_once_s: float = 0.8) -> Any:
    """The value of work that was asked for; None while it goes on (with progress and a button to cancel), and after
    trouble, which is shown. The page runs again when the work ends.
    """
    if ticket.wait(at_once_s):
        if ticket.state == "done":
            return ticket.value
        if ticket.trouble is not None:
            show_trouble(ticket.trouble)
        else:
            st.warning(f"{what} was cancelled.", icon=":material/stop_circle:")
        st.button("Try again", key=f"again-{ticket.key}", on_click=desk().forget, args=(ticket.key,))
        return None
    _progress(ticket, what)
    return None


@st.fragment(run_every=0.4)
def _progress(ticket: Ticket, what: str) -> None:
    if ticket.wait(0):
        st.rerun()
    lines, share = ticket.progress
    with st.container(horizontal=True, vertical_alignment="center"):
        st.progress(min(1.0, max(0.0, share)), text=f"{what}: {lines[-1] if lines else 'starting'}")
        st.button("Cancel", key=f"cancel-{ticket.key}", on_click=desk().cancel, args=(ticket,), icon=":material/stop:")
    if len(lines) > 1:
        with st.expander(f"{len(lines)} steps so far"):
            st.text("\n".join(lines[-20:]))


# --- links, downloads, uploads --------------------------------------------------------------------------------


def link(page: str, label: str, *, key: str, icon: str | None = None, help: str | None = None, **changes: Any) -> None:
    """A button that opens a page (by its url path) with every input as it is, but for ``changes``. Nothing if there is
    no such page.
    """
    from heliosim_app import state
    from heliosim_app.main import page_of

    there = page_of(page)
    if there is not None and st.button(label, key=key, icon=icon, help=help, on_click=state.put, args=(changes,)):
        st.switch_page(there)


@dataclass(frozen=True)
class Download:
    """A file to take away; ``data`` may be a function that makes it when asked."""

    label: str
    name: str
    data: Any
    mime: str


def downloads(*files: Download, key: str) -> None:
    """Buttons in a row."""
    with st.container(horizontal=True):
        for k, one in enumerate(files):
            st.download_button(
                one.label, one.data, one.name, one.mime, key=f"{key}-{k}", on_click="ignore", icon=":material/download:"
            )


def table_downloads(frame: Any, name: str, *, key: str) -> None:
    """A table as CSV and as Parquet."""
    downloads(
        Download("CSV", f"{name}.csv", lambda: frame.to_csv(index=False).encode(), "text/csv"),
        Download("Parquet", f"{name}.parquet", lambda: parquet_of(frame), "application/vnd.apache.parquet"),
        key=key,
    )


def parquet_of(frame: Any) -> bytes:
    from io import BytesIO

    held = BytesIO()
    frame.to_parquet(held, index=False)
    return held.getvalue()


TRACE_MB, PROFILE_MB = 10, 20


def upload_trace(key: str) -> Path | None:
    """A trace somebody brings: JSON lines or CSV, checked as ``heliosim trace`` does. None until one is good."""
    from heliosim_app.uploads import take_trace

    held = st.file_uploader(
        "Request trace", ["jsonl", "csv"], key=key, max_upload_size=TRACE_MB, help=f"At most {TRACE_MB} MB."
    )
    return None if held is None else _taken(lambda: take_trace(held.name, held.getvalue()))


def upload_profile(key: str) -> str | None:
    """A profile somebody brings, as a zip of its folder; answers the name to choose it by."""
    from heliosim_app.uploads import take_profile

    said = f"A zip of the profile's folder, at most {PROFILE_MB} MB. Files are checked, never run."
    held = st.file_uploader("Profile", ["zip"], key=key, max_upload_size=PROFILE_MB, help=said)
    return None if held is None else _taken(lambda: take_profile(held.getvalue()))


def _taken(take: Callable[[], Any]) -> Any:
    try:
        return take()
    except Exception as error:  # whatever a strange file does to a reader is the file's fault
        trouble = trouble_of(error)
        text = trouble.text if trouble.is_expected else f"the file cannot be read ({trouble.text})"
        show_trouble(Trouble(f"{text} Nothing was taken over."))
        return None
