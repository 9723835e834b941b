"""Where KV ends, drawn: the largest batch and the tokens per second it gives, against context and against depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from heliosim.formats.profile import ORIGINS, Profile
from heliosim.memory_model import MemoryNeeds, cliff, needs_of
from heliosim.types import Bytes

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from heliosim.report import Section

FEWEST_TOKENS = 64
"""The shortest context drawn."""
WANTED_COLOUR = "#5F6B76"


@dataclass(frozen=True)
class CliffData:
    """``by_context``: every exit over contexts that double; ``by_depth``: every depth at the contexts asked for.

    Columns model, depth, context, rows, tok_per_s, wanted, wanted_tok_per_s, as in ``memory_model.CliffRow``.
    """

    by_context: pd.DataFrame
    by_depth: pd.DataFrame
    caption: str


def cliff_data(profile: Profile, budget: Bytes, contexts: Sequence[int], wanted: int, step_tokens: int) -> CliffData:
    """Every model of a profile; contexts and rows no further than its costs were fitted to."""
    wide: list[dict[str, Any]] = []
    deep: list[dict[str, Any]] = []
    for name, facts in profile.facts.models.items():
        spec, cost = facts.spec(name), profile.step_cost(name, profile.clock())
        needs, last = needs_of(facts, step_tokens), min(cost.max_context, spec.max_context)
        doubled = _doubled(last)
        for depths, over, found in (
            (spec.exits, doubled, wide),
            (tuple(range(1, spec.layers + 1)), [c for c in contexts if c <= last], deep),
        ):
            found += [{"model": name, **vars(row)} for row in cliff(spec, cost, budget, over, wanted, needs, depths)]
    kind = "" if profile.facts.kind == "measured" else f" · profile {ORIGINS[profile.facts.kind]}"
    caption = f"{budget / 1e9:.4g} GB for one GPU · steps of {step_tokens:,} tokens at most{kind}"
    columns = ["model", "depth", "context", "rows", "tok_per_s", "wanted", "wanted_tok_per_s"]
    return CliffData(pd.DataFrame(wide, columns=columns), pd.DataFrame(deep, columns=columns), caption)


def _doubled(last: int) -> list[int]:
    """Contexts that double up to the last one, which is among them."""
    found = [min(FEWEST_TOKENS, last)]
    while 2 * found[-1] < last:
        found.append(2 * found[-1])
    return found if found[-1] == last else [*found, last]


def context_figure(data: CliffData) -> go.Figure:
    """Rows and tokens per second against context, a line per exit; a column of panels per model."""
    return _figure(data.by_context, "context", "depth", "Where KV ends, by context", data.caption)


def depth_figure(data: CliffData) -> go.Figure:
    """Rows and tokens per second against the layers loaded, a line per context; a column of panels per model."""
    return _figure(data.by_depth, "depth", "context", "Where KV ends, by depth", data.caption)


def _figure(table: pd.DataFrame, across: str, each: str, title: str, caption: str) -> go.Figure:
    from plotly.subplots import make_subplots

    from heliosim.charts import finish, placement_colours

    models = list(dict.fromkeys(table["model"]))
    fig = make_subplots(
        rows=2, cols=len(models), subplot_titles=models, shared_xaxes=True, vertical_spacing=0.07,
        horizontal_spacing=0.09,
    )  # fmt: skip
    colours = placement_colours(zip(table["model"], table[each].astype(int), strict=True))
    for col, model in enumerate(models, start=1):
        part = table[table["model"] == model]
        for value, line in part.groupby(each, sort=True):
            level = int(str(value))
            name = f"layer {level}" if each == "depth" else f"{level:,} tokens"
            name = name if len(models) == 1 else f"{model}, {name}"
            style = {"color": colours[model, level], "width": 2}
            shown = line[line["rows"] > 0]
            for row, column, unit in ((1, "rows", "rows"), (2, "tok_per_s", "tok/s")):
                fig.add_scatter(
                    x=shown[across], y=shown[column], name=name, legendgroup=name, showlegend=row == 1, line=style,
                    mode="lines+markers" if across == "context" else "lines", marker={"size": 5}, row=row, col=col,
                    hovertemplate=f"{across} %{{x:,}}: %{{y:,.0f}} {unit}<extra>{name}</extra>",
                )  # fmt: skip
            fig.add_scatter(
                x=line[across], y=line["wanted_tok_per_s"], name=name, legendgroup=name, showlegend=False,
                line=style | {"dash": "dot", "width": 1.3}, mode="lines", row=2, col=col,
                hovertemplate=f"{across} %{{x:,}}: %{{y:,.0f}} tok/s without end<extra>{name}</extra>",
            )  # fmt: skip
        wanted = part["wanted"].iloc[0] if len(part) else 0
        fig.add_scatter(
            x=[part[across].min(), part[across].max()], y=[wanted, wanted], mode="lines", row=1, col=col,
            line={"color": WANTED_COLOUR, "width": 1.2, "dash": "dash"}, name="rows wanted", legendgroup="wanted",
            showlegend=col == 1, hoverinfo="skip",
        )  # fmt: skip
    axis = {"title_text": "tokens each request holds"} if across == "context" else {"title_text": "layers loaded"}
    fig.update_xaxes(**axis, row=2)
    if across == "context":
        fig.update_xaxes(type="log", **_ticks(sorted(set(table["context"]))))
    for row, column in ((1, "rows"), (2, "tok_per_s")):
        fig.update_yaxes(type="log", **_ticks(_round_between(table[column])), row=row)
    fig.update_yaxes(title_text="rows that fit", row=1, col=1)
    fig.update_yaxes(title_text="output tok/s of decoding", row=2, col=1)
    said = f"{caption} · dotted: if KV did not end"
    return finish(fig, title, said, height=760).update_layout(margin={"t": 168})


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks of an axis in logarithms at these values alone."""
    return {"tickmode": "array", "tickvals": list(values), "ticktext": [f"{v:,.10g}" for v in values]}


