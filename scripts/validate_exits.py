"""Make docs/validation-exits.md and .json: measured exits of others against the family behind synthetic ones.

    python scripts/validate_exits.py DATA [--out docs]

DATA: a folder with ``green_code/`` and ``ee_llama/`` as published (see the page for sources and licences).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from exits_page import LAGS, page

from heliosim.behaviour import ANY_SOURCE
from heliosim.formats.files import write_json, write_text
from heliosim.synthetic.check import Prediction, cap_between, depth_of, fit_scores, fit_sweep, predict_between
from heliosim.synthetic.draw import behaviour_for
from heliosim.synthetic.exits import (
    Alignment,
    Evaluation,
    MeasuredExits,
    ThresholdRow,
    autocorrelation,
    read_alignments,
    read_ee_llama,
    read_evaluations,
    read_green_code,
    request_effect,
)
from heliosim.synthetic.solve import solve
from heliosim.synthetic.spec import load_spec
from heliosim.synthetic.states import implied_states

SEEDS = range(20)
SERVED = {"opt-1.3b": {6: 0.7019, 12: 0.0138, 24: 0.0678}, "opt-6.7b": {9: 0.2090, 17: 0.0014, 32: 0.0061}}
"""HELIOS (arXiv 2504.10724), tokens by exit under HELIOS: input."""
EVERY = 7
"""Each so-manieth row of the softmax sweep is fitted, the others are tested."""


def name_of(run: MeasuredExits) -> str:
    return f"{run.model}, {run.task}"


def in_sample(runs: Sequence[MeasuredExits], cap: float) -> list[dict[str, Any]]:
    """Errors at the thresholds a fit of all runs has seen."""
    found = []
    for key in sorted({(r.task, r.key) for r in runs}):
        series = [r for r in runs if (r.task, r.key) == key and r.threshold < cap]
        family = fit_scores(series, cap)
        for run in series:
            error = family.mean_depth(run.threshold) - float(run.depths.mean())
            found.append({"series": name_of(run), "threshold": run.threshold, "error_layers": error})
    return found


def from_two(runs: Sequence[MeasuredExits], cap: float) -> list[dict[str, Any]]:
    """The least a fit can have: two thresholds, and every run of the series between them predicted."""
    found = []
    for key in sorted({(r.task, r.key) for r in runs}):
        series = [r for r in runs if (r.task, r.key) == key and r.threshold < cap]
        for low, high in combinations(series, 2):
            family = fit_scores([low, high], cap)
            for run in series:
                if low.threshold < run.threshold < high.threshold:
                    error = family.mean_depth(run.threshold) - float(run.depths.mean())
                    at = [low.threshold, high.threshold]
                    found.append(
                        {"series": name_of(run), "threshold": run.threshold, "fitted_at": at, "error_layers": error}
                    )
    return found


def held_out(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    return [
        {
            "series": name_of(p.run),
            "threshold": p.run.threshold,
            "fitted_at": list(p.fitted_at),
            "cap_between": list(p.cap),
            "measured_depth": p.measured_depth,
            "predicted_depth": p.mean_depth,
            "error_layers": p.error_layers,
            "error_range": [x - p.measured_depth for x in p.range],
            "misplaced_share": p.misplaced,
            "shares": [
                {"exit": e, "measured": float(m), "predicted": float(q)}
                for e, m, q in zip(p.run.exits, p.run.left(), p.left, strict=True)
            ],
        }
        for p in predictions
    ]


def runs_of(runs: Sequence[MeasuredExits], evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Each run: depth, correlations along it, and what it was worth."""
    found = []
    for run in runs:
        worth = next(
            (e for e in evaluations if (e.key, e.task, e.threshold) == (run.key, run.task, run.threshold)), None
        )
        found.append(
            {
                "series": name_of(run),
                "threshold": run.threshold,
                "tokens": len(run.depths),
                "mean_depth": float(run.depths.mean()),
                "layers": run.layers,
                "autocorrelation": {str(lag): autocorrelation(run.depths, lag) for lag in LAGS},
                "request_effect": request_effect(run),
                "is_aligned": run.is_aligned,
                "codebleu": worth.codebleu if worth else None,
                "joules_per_sample": worth.joules if worth else None,
            }
        )
    return found


