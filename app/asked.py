"""The question that the inputs of a page ask, and the widgets that ask it."""

from __future__ import annotations

from typing import Any

from heliosim_app import state
from heliosim_app.question import LOADS, MODELS, Question, devices, systems


def question() -> Question:
    """What the inputs say, drawn or not. Raises InputError for values that do not go together."""
    ttft, tpot = float(state.value("ttft")), float(state.value("tpot"))
    models, device = state.value("models"), state.value("device")
    if device not in devices(models):
        device = devices(models)[0]
    known = systems(models, device)
    system = state.value("system")
    return Question(
        models=models,
        device=device,
        system=system if system in known else next(iter(known)),
        load=state.value("load"),
        rate_per_s=float(state.value("rate")),
        prompt_tokens=int(state.value("prompt")),
        output_tokens=int(state.value("output")),
        requests=int(state.value("requests")),
        ttft_ms=ttft or None,
        tpot_ms=tpot or None,
        seed=int(state.value("seed")),
        max_batch=int(state.value("batch")),
        step_tokens=int(state.value("step_tokens")),
        memory_share=state.value("memory") / 100,
    )


def take_lengths() -> None:
    """Another kind of work has other lengths: what to do when it is chosen."""
    import streamlit as st

    load = LOADS[st.session_state["load"]]
    state.put({"prompt": load.prompt, "output": load.output})


def draw_system(models: str, device: str, on: Any = None) -> str:
    """Who chooses model and depth, of those that these models allow."""
    return str(state.draw("system", on=on, options=tuple(systems(models, device))))


def draw_who(on: Any) -> None:
    """Models, device, system: three columns of ``on``."""
    first, second, third = on.columns(3)
    models = state.draw("models", on=first)
    device = state.draw("device", on=second, options=devices(models))
    draw_system(models, device, on=third)


def models_label(models: str) -> str:
    return MODELS.get(models, "uploaded profile")


def load_label(load: str) -> str:
    return LOADS[load].label
