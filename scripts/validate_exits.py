"""Make docs/validation-exits.md and .json: measured exits of others against the family behind synthetic ones.

    python scripts/validate_exits.py DATA [--out docs]

DATA: a folder with ``green_code/`` and ``ee_llama/`` as published (see the page for sources and licences).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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

LAGS = (1, 2, 3, 8)
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
        "sigma": float(family.sigma[0]), "rows": found, "fitted": len(fitted), "tested": len(tested),
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


# --- the page ---------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(line)


def number(x: float | None, digits: int = 2, *, sign: bool = False) -> str:
    if x is None:
        return "–"
    return f"{x:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def page(found: dict[str, Any]) -> str:
    held, rows, sweep_, pair_ = found["held_out"], found["runs"], found["sweep"], found["pair"]
    worst = max(abs(h["error_layers"]) for h in held)
    seen = max(abs(h["error_layers"]) for h in found["in_sample"])
    low, high = found["cap_between"]
    return "\n\n".join(
        [
            "# Validation of exit models",
            "Made by `scripts/validate_exits.py` from data that others published: GREEN-CODE (S. Ilager, L. Briem, "
            "I. Brandic, CCGrid 2025; MIT), exits of every token, and Facilitated early-exit Llama (Apache-2.0), mean "
            "depth against softmax thresholds. All figures are in [validation-exits.json](validation-exits.json). "
            "The family is described in [behaviour.md](behaviour.md#the-family). Depths are layers run, from 1.",
            "## Depth between thresholds",
            "Each run whose threshold lies between others of its series is left out; the family is fitted to the "
            "others of the series (**fitted at**) and predicts it. No run is in its own fit. The score is the "
            "probability that a small learnt policy gives to leaving, **not** a softmax confidence: what is tested is "
            "the family as the distribution of whatever score decides, by depth. "
            f"Largest error: {number(worst)} layers (wanted: at most 1).",
            table(
                ["series", "threshold", "fitted at", "measured", "predicted", "error, layers", "over all caps", "misplaced"],
                [
                    [h["series"], f"{h['threshold']:g}", ", ".join(f"{t:g}" for t in h["fitted_at"]),
                     number(h["measured_depth"]), number(h["predicted_depth"]), number(h["error_layers"], sign=True),
                     " … ".join(number(x, sign=True) for x in h["error_range"]), f"{h['misplaced_share']:.1%}"]
                    for h in held
                ],
            ),  # fmt: skip
            f"The policy never gives more than a **cap**: tokens leave at {low:g} and none does at {high:g}, so the cap "
            f"lies between; its middle, {(low + high) / 2:g}, is used, found from all runs but the held-out one. "
            "*Over all caps*: errors if it lay elsewhere in that interval. From the java runs alone the cap would be "
            "known less well (above 0.92 or even 0.9), and 0.92 could not be predicted without its own run: near a cap "
            "shares change fast. *Misplaced*: share of tokens at another exit than predicted. "
            f"At the thresholds a fit of everything has seen, its largest error is {number(seen)} layers.",
            "## Shares by exit, held out",
            table(
                ["series", "threshold", "exit: measured / predicted, %"],
                [
                    [h["series"], f"{h['threshold']:g}",
                     ", ".join(f"{s['exit']}: {100 * s['measured']:.1f} / {100 * s['predicted']:.1f}" for s in h["shares"])]
                    for h in held
                ],
            ),  # fmt: skip
            "## Along a text",
            "Correlation of exit depth between tokens some places apart, and the share of its variance that tokens of "
            "one sample have in common (from tokens 8 to 14 apart in a sample of 15). Java samples are not all of 15 "
            "tokens, so their borders drift and their request effect is blurred downwards. Shipped specs take 0 for the "
            "autocorrelation of the latent ease and 3 % for the request effect.",
            table(
                ["series", "threshold", "mean depth", *(f"lag {k}" for k in LAGS), "request effect", "CodeBLEU", "J/sample"],
                [
                    [r["series"], f"{r['threshold']:g}", number(r["mean_depth"]),
                     *(number(r["autocorrelation"][str(k)], sign=True) for k in LAGS),
                     "–" if r["request_effect"] is None else f"{r['request_effect']:.1%}" + ("" if r["is_aligned"] else " *"),
                     number(r["codebleu"], 3), number(r["joules_per_sample"], 0)]
                    for r in rows
                ],
            ),  # fmt: skip
            "\\* borders drift. Energy and time of these runs were measured without a KV cache: for ratios only.",
            "## Agreement with the last layer",
            "Share of tokens whose top token after a depth is that of the last layer. It is not monotone, and specs do "
            "not force it to be. These models were tuned with other losses than HELIOS's exit heads: HELIOS reports 85 % "
            "at layer 9 of 32 of OPT-6.7B.",
            table(
                ["series", "at depth: %", "steps that fall", "largest fall"],
                [
                    [a["series"], ", ".join(f"{d}: {100 * x:.0f}" for d, x in a["at"].items()),
                     f"{a['falls']} of {a['steps']}", f"{100 * a['largest_fall']:.1f} points"]
                    for a in found["agreement"]
                ],
            ),  # fmt: skip
            "## Softmax thresholds",
            f"The 16-layer early-exit Llama checks every layer against a threshold that decays with depth. {sweep_['fitted']} "
            f"rows (each {EVERY}th) fit four parameters; {sweep_['tested']} rows are tested; the row that never exits is "
            f"neither. Largest error of mean depth {number(sweep_['largest_error_layers'])} layers, mean "
            f"{number(sweep_['mean_error_layers'])}; of its standard deviation {number(sweep_['largest_error_std'])}. "
            f"The spread of the confidence's logit comes out as sigma = {number(sweep_['sigma'])}; that is where the "
            "Llama specs have theirs from. Shares of single exits are not in the data and not tested.",
            table(
                ["first … last threshold", "measured depth (std)", "predicted", "row"],
                [
                    [f"{r['first']:g} … {r['last']:g}", f"{number(r['measured_depth'])} ({number(r['measured_std'])})",
                     f"{number(r['predicted_depth'])} ({number(r['predicted_std'])})",
                     "fitted" if r["is_fitted"] else "tested"]
                    for r in sweep_["rows"][::3]
                ],
            ),  # fmt: skip
            "## The OPT pair (synthetic)",
            f"Correlation of the two models' latent ease, solved so that 57 % of the tokens beyond layer 6 of OPT-1.3B "
            f"have left by layer 9 of OPT-6.7B: **{number(pair_['correlation'], 3)}**. Independent models would give "
            "73.6 %; 57 % means that what is hard for one is rather hard for the other. Spread of the confidence's logit, "
            "solved from the live perplexities: "
            + ", ".join(f"{number(s)} for {m}" for m, s in pair_["sigma"].items())
            + f". Drawn with {pair_['seeds']} seeds:",
            table(
                ["share", "published", "mean of seeds", "std between seeds"],
                [
                    [label, said, f"{100 * pair_['drawn'][key]['mean']:.2f} %", f"{100 * pair_['drawn'][key]['std']:.2f}"]
                    for label, said, key in (
                        ("beyond 6 of OPT-1.3B, left by 9 of OPT-6.7B", "57 % (input)", "conditional"),
                        ("OPT-1.3B, left by 6", "73.0 % (input)", "opt-1.3b@6"),
                        ("OPT-6.7B, left by 9", "73.6 % (input)", "opt-6.7b@9"),
                    )
                ],
            ),
            f"Not published, and so a prediction: {100 * pair_['reverse']:.1f} % of the tokens beyond layer 9 of OPT-6.7B "
            "leave by layer 6 of OPT-1.3B.",
            "Published tokens by exit under HELIOS imply these shares of tokens by state, if a full model leaves as it "
            "does alone (`heliosim.synthetic.states`):",
            table(
                ["model", "full, %", "first exit only, %", "full, by each later exit, %"],
                [
                    [m, f"{100 * pair_['full'][m]:.1f}", f"{100 * pair_['partial'][m]:.1f}",
                     ", ".join(f"{e}: {100 * (pair_['full'][m] + x):.1f}" for e, x in pair_["full_by_exit"][m].items())]
                    for m in pair_["full"]
                ],
            ),  # fmt: skip
            f"They add up to {100 * pair_['states_total']:.1f} %, and the two later exits of a model give nearly the same "
            "share, so the published table is consistent with this reading.",
        ]
    ) + "\n"


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