def _round_between(column: pd.Series[float]) -> list[float]:
    """1, 2 and 5 times powers of ten as far as the positive values go."""
    found = column[column > 0]
    low, high = (found.min(), found.max()) if len(found) else (1.0, 1.0)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [k * 10.0**p for p in powers for k in (1, 2, 5) if low / 2.5 <= k * 10.0**p <= high * 2.5]


def memory_sections(data: CliffData) -> list[Section]:
    from heliosim.report import Column, Figure, Section, Table

    places = data.by_depth[data.by_depth["rows"] < data.by_depth["wanted"]]
    rows = [
        [
            str(r.model),
            f"{r.depth}",
            f"{r.context:,}",
            f"{r.rows:,}",
            f"{r.tok_per_s:,.0f}",
            f"{r.wanted_tok_per_s:,.0f}",
        ]
        for r in places.itertuples()
        if _is_exit(data, str(r.model), int(str(r.depth)))
    ]
    columns = [Column("model"), *(Column(n, "number") for n in ("layers", "context", "rows", "tok/s", "without end"))]
    return [
        Section(
            "By context",
            "How many requests of so many tokens fit beside the weights, up to those wanted, and what decoding with "
            "that many gives. Where a solid line leaves the dotted one of its colour, KV ends before the rows wanted.",
            (Figure(context_figure(data)),),
        ),
        Section(
            "By depth",
            "The same against the layers loaded: fewer layers leave more bytes, of which each request needs less.",
            (Figure(depth_figure(data)),),
        ),
        Section(
            "Where KV ends first",
            "Exits and contexts at which fewer rows fit than were wanted.",
            (
                Table(
                    columns, rows, "Output tokens per second of decode steps" if rows else "None: all wanted rows fit."
                ),
            ),
        ),
    ]


def _is_exit(data: CliffData, model: str, depth: int) -> bool:
    table = data.by_context
    return bool(((table["model"] == model) & (table["depth"] == depth)).any())


def write_memory_report(
    profile: Profile, path: Path, budget: Bytes, contexts: Sequence[int], wanted: int, step_tokens: int
) -> None:
    """One HTML file: the figures, the places where rows are missing, and what stands beside weights and KV."""
    from heliosim.report import write_report

    data = cliff_data(profile, budget, contexts, wanted, step_tokens)
    provenance = {"profile": f"{profile.folder.name} ({profile.origin})", "device": _device(profile)}
    for name, facts in profile.facts.models.items():
        provenance[name] = _beside(
            needs_of(facts, step_tokens), facts.spec(name).request_bytes, _sources(profile, name)
        )
    write_report(
        path,
        f"Memory of {profile.folder.name}",
        memory_sections(data),
        subtitle=data.caption,
        provenance=provenance,
    )


def _device(profile: Profile) -> str:
    device: Mapping[str, object] = profile.facts.device
    return str(device.get("gpu") or device.get("host_cpu") or device.get("device"))


def _sources(profile: Profile, name: str) -> Mapping[str, str]:
    memory = profile.facts.models[name].memory
    return {} if memory is None else memory.sources


def _beside(needs: MemoryNeeds, request_bytes: Bytes, sources: Mapping[str, str]) -> str:
    if not needs.fixed and not request_bytes and needs.cap is None:
        return "the profile knows nothing beside weights and KV"
    parts = [f"{needs.fixed / 1e6:,.1f} MB beside weights and KV", f"{request_bytes:,} B per request"]
    parts += [] if needs.cap is None else [f"at most {needs.cap} rows"]
    parts += [f"{what.replace('_', ' ')}: {source}" for what, source in sources.items()]
    return "; ".join(parts)
