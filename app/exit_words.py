"""Figures of the page Exits in words with their numbers, and the tables behind them."""

from __future__ import annotations

import pandas as pd

from heliosim.behaviour_summary import BehaviourSummary


def shares_alt(summary: BehaviourSummary) -> str:
    said = []
    for model in summary.models.values():
        part = model.shares[model.shares["threshold"] == summary.threshold]
        shares = zip(part["exit_layer"], part["share"], strict=True)
        said.append(f"{model.model}: " + ", ".join(f"layer {e} {100 * s:.0f} %" for e, s in shares))
    return "; ".join(said) + "."


def curve_alt(summary: BehaviourSummary) -> str:
    said = []
    for model in summary.models.values():
        row = model.curve.iloc[(model.curve["threshold"] - summary.threshold).abs().argmin()]
        said.append(f"{model.model} {row['mean_depth']:.1f} layers and {100 * row['agreement']:.1f} %")
    return f"At {summary.threshold:g}: {', '.join(said)}."


def depth_alt(summary: BehaviourSummary) -> str:
    said = []
    for model in summary.models.values():
        points = zip(model.depths["exit_layer"], model.depths["agreement"], strict=True)
        said.append(f"{model.model}: " + ", ".join(f"layer {e} {100 * a:.0f} %" for e, a in points))
    return "; ".join(said) + "."


def joint_alt(joint: pd.DataFrame) -> str:
    """The commonest pair of exits of a ``joint_table``."""
    one, other = list(joint.columns[:2])
    top = joint.sort_values("share", kind="stable").iloc[-1]
    return f"Most often layer {top[one]:.0f} and layer {top[other]:.0f}: {100 * top['share']:.1f} % of tokens."


def correlation_alt(summary: BehaviourSummary) -> str:
    said = [f"{m.model} {m.correlation.iloc[0]['value']:.2f}" for m in summary.models.values() if len(m.correlation)]
    return f"One token apart: {', '.join(said) or 'unknown'}."


def runs_alt(summary: BehaviourSummary) -> str:
    said = []
    for model in summary.models.values():
        rows = zip(model.runs["exit_layer"], model.runs["mean"], strict=True)
        said.append(f"{model.model}: " + ", ".join(f"layer {e} {mean:.2f} tokens" for e, mean in rows))
    return "; ".join(said) + "."


def tables_of(summary: BehaviourSummary) -> dict[str, pd.DataFrame]:
    """Exit shares by task, and agreement by depth, of all models."""
    models = summary.models.values()
    return {
        "exit shares by task": pd.concat([m.by_task.assign(model=m.model) for m in models], ignore_index=True),
        "agreement by depth": pd.concat([m.depths.assign(model=m.model) for m in models], ignore_index=True),
    }
