"""docs/validation.md from the evidence: every number in it comes from a measurement of the run that wrote it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from heliosim.formats.profile import HoldOut
from heliosim.hold_out import verdict

VERDICTS = {
    "met": "met",
    "within noise": "above it, within measured noise",
    "missed": "**missed**",
    "not scored": "not scored",
}
LABELS = {
    "output_throughput": "throughput, tok/s",
    "mean_tpot_ms": "mean TPOT, ms",
    "mean_e2el_ms": "mean E2E, ms",
    "p99_e2el_ms": "p99 E2E, ms",
    "mean_ttft_ms": "mean TTFT, ms",
}


def page(evidence: Mapping[str, Any], command: str) -> str:
    """The whole page as Markdown."""
    parts = [_head(evidence, command), _verdict(evidence), _steps(evidence)]
    for clock, title in (
        ("cpu", "Predicted against measured, CPU clock"),
        ("wall", "Predicted against measured, wall clock"),
    ):
        rows = [r for r in evidence["rows"] if r["clock"] == clock]
        if rows:
            parts.append(_errors(title, rows, clock))
    parts += [
        _machine(evidence),
        _exits(evidence),
        _transitions(evidence),
        _speed(evidence),
        _ablations(evidence),
        _premises(evidence),
        READING,
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> str:
    """A Markdown table; columns from ``right`` on are right-aligned."""
    marks = ["---" if k < right else "---:" for k in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float | None, signed: bool = True) -> str:
    return "–" if value is None else (f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %").replace("-", "−")


def _head(e: Mapping[str, Any], command: str) -> str:
    device, versions = e["profile"]["device"], e["profile"]["versions"]
    name = device.get("gpu") or device.get("host_cpu")
    on_gpu = str(device.get("device")).startswith("cuda")
    where = "Measured on a GPU." if on_gpu else "**No GPU figure is on this page; none has been measured yet.**"
    return f"""# Validation: simulated against measured

This page is written by one command, every result in it by a measurement. On your machine it gives your numbers:

```
{command} --doc docs/validation.md
```

Measured on {name}, {device.get("threads")} thread(s) of {device.get("host_cores")} cores, torch {versions.get("torch")}, HelioSim
{versions.get("heliosim")}, float32, models tiny-opt-s and tiny-opt-l, {e["requests"]} requests in four consecutive task blocks, {e["repeats"]} live
repeats, seed {e["seed"]}, profile `{e["profile"]["hash"][:12]}`. Order of work: the profile is calibrated inside the real serving loop,
then each scenario is simulated, and only then run live. Loads are shares of each system's own capacity, measured with everything waiting
(`saturated`). Errors are signed: (predicted − measured mean) / measured mean. {where}