def agreement(alignments: Sequence[Alignment]) -> list[dict[str, Any]]:
    found = []
    for a in alignments:
        steps = np.diff(a.by_depth)
        depths = [round(len(a.by_depth) * x / 8) for x in range(1, 9)]
        found.append(
            {
                "series": f"{a.key}, {a.task}, {'fine-tuned for exits' if a.weights == 'weighted' else 'original'}",
                "at": {str(d): a.by_depth[d - 1] for d in depths},
                "falls": int((steps < 0).sum()),
                "steps": len(steps),
                "largest_fall": float(-steps.min()),
            }
        )
    return found


def sweep(rows: Sequence[ThresholdRow]) -> dict[str, Any]:
    """The softmax sweep: fitted and tested rows. The first row never exits by construction: neither."""
    usable = list(rows[1:])
    fitted = usable[::EVERY]
    family = fit_sweep(fitted)
    found = []
    for row in usable:
        mean, std = depth_of(family, row)
        found.append(
            {"first": row.first, "last": row.last, "measured_depth": row.mean_depth, "predicted_depth": mean,
             "measured_std": row.std_depth, "predicted_std": std, "is_fitted": row in fitted}
        )  # fmt: skip
    tested = [r for r in found if not r["is_fitted"]]
    depth = [abs(r["predicted_depth"] - r["measured_depth"]) for r in tested]
    spread = [abs(r["predicted_std"] - r["measured_std"]) for r in tested]
    return {
        "sigma": float(family.sigma[0]), "every": EVERY, "rows": found, "fitted": len(fitted), "tested": len(tested),
        "largest_error_layers": max(depth), "mean_error_layers": float(np.mean(depth)),
        "largest_error_std": max(spread),
    }  # fmt: skip


def pair() -> dict[str, Any]:
    """The OPT pair: correlation solved, conditional drawn again with many seeds, states a HELIOS run implies."""
    spec = load_spec("opt-pair")
    solved = solve(spec)
    drawn = []
    for seed in SEEDS:
        table = behaviour_for({n: f.exits for n, f in solved.families.items()}, spec, seed).table
        assert set(table["source"].unique().to_pylist()) == {ANY_SOURCE}
        first, other = (
            table[f"confidence:{key}"].to_numpy() >= solved.threshold for key in ("opt-1.3b@6", "opt-6.7b@9")
        )
        drawn.append((float(other[~first].mean()), float(first.mean()), float(other.mean())))
    values = np.array(drawn)
    states = implied_states({n: m.left.by_exit for n, m in spec.models.items()}, SERVED)
    return {
        "correlation": solved.correlation_of("opt-1.3b", "opt-6.7b"),
        "sigma": {n: float(f.sigma[0]) for n, f in solved.families.items()},
        "conditional": solved.conditional("opt-1.3b", 6, "opt-6.7b", 9),
        "reverse": solved.conditional("opt-6.7b", 9, "opt-1.3b", 6),
        "drawn": {
            name: {"mean": float(values[:, k].mean()), "std": float(values[:, k].std(ddof=1))}
            for k, name in enumerate(("conditional", "opt-1.3b@6", "opt-6.7b@9"))
        },
        "seeds": len(SEEDS),
        "full": states.full,
        "partial": states.partial,
        "full_by_exit": {m: {str(e): x for e, x in v.items()} for m, v in states.by_exit.items()},
        "states_total": states.total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    folder = given.data / "green_code"
    runs, alignments = read_green_code(folder), read_alignments(folder)
    low, high = cap_between(runs)
    found: dict[str, Any] = {
        "cap_between": [low, high],
        "held_out": held_out(predict_between(runs)),
        "in_sample": in_sample(runs, (low + high) / 2),
        "from_two": from_two(runs, (low + high) / 2),
        "runs": runs_of(runs, read_evaluations(folder)),
        "agreement": agreement(alignments),
        "sweep": sweep(read_ee_llama(given.data / "ee_llama")),
        "pair": pair(),
    }
    write_json(given.out / "validation-exits.json", rounded(found))
    write_text(given.out / "validation-exits.md", page(found))


def rounded(value: Any) -> Any:
    """Floats to six significant digits, so that the file does not change with the last bits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
