"""Row about quality against depth."""

from __future__ import annotations

from functools import cache

import numpy as np

from heliosim.reproduction.rows import Answer, Plot, Row, Runs, greater, series_of, value_of

PLATEAUS = (("CodeLlama-34B", "codellama-llama2", "codellama-34b", 28), ("Llama2-7B", "llama-three", "llama2-7b", 24))
DRAWS = 10


@cache
def agreement(spec: str, model: str) -> dict[int, list[float]]:
    """Share of tokens that a model's exits would emit as its last layer does, by exit, one value per draw of texts."""
    from heliosim.synthetic.draw import behaviour_for
    from heliosim.synthetic.spec import load_spec

    loaded = load_spec(spec)
    exits = loaded.models[model].exits
    found: dict[int, list[float]] = {e: [] for e in exits}
    for seed in range(DRAWS):
        table = behaviour_for({model: exits}, loaded, seed).table
        for e in exits:
            found[e].append(float(np.mean(table[f"agrees:{model}@{e}"].to_numpy())))
    return found


def plateau(_: Runs) -> Answer:
    """Agreement gained per layer up to the plateau against that gained per layer behind it."""
    checks, series, beside = [], [], []
    for name, spec, model, at in PLATEAUS:
        by_exit = agreement(spec, model)
        first, last = min(by_exit), max(by_exit)
        before = [(b - a) / (at - first) for a, b in zip(by_exit[first], by_exit[at], strict=True)]
        behind = [(b - a) / (last - at) for a, b in zip(by_exit[at], by_exit[last], strict=True)]
        checks.append(greater(f"{name}: a layer adds more up to {at} than behind it", before, behind))
        series.append(series_of(name, [(e / last, [100 * v for v in values]) for e, values in by_exit.items()]))
        beside += [value_of(f"{name}@{e}: agreement, %", [100 * v for v in vs]) for e, vs in by_exit.items()]
    plot = Plot("Agreement with all layers by depth", "share of layers", "% of tokens", tuple(series))
    return Answer(checks=tuple(checks), plots=(plot,), beside=tuple(beside))


ROWS = (
    Row(
        "quality-depth",
        "quality against depth: plateau at 28 of 48 (CodeLlama-34B) and 24 of 32 (Llama2-7B)",
        "shape",
        "",
        plateau,
        assumptions=("agreement by depth",),
        remark=(
            "Consistent, not reproduced: the specs place the level of agreement there because the paper says so. Where "
            "agreement was measured (GREEN-CODE, OPT-2.7B and Llama-3.2-3B) it rises with depth, not always "
            "monotonically."
        ),
    ),
)