What is composed for GPUs that are not here ([hardware.md](hardware.md)) is held against published runs on a page of its own:
[validation-composed.md](validation-composed.md). What a GPU machine would measure, in one command: [gpu-check.md](gpu-check.md)."""


def _verdict(e: Mapping[str, Any]) -> str:
    """Every bar, met or missed, and how steady the machine was meanwhile."""
    rows = [r for r in e["rows"] if r["clock"] == e["clock"] and r["load"] != "saturated" and r["passes"] is not None]
    lines = [f"## In short ({e['clock']} clock, 50 % and 80 % load)", ""]
    for metric, label in LABELS.items():
        mine = [r for r in rows if r["metric"] == metric]
        if not mine:
            continue
        errors = [r["error"] for r in mine]
        mean = sum(abs(x) for x in errors) / len(errors)
        close = sum(abs(r["error"]) <= r["bar"] for r in mine)
        lines.append(
            f"- **{label}**: mean absolute error {percent(mean, False)}, worst {percent(max(errors, key=abs))}; {close} of {len(mine)} within "
            f"{mine[0]['bar']:.0%}, {sum(r['passes'] for r in mine)} of {len(mine)} within it or inside the spread of the live repeats."
        )
    for model, fits in e["profile"]["fits"].items():
        h = fits[e["clock"]]["holdout"]
        said = verdict(HoldOut(**h), e["step_bar"])
        floor = f", noise floor {percent(h['repeat_error'], False)}" if h["repeat_error"] is not None else ""
        high = h.get("repeat_error_high")
        floor += "" if high is None else f" (at most {percent(high, False)}, 95 %)"
        error = percent(h["median_abs_error"], False)
        lines.append(
            f"- **Held-out step times, {model}**: median error {error}{floor} (bar {e['step_bar']:.0%}: {VERDICTS[said]})."
        )
    for kind in ("drawn", "replayed"):
        bar = 100 * e["exit_bars"][kind]
        points = [x[f"{kind}_points"] for x in e["exits"]]
        met = sum(p <= bar for p in points)
        lines.append(
            f"- **Exit mix, {kind}**: {met} of {len(points)} runs within {bar:.0f} points, worst {max(points):.1f}."
        )
    same = sum(t["live"] == t["replayed"] for t in e["transitions"])
    lines.append(f"- **HELIOS transitions with exits replayed**: same order in {same} of {len(e['transitions'])} runs.")
    strict, wide = sum(abs(r["error"]) <= r["bar"] for r in rows), sum(r["passes"] for r in rows)
    lines.insert(
        2,
        f"- **All together**: {strict} of {len(rows)} predictions within their bar, {wide} within it or inside the spread of {e['repeats']} live "
        "repeats. Below capacity throughput is the arrival rate: right for any step cost that keeps up.",
    )
    identical = sum(p["identical"] for p in e["parity"])
    lines.append(
        f"- **Parity**: fed the outcomes of a live run, the simulated driver asks for the same actions at the same times in {identical} of "
        f"{len(e['parity'])} runs."
    )
    missed = [r for r in rows if not r["passes"]]
    if missed:
        lines += ["", "Missed bars:", ""]
        ratios = {(x["system"], x["load"]): sum(x["ratios"]) / len(x["ratios"]) for x in e["step_time"]}
        for r in missed:
            ratio = ratios[r["system"], r["load"]]
            lines.append(
                f"- {r['system']} at {r['load']}: {LABELS[r['metric']]} {percent(r['error'])} (bar {r['bar']:.0%}); its steps took {ratio:.2f} of what "
                "the profile expects"
            )
    return "\n".join([*lines, "", _noise(e)])


def _noise(e: Mapping[str, Any]) -> str:
    """How much the machine itself varied, from the repeats: the first thing to know about any error here."""
    tpot = [r for r in e["rows"] if r["clock"] == e["clock"] and r["metric"] == "mean_tpot_ms" and r["measured_min"]]
    live, drawn = (sorted(r[f"{x}_max"] / r[f"{x}_min"] - 1 for r in tpot) for x in ("measured", "predicted"))
    inside = max(fits[e["clock"]]["cell_spread"] for fits in e["profile"]["fits"].values())
    return (
        f"How steady was the machine? Among {e['repeats']} identical live runs the slowest mean TPOT was {percent(live[len(live) // 2], False)} above the "
        f"fastest (median over systems and loads; largest {percent(live[-1], False)}; among the simulated draws of recorded noise "
        f"{percent(drawn[len(drawn) // 2], False)}), and the same step varied by {percent(inside, False)} (interquartile range) while it was calibrated."
    )


def _machine(e: Mapping[str, Any]) -> str:
    """Where errors come from: the same steps' time against the fit, and the probes read beside every live run."""
    rows, told = [], []
    errors = {
        (r["system"], r["load"]): r for r in e["rows"] if r["clock"] == e["clock"] and r["metric"] == "mean_tpot_ms"
    }
    for found in e["step_time"]:
        ratios, row = found["ratios"], errors[found["system"], found["load"]]
        mean = sum(ratios) / len(ratios)
        rows.append(
            [
                found["system"],
                found["load"],
                f"{mean:.2f}",
                f"{min(ratios):.2f} … {max(ratios):.2f}",
                percent(row["error"]),
            ]
        )
        if row["error"] is not None:
            told.append((mean, 1 + row["error"]))
    correlation = _correlation([math.log(a) for a, _ in told], [math.log(b) for _, b in told])
    text = (
        "## Where the errors come from\n\nThe steps that a live run really made, priced with the profile: measured over expected seconds. Nothing of the "
        "workload, of exits or of queues is in this ratio; what differs from 1 is the machine since its calibration, and the cost fit. A "
        "prediction that is too slow where the ratio is below 1 misses for that reason.\n\n"
        + table(
            ["system", "load", "measured / expected step time", "range over repeats", "error of predicted TPOT"],
            rows,
            2,
        )
        + f"\n\nThe logarithms of ratio and of predicted / measured TPOT correlate by {correlation:.2f} over these {len(told)} rows."
    )
    return text + _probes(e["machine"])


