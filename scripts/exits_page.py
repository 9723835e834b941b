"""The page docs/validation-exits.md, from the figures of ``validate_exits.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LAGS = (1, 2, 3, 8)


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
            ),
            f"The policy never gives more than a **cap**: tokens leave at {low:g} and none does at {high:g}, so the cap "
            f"lies between; its middle, {(low + high) / 2:g}, is used, found from all runs but the held-out one. "
            "*Over all caps*: errors if it lay elsewhere in that interval. From the java runs alone the cap would be "
            "known less well (above 0.92 or even 0.9), and 0.92 could not be predicted without its own run: near a cap "
            "shares change fast. *Misplaced*: share of tokens at another exit than predicted. "
            f"At the thresholds a fit of everything has seen, its largest error is {number(seen)} layers. With the least a "
            "fit can have, two thresholds of the series, the errors are:",
            table(
                ["series", "threshold", "fitted at", "error, layers"],
                [
                    [t["series"], f"{t['threshold']:g}", ", ".join(f"{x:g}" for x in t["fitted_at"]),
                     number(t["error_layers"], sign=True)]
                    for t in found["from_two"]
                ],
            ),
            "## Shares by exit, held out",
            table(
                ["series", "threshold", "exit: measured / predicted, %"],
                [
                    [h["series"], f"{h['threshold']:g}",
                     ", ".join(f"{s['exit']}: {100 * s['measured']:.1f} / {100 * s['predicted']:.1f}" for s in h["shares"])]
                    for h in held
                ],
            ),
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
            ),
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
            ),
            "## Softmax thresholds",
            f"The 16-layer early-exit Llama checks every layer against a threshold that decays with depth. {sweep_['fitted']} "
            f"rows (each {sweep_['every']}th) fit four parameters; {sweep_['tested']} rows are tested; the row that never exits is "
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
            ),
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
            ),
            f"They add up to {100 * pair_['states_total']:.1f} %, and the two later exits of a model give nearly the same "
            "share, so the published table is consistent with this reading.",
        ]
    ) + "\n"
