"""From an operator profile to a served workload: simulated against a real vLLM run, both published by LLMServingSim.

The operator times (CUDA kernels of vLLM 0.19 on an RTX PRO 6000, Llama-3.1-8B, bf16) become a composed profile; the 300
ShareGPT requests of the run arrive when they did; engine arguments are those of the run. Nothing is fitted to the run:
the host's time per step, which no kernel table holds, is taken as zero and as the ``graph`` preset of the shipped
devices, and both are reported.

    python scripts/validate_llmservingsim.py DATA/llmservingsim [--out docs]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heliosim.composing import Wanted, operator_profile
from heliosim.formats.files import write_json, write_text
from heliosim.formats.profile import HoldOut
from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.device import open_device
from heliosim.operators.fit import fit_operators
from heliosim.operators.llmservingsim import read_llmservingsim
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario

MODEL, DTYPE, PRESET_DEVICE, PRESET = "llama3.1-8b", "bf16", "H100-80GB", "graph"
LINK_BYTES_PER_S = 25e9
BEFORE_S = 5.0
"""Arrivals are moved back by this, so that the model is loaded before the first of them, as it was in the run."""
BARS = {"ttft": 0.10, "tpot": 0.05, "latency": 0.05}
STATISTICS = ("mean", "p50", "p90", "p99")


class Times(NamedTuple):
    """Of one request: seconds to the first token, per further token (None: there is none), and in all."""

    ttft: float
    tpot: float | None
    latency: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    found = validate(given.data)
    write_json(given.out / "validation-llmservingsim.json", found)
    write_text(given.out / "validation-llmservingsim.md", page(found))
    print(page(found))


def validate(data: Path) -> dict[str, Any]:
    """Measured and simulated figures, for each host overhead."""
    folder = data / "RTXPRO6000" / "Llama-3.1-8B"
    lines = (folder / "vllm_run" / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    run = [json.loads(line) for line in lines]
    run.sort(key=lambda r: r["queued_ts"])
    meta = json.loads((folder / "vllm_run" / "meta.json").read_text(encoding="utf-8"))["engine_kwargs"]
    cluster = json.loads((folder / "vllm_run" / "cluster_config.json").read_text(encoding="utf-8"))
    memory = cluster["nodes"][0]["instances"][0]["npu_mem"]
    budget = int(memory["mem_size"] * 1e9 * memory["mem_util"])
    preset = open_device(PRESET_DEVICE).host(PRESET)
    measured = [measured_times(r) for r in run]
    cases = {"kernels alone": (0.0, 0.0), f"host preset {PRESET}": (preset.step_s, preset.row_s)}
    served = {name: simulate(folder, run, meta, budget, *host) for name, host in cases.items()}
    return {
        "requests": len(run),
        "budget_bytes": budget,
        "max_num_seqs": meta["max_num_seqs"],
        "max_num_batched_tokens": meta["max_num_batched_tokens"],
        "makespan_s": max(r["last_token_ts"] for r in run) - run[0]["queued_ts"],
        "measured": statistics(measured),
        "cases": {
            name: {
                "step_ms": 1e3 * cases[name][0],
                "simulated": statistics(s["times"]),
                "error": errors(statistics(s["times"]), statistics(measured)),
                "makespan_s": s["makespan_s"],
                "peak_kv_share": s["peak_kv_share"],
                "operators": s["operators"],
            }
            for name, s in served.items()
        },
    }


def measured_times(r: Mapping[str, Any]) -> Times:
    more = r["output_toks"] - 1
    first, last = r["first_token_ts"] - r["queued_ts"], r["last_token_ts"] - r["queued_ts"]
    return Times(first, (last - first) / more if more else None, last)


def simulate(
    folder: Path, run: Sequence[Mapping[str, Any]], meta: Mapping[str, Any], budget: int, step_s: float, row_s: float
) -> dict[str, Any]:
    """Serve the run's requests from the operator profile."""
    a = open_architecture(MODEL)
    kv_tokens = int((budget - a.weights_bytes(DTYPE)) / (a.layers * a.kv_bytes(DTYPE)))
    tables = read_llmservingsim(folder / "profile_tp1")
    fit = fit_operators(tables, step_s=step_s, row_s=row_s, kv_tokens=kv_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        out, trace = Path(scratch) / "profile", Path(scratch) / "trace.jsonl"
        profile = operator_profile(
            out, tables, fit, Wanted(a.name, a, 1, ()), device="RTX PRO 6000", memory_bytes=int(budget / 0.9),
            dtype=DTYPE, host=f"{1e3 * step_s:g} ms per step", link_bytes_per_s=LINK_BYTES_PER_S,
        )  # fmt: skip
        rows = [
            {"timestamp": 1e3 * (BEFORE_S + r["queued_ts"] - run[0]["queued_ts"]), "input_length": r["input_toks"],
             "output_length": r["output_toks"]}
            for r in run
        ]  # fmt: skip
        trace.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        scenario = Scenario.model_validate(
            {
                "name": "llmservingsim",
                "profile": str(out),
                "models": [a.name],
                "workload": {"trace": str(trace)},
                "memory": {"budget_bytes": budget},
                "batcher": {
                    "max_batch": meta["max_num_seqs"], "token_budget": meta["max_num_batched_tokens"], "watermark": 0,
                },
                "controller": {"kind": "vanilla", "model": a.name},
                "clock": "wall",
            }
        )  # fmt: skip
        results = run_simulated(scenario, profile)
    served = sorted(results.requests.to_pylist(), key=lambda r: r["request_id"])
    steps = results.steps.to_pylist()
    return {
        "times": [simulated_times(r) for r in served],
        "makespan_s": max(r["finish_s"] for r in served) - BEFORE_S,
        "peak_kv_share": max(s["kv_used_bytes"] / s["kv_total_bytes"] for s in steps if s["kv_total_bytes"]),
        "operators": fit.holdout.model_dump(),
    }


def simulated_times(r: Mapping[str, Any]) -> Times:
    more, first = r["output_tokens"] - 1, r["first_token_s"] - r["arrival_s"]
    return Times(first, (r["finish_s"] - r["first_token_s"]) / more if more else None, r["finish_s"] - r["arrival_s"])


def statistics(times: Sequence[Times]) -> dict[str, dict[str, float]]:
    found = {}
    for name in Times._fields:
        values = np.array([v for v in (getattr(t, name) for t in times) if v is not None])
        found[name] = {"mean": float(values.mean())}
        found[name] |= {s: float(np.percentile(values, int(s[1:]))) for s in STATISTICS[1:]}
    return found


def errors(simulated: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """(simulated - measured) / measured."""
    return {name: {s: simulated[name][s] / measured[name][s] - 1 for s in STATISTICS} for name in BARS}


def signed(value: float) -> str:
    return f"{100 * value:+.1f} %".replace("-", "−")


def page(found: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    lines = [
        "# Validation: an operator profile, and a real run served from it",
        "",
        "Made by `scripts/validate_llmservingsim.py` from data of LLMServingSim (CASYS, KAIST; MIT): operator times of",
        "vLLM 0.19 with Llama-3.1-8B (bf16) on one RTX PRO 6000, and a real vLLM run of",
        f"{found['requests']} ShareGPT requests at about 10 per second, which overloads it.",
        "All figures are in [validation-llmservingsim.json](validation-llmservingsim.json).",
        "Errors are (simulated − measured) / measured. Latency is from queueing to the last token.",
        "",
        "**Nothing is fitted to the run.** The operator tables make the profile (`heliosim profile import`);",
        "the run gives arrivals, lengths and engine arguments",
        f"({found['max_num_seqs']} rows, {found['max_num_batched_tokens']} tokens per step, chunked prefill).",
        "Tables of kernels hold no host time, so it is shown twice: as zero, and as the `graph` preset of the shipped",
        "devices, a choice made for all GPUs and not for this run.",
        "",
        "| | measured | "
        + " | ".join(f"{name}: {case['step_ms']:g} ms per step" for name, case in found["cases"].items())
        + " |",
        "| --- | --- |" + " --- |" * len(found["cases"]),
    ]
    for name, unit, factor in (("ttft", "s", 1.0), ("tpot", "ms", 1e3), ("latency", "s", 1.0)):
        for s in STATISTICS:
            cells = [
                f"{factor * case['simulated'][name][s]:.2f} ({signed(case['error'][name][s])})"
                for case in found["cases"].values()
            ]
            label = {"ttft": "TTFT", "tpot": "TPOT", "latency": "latency"}[name]
            lines.append(f"| {label}, {s}, {unit} | {factor * found['measured'][name][s]:.2f} | {' | '.join(cells)} |")
    spans = " | ".join(
        f"{case['makespan_s']:.1f} ({signed(case['makespan_s'] / found['makespan_s'] - 1)})"
        for case in found["cases"].values()
    )
    lines.append(f"| from first arrival to last token, s | {found['makespan_s']:.1f} | {spans} |")
    bars = ", ".join(f"{n.upper() if n != 'latency' else n} {100 * bar:g} %" for n, bar in BARS.items())
    for name, case in found["cases"].items():
        missed = [n for n, bar in BARS.items() if abs(case["error"][n]["mean"]) > bar]
        verdict = "missed by " + ", ".join(missed) if missed else "all met"
        lines += ["", f"Bars for means ({bars}), {name}: {verdict}."]
    case = next(iter(found["cases"].values()))
    holdout = HoldOut.model_validate(case["operators"])
    regions = ", ".join(f"{region} {100 * e:.1f} %" for region, e in holdout.by_region.items())
    lines += [
        "",
        "## What it rests on",
        "",
        "- **KV blocks**: the run's file records no block count (its KV shares are all 0). Weights and KV have",
        f"  {found['budget_bytes'] / 1e9:.1f} GB, memory times the share that the source's cluster file gives. At most",
        f"  {100 * case['peak_kv_share']:.0f} % of the KV blocks were used, so their number decides nothing here.",
        "- **Operators**: dense work and output head are curves through the table; attention has seven terms.",
        "  Time of a layer on attention points held out of the fit: median error",
        f"  {100 * holdout.median_abs_error:.1f} %, 90th percentile {100 * holdout.p90_abs_error:.1f} %; by region:",
        f"  {regions}. The table reaches far longer contexts than this workload.",
        "- **Mixed steps**: in the table decode attention beside a prompt chunk takes longer than alone (128 rows of",
        "  8,748 tokens three times as long); the term `layer_mixed_context` stands for that.",
        f"- **Start**: the model is loaded {BEFORE_S:g} s before the first arrival; in the run it was resident.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