def _probes(readings: Sequence[Mapping[str, Any]]) -> str:
    if not readings:
        return ""
    rows = []
    for key, label in (("near_s", "near: 0.8 MB of weights"), ("far_s", "far: 9.4 MB of weights")):
        low, mid, high = _percentiles([m[key] for m in readings])
        rows.append([label, *(f"{1e3 * x:.3f}" for x in (low, mid, high)), f"{high / low:.2f}"])
    return (
        "\n\nBefore and behind each live run, two probes did the same arithmetic (one row through 72 matrices) on weights that fit a core's own cache and on "
        f"weights that live in the cache a processor's tenants share, or beyond it. CPU milliseconds over {len(readings)} runs:\n\n"
        + table(["probe", "10th percentile", "median", "90th percentile", "90th / 10th"], rows)
        + "\n\nWhere far varies and near does not, memory traffic is what varies. docs/calibrating.md says how such a machine was examined."
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.1, 0.5, 0.9))  # type: ignore[return-value]


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's; NaN where one of the two does not vary."""
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:
        return math.nan


def _steps(e: Mapping[str, Any]) -> str:
    rows = []
    for model, fits in e["profile"]["fits"].items():
        for clock, fit in fits.items():
            h = fit["holdout"]
            regions = ", ".join(f"{r} {100 * v:.1f} %" for r, v in h["by_region"].items())
            rows.append(
                [model, clock, f"{fit['steps']:,}", str(h["cells"]), percent(fit["cell_spread"], False), percent(h["repeat_error"], False), percent(h["median_abs_error"], False),
                 percent(h["p90_abs_error"], False), percent(h["mean_signed_error"]), regions]
            )  # fmt: skip
    header = [
        "model",
        "clock",
        "steps",
        "held-out cells",
        "spread inside a cell",
        "noise floor",
        "median error",
        "p90 error",
        "signed mean",
        "median error by region",
    ]
    loads = [
        [model, clock, str(fit["loads"]), percent(fit["median_abs_error"], False)]
        for model, clocks in e["profile"]["loads"].items()
        for clock, fit in clocks.items()
    ]
    return (
        "## Step and load times\n\nOne cell in five is kept out of the fit that is scored here; a cell is a mode, batch size, context bin, depth and number of checks.\n\n"
        + table(header, rows, 2)
        + "\n\nLoads (in sample):\n\n"
        + table(["model", "clock", "loads", "median error"], loads, 2)
    )


def _errors(title: str, rows: Sequence[Mapping[str, Any]], clock: str) -> str:
    cells = [
        [r["system"], r["load"], LABELS[r["metric"]], number(r["without_noise"]), number(r["predicted"]),
         f"{number(r['predicted_min'])} … {number(r['predicted_max'])}", number(r["measured"]),
         f"{number(r['measured_min'])} … {number(r['measured_max'])}", percent(r["error"]), "–" if r["passes"] is None else "yes" if r["passes"] else "**no**"]
        for r in rows
    ]  # fmt: skip
    note = (
        "Wall time on a shared machine carries whatever else ran; these figures stand here for their spread."
        if clock == "wall"
        else "*Predicted* is the mean over draws of the profile's recorded step-time noise, *expected step times* is one simulation without it. Bars: 7 % for throughput, mean TPOT and mean E2E; 12 % for p99 E2E and mean TTFT; or inside the spread of the repeats."
    )
    header = [
        "system",
        "load",
        "metric",
        "expected step times",
        "predicted",
        "its draws",
        "measured",
        "live repeats",
        "error",
        "meets bar",
    ]
    return f"## {title}\n\n{note}\n\n" + table(header, cells, 3)


def _exits(e: Mapping[str, Any]) -> str:
    rows = [
        [x["system"], x["load"], f"{x['drawn_points']:.1f}", f"{x['replayed_points']:.1f}", f"{x['repeat_points']:.1f}"]
        for x in e["exits"]
    ]
    return (
        "## Exit mix\n\nLargest difference of any exit's share of tokens, in percentage points, against the first live run: drawn from the profile's "
        "held-out prompts (bar 5), replayed from the live run's own tokens (bar 2), and between live repeats.\n\n"
        + table(["system", "load", "drawn", "replayed", "live repeats"], rows, 2)
    )


