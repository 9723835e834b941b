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


def draw_who(on: Any) -> None:
    """Models, device, system: three columns of ``on``."""
    first, second, third = on.columns(3)
    models = state.draw("models", on=first)
    device = state.draw("device", on=second, options=devices(models))
    state.draw("system", on=third, options=tuple(systems(models, device)))


def models_label(models: str) -> str:
    return MODELS.get(models, "uploaded profile")


def load_label(load: str) -> str:
    return LOADS[load].label
