"""How often a token is the full model's, against how sure its exit was."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import finish
from heliosim.charts.style import Style, placement_colours
from heliosim.charts.theme import rgba
from heliosim.formats.results import RunResults


def agreement_data(runs: Iterable[RunResults], bins: int = 10) -> pd.DataFrame:
    """Share of tokens that equal the full model's choice, by confidence at their exit.

    Columns model, exit_layer, confidence (mean in the bin), agreement, low, high (95 % Wilson interval),
    tokens. Tokens of a model's deepest exit are left out where all agree: there the comparison is with
    itself.
    """
    columns = ["model", "exit_layer", "confidence", "agrees"]
    frames = [run.tokens.select(columns).to_pandas() for run in runs]
    tokens = pd.concat(frames, ignore_index=True).dropna(subset=["agrees"]) if frames else pd.DataFrame()
    out = ["model", "exit_layer", "confidence", "agreement", "low", "high", "tokens"]
    if tokens.empty:
        return pd.DataFrame(columns=out)
    tokens["agrees"] = tokens["agrees"].astype(float)
    deepest = tokens.groupby("model")["exit_layer"].transform("max") == tokens["exit_layer"]
    perfect = tokens.groupby(["model", "exit_layer"])["agrees"].transform("min") == 1
    tokens = tokens[~(deepest & perfect)]
    slot = (tokens["confidence"] * bins).astype(int).clip(upper=bins - 1).rename("slot")
    found = (
        tokens.groupby(["model", "exit_layer", slot])
        .agg(confidence=("confidence", "mean"), agreement=("agrees", "mean"), tokens=("agrees", "size"))
        .reset_index()
    )
    found["low"], found["high"] = _wilson(found["agreement"].to_numpy(), found["tokens"].to_numpy())
    return found[out]


def _wilson(
    share: npt.NDArray[np.float64], count: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """95 % score interval of a share."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def agreement_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """How often a token is the full model's, against how sure its exit was; one panel per model, one line per
    exit.
    """
    models = sorted(data["model"].unique()) or ["no tokens with known agreement"]
    fig = make_subplots(cols=len(models), rows=1, subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.05)
    colours = placement_colours(
        ((str(m), int(e)) for m, e in zip(data["model"], data["exit_layer"], strict=True)), style.theme
    )
    for col, model in enumerate(models, start=1):
        fig.add_scatter(
            x=[0, 100],
            y=[0, 100],
            mode="lines",
            line={"color": style.theme.muted, "width": 1.2, "dash": "dot"},
            name="agreement = confidence",
            showlegend=col == 1,
            hoverinfo="skip",
            row=1,
            col=col,
        )
        part = data[data["model"] == model]
        for exit_layer, curve in part.groupby("exit_layer", sort=True):
            colour = colours[model, int(str(exit_layer))]
            fig.add_scatter(
                x=100 * curve["confidence"],
                y=100 * curve["agreement"],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": 100 * (curve["high"] - curve["agreement"]),
                    "arrayminus": 100 * (curve["agreement"] - curve["low"]),
                    "color": rgba(colour, 0.55),
                    "thickness": 1.4,
                    "width": 3,
                },
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"color": colour, "size": 7},
                name=f"{model}, layer {exit_layer} ({int(curve['tokens'].sum()):,} tokens)",
                customdata=curve["tokens"],
                hovertemplate="confidence %{x:.0f} %, agreement %{y:.1f} %<br>%{customdata:,} tokens<extra></extra>",
                row=1,
                col=col,
            )
    fig.update_xaxes(title_text="confidence at the exit (%)", range=[0, 102])
    fig.update_yaxes(range=[0, 104])
    fig.update_yaxes(title_text="tokens equal to the full model's (%)", row=1, col=1)
    caption = "bars: 95 % interval" + (f" · {style.caption}" if style.caption else "")
    return finish(fig, "Agreement against confidence, by exit", caption, height=470, theme=style.theme)