def _transitions(e: Mapping[str, Any]) -> str:
    rows = []
    for t in e["transitions"]:
        same = "yes" if t["live"] == t["replayed"] else "**no**"
        rows.append([t["load"], ", ".join(t["live"]), same, ", ".join(t["drawn"])])
    return "## HELIOS transitions\n\n" + table(
        ["load", "live", "same order when exits are replayed", "drawn from the profile"], rows, 4
    )


def _speed(e: Mapping[str, Any]) -> str:
    rows = [
        [c["system"], f"{number(c['output_throughput'])} ({number(c['throughput_min'])} … {number(c['throughput_max'])})",
         number(c["predicted_throughput"]), number(c["mean_tpot_ms"]), f"{number(c['mean_batch_size'])} / {number(c['max_batch_size'])}",
         number(c["layers_per_token"]), percent(c["low_confidence_share"], False), number(c["perplexity"]), percent(c["agreement"], False)]
        for c in e["capacity"]
    ]  # fmt: skip
    header = [
        "system",
        "throughput, tok/s (repeats)",
        "simulated",
        "TPOT, ms",
        "batch mean / max",
        "layers per token",
        "below TH",
        "perplexity",
        "agreement",
    ]
    batches = [
        [model, str(b["depth"]), f"{b['budget_bytes'] / 1e6:.1f}", str(b["context_tokens"]), str(b["rows"])]
        for model, found in e["profile"]["largest_batch"].items()
        for b in found
    ]
    mixes = [
        [
            c["system"],
            "; ".join(
                f"{m}: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in mix.items()) for m, mix in c["exit_mix"].items()
            ),
        ]
        for c in e["capacity"]
    ]
    return (
        "## What HELIOS is worth here, live, saturated\n\nPerplexity is of the model's own probabilities of what it emitted, agreement the share of tokens that all layers of the "
        "same model would have emitted.\n\n"
        + table(header, rows)
        + "\n\nShare of tokens per exit:\n\n"
        + table(["system", "exit layers"], mixes, 2)
        + "\n\nLargest batch by depth at a fixed memory budget, allocated for real:\n\n"
        + table(["model", "layers resident", "budget, MB", "context, tokens", "rows"], batches)
    )


def _ablations(e: Mapping[str, Any]) -> str:
    whole = next((a["output_throughput"] for a in e["ablations"]), None)
    rows = [
        [a["variant"], f"{number(a['output_throughput'])} ({number(a['throughput_min'])} … {number(a['throughput_max'])})",
         percent(a["output_throughput"] / whole - 1 if whole else None), number(a["predicted_throughput"]), number(a["layers_per_token"]),
         percent(a["low_confidence_share"], False), number(a["perplexity"]), percent(a["agreement"], False), number(a["transitions"])]
        for a in e["ablations"]
    ]  # fmt: skip
    header = [
        "variant",
        "throughput, tok/s (repeats)",
        "against all",
        "simulated",
        "layers per token",
        "below TH",
        "perplexity",
        "agreement",
        "transitions",
    ]
    return "## Each mechanism off\n\nHELIOS over the pair, saturated, live.\n\n" + table(header, rows)


def _premises(e: Mapping[str, Any]) -> str:
    rows = [
        [p["premise"], p["subject"], f"{p['value']:.2f}", f"{p['holds_from']:.2f}", p["verdict"], p["detail"]]
        for p in e["profile"]["premises"]
    ]
    return "## HELIOS's premises on these models\n\n" + table(
        ["premise", "subject", "value", "holds from", "verdict", "detail"], rows, 6
    )


READING = """## How to read this

- The models are tiny (128 wide): a step is dominated by launches and Python, as on a launch-bound GPU engine. The page says how well the
  simulator predicts *this* machine; it says nothing of an A100. Run the command on yours.
- On the CPU clock every step really executes and is charged its process CPU time, scheduling and recording included. Idle time is skipped.
- A miss at one load with small step-time errors points at the workload side (which prompts were drawn); a miss that is equal at all loads
  points at the cost model, and the region table above says where.
- Composed profiles, which rest on published times, have pages of their own: [an operator profile against a real vLLM
  run](validation-llmservingsim.md)."""
