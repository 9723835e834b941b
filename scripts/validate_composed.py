"""Hold composed profiles against published end-to-end measurements; write the page and its rows.

    python scripts/validate_composed.py DATA [--page docs/validation-composed.md] [--rows docs/validation-composed.json]

Every row says whether a host preset was fitted on it; only the others count in the errors. Signed errors: composed over
measured, minus one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import published
from fit_curves import digits, vidur_products
from published import Row, prompts_read, static_batch

from heliosim.formats.files import write_text
from heliosim.hardware.architecture import Architecture, open_architecture
from heliosim.hardware.compose import ComposedModel, compose_model
from heliosim.hardware.device import open_device
from heliosim.hardware.kernels import Kernels

HOSTS = {
    "FasterTransformer": "fastertransformer-cpp",
    "TensorRT-LLM": "trt-llm-0.6",
    "Splitwise": "vllm-2024",
    "DistServe, vllm": "vllm-2024",
    "DistServe, distserve": "distserve",
    "vLLM served": "graph",
    "optimum-benchmark": "eager",
}
TARGETS = {
    "FasterTransformer": 0.15,
    "DistServe, vllm": 0.15,
    "DistServe, distserve": 0.15,
    "TensorRT-LLM": 0.20,
    "Splitwise": 0.20,
}
OUTSIDE = ("beyond the window",)
"""Groups that are reported and left out of a set's total."""


class Checked(NamedTuple):
    """A published row with what was composed for it."""

    row: Row
    composed: float
    was_fitted: bool
    outside: str

    @property
    def error(self) -> float:
        return self.composed / self.row.measured - 1


@cache
def _model(architecture: Architecture, device: str, tp: int, host: str) -> ComposedModel:
    return compose_model(architecture, open_device(device), dtype="fp16", tp=tp, host=host)


def model_of(row: Row) -> ComposedModel:
    return _model(published.architecture_of(row), row.device, row.tp, HOSTS[row.source])


def check(row: Row) -> Checked:
    """Compose what a row measured, in its unit."""
    model, c = model_of(row), row.conditions
    batch, prompt = c["batch"], c.get("prompt", 0)
    tokens, context = batch * prompt, prompt + c.get("output", 128)
    if row.what == "latency":
        value = 1e3 * static_batch(model, batch, prompt, c["output"])
    elif row.what == "tpot":
        value, tokens = 1e3 * published.tpot(model, batch, prompt, c["output"]), max(batch, prompt)
    elif row.what == "throughput":
        value = batch * c["output"] / static_batch(model, batch, prompt, c["output"]) / row.tp
    elif row.what in ("first_token_latency", "prefill"):
        value = 1e3 * prompts_read(model, batch, prompt)
    elif row.what == "prompt":
        tokens = min(tokens, max(prompt, published.VLLM_2023_BATCHED_TOKENS))
        value = 1e3 * prompts_read(model, batch, prompt, published.VLLM_2023_BATCHED_TOKENS)
    else:
        context = c.get("context", prompt + 64)
        value = 1e3 * model.step_seconds(decode_rows=batch, context=context, allow_extrapolation=True)
        tokens = batch
    outside = model.out_of_range(rows=batch, context=context, tokens=tokens) or ""
    return Checked(row, value, was_fitted(row), outside)


def was_fitted(row: Row) -> bool:
    """Whether a host preset rests on this row."""
    c = row.conditions
    if row.source == "FasterTransformer":
        return (row.model, row.tp, c["batch"], c["prompt"], c["output"]) == published.FT_FITTED
    if row.source == "Splitwise":
        is_point = (row.tp, c["prompt"], c["batch"]) == published.SPLITWISE_FITTED
        return is_point and (row.device == "A100-80GB" or row.what == "token")
    if row.source.startswith("DistServe"):
        return row.tp == published.DISTSERVE_FITTED_TP and row.group == "decode"
    return row.source == "optimum-benchmark" and row.what == "decode" and c["batch"] == 1


# --- memory and operators -------------------------------------------------------------------------------------------


def memory_slopes(data: Path) -> list[dict[str, Any]]:
    """Bytes a request adds, measured (memory against batch) and composed (KV, activations, scores of attention)."""
    rows = [r for r in published.fastertransformer(data) if r.model == "gpt-6.7b"]
    found = []
    for prompt, output in sorted({(r.conditions["prompt"], r.conditions["output"]) for r in rows}):
        mine = [r for r in rows if r.conditions["prompt"] == prompt]
        batch, memory = ([r.conditions[k] for r in mine] for k in ("batch", "memory_gb"))
        measured = float(np.polyfit(batch, np.array(memory) * 2**30, 1)[0])
        model = model_of(mine[0])
        kv = (prompt + output) * model.layers * model.kv_bytes_per_token_layer
        scores = 2 * mine[0].conditions["heads"] * prompt**2
        composed = kv + prompt * model.activation_bytes_per_token + scores
        found.append(
            {
                "prompt": prompt,
                "output": output,
                "measured_bytes": digits(measured),
                "composed_bytes": composed,
                "kv_bytes": kv,
                "error": digits(composed / measured - 1, 3),
                "was_fitted": prompt == 128,
            }
        )
    return found


def kv_capacities(data: Path) -> list[dict[str, Any]]:
    """KV tokens that fit beside OPT-13B by ranks: usable bytes of a GPU from one rank, the rest from the shapes."""
    table = pd.read_csv(data / "distserve/max_num_tokens.csv")
    table = table[table.pp == 1].sort_values("tp")
    a = open_architecture("opt-13b")

    def per_token(tp: int) -> int:
        return a.layers * a.kv_bytes("fp16", tp)

    first = int(table.max_num_tokens.iloc[0])
    usable = a.weights_bytes("fp16") + first * per_token(1)
    found = []
    for row in table.itertuples():
        tp, measured = int(row.tp), int(row.max_num_tokens)
        composed = (usable - a.weights_bytes("fp16", tp=tp)) // per_token(tp)
        error = digits(composed / measured - 1, 3)
        row_of = {"tp": tp, "measured_tokens": measured, "composed_tokens": composed}
        found.append(row_of | {"error": error, "was_fitted": tp == 1})
    return found


def operators(data: Path) -> list[dict[str, Any]]:
    """A layer's four products in Vidur's profiles, which no GEMM curve was fitted to, beside those of the curves."""
    found = []
    for folder, device in (("a100", "A100-80GB"), ("h100", "H100-80GB")):
        kernels = Kernels(open_device(device), "bfloat16")
        table = vidur_products(data / "vidur/profiling/compute" / folder)
        table = table[(table.tokens <= 4096) & ((table.tokens <= 16) | (table.tokens % 64 == 0))]
        errors: dict[tuple[str, int, str], list[float]] = {}
        for r in table.itertuples():
            ours = sum(kernels.gemm(r.tokens, m.n, m.k) for m in open_architecture(r.model).matrices(int(r.tp)))
            region = "1-16" if r.tokens <= 16 else "17-512" if r.tokens <= 512 else "513-4096"
            errors.setdefault((r.model, int(r.tp), region), []).append(ours / r.seconds - 1)
        for (model, tp, region), values in errors.items():
            mape, signed = digits(np.mean(np.abs(values)), 3), digits(np.mean(values), 3)
            where = {"device": device, "model": model, "tp": tp, "tokens": region}
            found.append(where | {"points": len(values), "mape": mape, "mean_signed": signed})
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def summary(checked: Sequence[Checked]) -> dict[str, Any]:
    errors = np.array([c.error for c in checked])
    worst = max(checked, key=lambda c: abs(c.error))
    return {
        "rows": len(checked),
        "mape": digits(np.mean(np.abs(errors)), 3),
        "median_abs": digits(np.median(np.abs(errors)), 3),
        "mean_signed": digits(errors.mean(), 3),
        "worst": digits(worst.error, 3),
    }


def sets(checked: Sequence[Checked]) -> list[dict[str, Any]]:
    """Errors of tested rows by source, and by group within it."""
    found = []
    for source in HOSTS:
        mine = [c for c in checked if c.row.source == source]
        tested = [c for c in mine if not c.was_fitted]
        counted = [c for c in tested if c.row.group not in OUTSIDE]
        total = {"source": source, "group": "all", "host": HOSTS[source], "fitted": len(mine) - len(tested)}
        target = TARGETS.get(source)
        met = {} if target is None else {"target": target, "met": summary(counted)["mape"] <= target}
        found.append(total | summary(counted) | met)
        for group in dict.fromkeys(c.row.group for c in tested):
            part = [c for c in tested if c.row.group == group]
            name = f"{group} (not counted)" if group in OUTSIDE else group
            if len(part) < len(tested) or group in OUTSIDE:
                found.append({"source": source, "group": name, "host": HOSTS[source]} | summary(part))
    return found


def _percent(value: float) -> str:
    return f"{100 * value:+.0f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pivot(checked: Sequence[Checked], key: Callable[[Checked], str], name: str) -> str:
    """Signed errors with a column per batch; a star marks a fitted row, a dagger one outside the fitted range."""
    batches = sorted({c.row.conditions["batch"] for c in checked})
    lines: dict[str, dict[int, str]] = {}
    for c in checked:
        mark = ("*" if c.was_fitted else "") + ("†" if c.outside else "")
        lines.setdefault(key(c), {})[c.row.conditions["batch"]] = _percent(c.error).replace(" %", "") + mark
    rows = [[label, *(cells.get(b, "") for b in batches)] for label, cells in lines.items()]
    return _table([name, *(str(b) for b in batches)], rows)


def page(
    checked: Sequence[Checked],
    memory: Sequence[dict[str, Any]],
    capacities: Sequence[dict[str, Any]],
    products: Sequence[dict[str, Any]],
) -> str:
    rows = []
    for s in sets(checked):
        target = f"{100 * s['target']:.0f} %: {'met' if s['met'] else '**missed**'}" if "target" in s else ""
        rows.append([f"**{s['source']}**" if s["group"] == "all" else "", s["group"], f"`{s['host']}`",
                     str(s.get("fitted", "")), str(s["rows"]), f"{100 * s['mape']:.1f} %", _percent(s["mean_signed"]),
                     _percent(s["worst"]), target])  # fmt: skip
    head = ["source", "rows of", "host preset", "fitted", "tested", "MAPE", "mean signed", "worst", "target"]
    by = {source: [c for c in checked if c.row.source == source] for source in HOSTS}
    text = [HEAD, _table(head, rows), NOTES, "## Memory per request\n\n" + MEMORY]
    text.append(
        _table(
            ["GPT-6.7B", "measured MB", "composed MB", "of it KV", "error", ""],
            [[f"{m['prompt']} + {m['output']} tokens", f"{m['measured_bytes'] / 1e6:.0f}",
              f"{m['composed_bytes'] / 1e6:.0f}", f"{m['kv_bytes'] / 1e6:.0f}", _percent(m["error"]),
              "fitted" if m["was_fitted"] else "tested"] for m in memory],
        )
    )  # fmt: skip
    text.append(CAPACITY)
    text.append(
        _table(
            ["ranks", "published tokens", "composed tokens", "error", ""],
            [
                [str(c["tp"]), f"{c['measured_tokens']:,}", f"{c['composed_tokens']:,}", f"{100 * c['error']:+.1f} %",
                 "fitted" if c["was_fitted"] else "tested"]
                for c in capacities
            ],
        )
    )  # fmt: skip
    text.append(ROWS)
    for source in HOSTS:
        text.append(f"### {source}\n")
        for device in dict.fromkeys(c.row.device for c in by[source]):
            mine = [c for c in by[source] if c.row.device == device]
            text.append(f"{device}:\n\n" + _pivot(mine, _label, "signed error in %, by batch"))
    text.append(OPERATORS_TEXT)
    text.append(
        _table(
            ["device", "model", "ranks", "tokens", "points", "MAPE", "mean signed"],
            [[p["device"], p["model"], str(p["tp"]), p["tokens"], str(p["points"]), f"{100 * p['mape']:.1f} %",
              _percent(p["mean_signed"])] for p in products],
        )
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(text)) + "\n"


def _label(c: Checked) -> str:
    k = c.row.conditions
    size = f"{k['prompt']} + {k['output']}" if "output" in k else f"prompt {k['prompt']}" if "prompt" in k else ""
    size = f"decode, context {k['context']}" if c.row.what == "decode" else size
    what = "" if c.row.what in ("latency", "decode", "prefill") else f", {c.row.what.replace('_', ' ')}"
    size = size.removeprefix("prompt ") + " prompt tokens" if size.startswith("prompt ") else size
    return f"{c.row.model}, {c.row.tp} rank{'s' * (c.row.tp > 1)}, {size}{what}"


HEAD = """# Composed profiles against published measurements

Made by `scripts/validate_composed.py` from the data folder; do not edit. Signed error: composed over measured, minus
one. What composed profiles are: [hardware.md](hardware.md). All rows, with every figure:
[validation-composed.json](validation-composed.json).

Kernels (products, attention, element-wise, all-reduce) come from tables that hold **no** end-to-end run: none of the
measurements below was used for them. Host presets rest on the few rows marked fitted; the errors count the others."""
NOTES = """## Splits, units, misses

*FasterTransformer*: one row (20B, 8 ranks, batch 1, 20 + 8 tokens) gives what ranks wait for each other (`sync_s`),
which every preset without CUDA graphs shares; no host time. *TensorRT-LLM*: nothing fitted. *Splitwise*: launches per
layer and the cost of a starting request from 8 ranks, batch 1, prompt 512 on A100; on H100 the same times one ratio
of the same row's token time. *DistServe*: host time per step and row of each engine from its decode steps on one
rank; all prefill and all of 2 and 4 ranks are tested. *vLLM served* (Qwen3-32B on H100, current vLLM with CUDA
graphs): nothing fitted; `graph` is a choice. *optimum-benchmark*: launches per layer from the decode step at batch 1.
Presets of 2023 and early 2024 use products stretched by Vidur's operator profiles (`gemm_2023`), which hold no
end-to-end run.

Units. TensorRT-LLM's A100 throughputs are read as tokens/s **per GPU**: the page they come from says so in the header
of its H100 table and not in that of A100. Read per group of ranks, composed rates would be 1.9 (7B on 2 ranks) and
3.8 to 5 times (70B on 4) the published ones, while the rows of one rank, where both readings are the same, and all
first-token latencies agree. DistServe's rows are points of the linear fits it publishes, not single measurements;
fits of small and large batches differ by up to a third where they meet, which shows in the rows of 96 and more.

What is off, and why:

- *Splitwise, several prompts at once*: measured times grow faster than the number of prompts (A100, 4 ranks, 512
  tokens: 127 ms for 1 prompt, 571 ms for 4, 10.9 s for 64, where 64 separate prompts would take 8.1 s). Steps of
  2,560 prompt tokens, vLLM's default then, do not explain it; nothing in the data says what else ran, so nothing is
  fitted to it.
- *Splitwise, tokens at batch 64*: measured 72 ms against 52 ms at batch 32 on both 4 and 8 ranks, so not kernels.
- *Splitwise, H100 prompts of 128 to 256 tokens on 8 ranks*: 52 to 58 ms whatever the length, twice a decode step:
  host work per prompt that one constant fitted on A100 (and scaled) does not hold.
- *DistServe, vLLM prefill*: 1.3 to 1.4 times as long per token as in DistServe's own engine at 1, 2 and 4 ranks (same
  GPU, same model), so it shrinks with the ranks and is no host time; composed times agree with the faster engine.
- *TensorRT-LLM, 70B, 240 x (128 + 2048)*: composed decode attention reads KV once per KV head; the measured rate
  would need 2 to 3 times the KV traffic, as a kernel that reads it per query head has it.
- *FasterTransformer 6.7B*: prompts at large batch take longer than its 20B model's products would have it (composed
  20B is within 7 % on one rank), so the 6.7B rows are low throughout.
- *optimum-benchmark prefill*: eager transformers computes logits of every prompt token and norms in float32 by
  several kernels; the `eager` preset holds launches, unfused attention and copied KV only. Its decode steps are what
  it is for."""
MEMORY = """What one more request adds to FasterTransformer's memory (GB of the source read as GiB). KV follows from the
shapes. What its buffers hold per prompt token (`activation_widths`) is fitted to the requests of 128 + 8 tokens and
tested on those of 512 + 32 (target: 10 %). Read as GB of 1e9 bytes, the tested error is the same within 1 %."""
CAPACITY = """KV tokens that DistServe finds room for beside OPT-13B, over the whole instance (A100-80GB, FP16, one
pipeline stage). The bytes a GPU has for weights and KV are taken from one rank; weights and KV of the other degrees
follow from the shapes."""
ROWS = """## Every row

`*` a host preset was fitted on it (not counted); `†` outside the composed profile's fitted range (512 rows, 8,192
tokens in a step, the model's context window), so extrapolated. Rows are counted whether or not they are extrapolated,
but for prompts whose answer leaves Llama-2's window of 4,096 tokens, which the model was not made for."""
OPERATORS_TEXT = """## Products of a layer against Vidur's profiles

The four matrix products of a layer, summed, in Vidur's operator profiles (another library, other boards); no
GEMM curve was fitted to them. Vidur rounds to 1 microsecond."""


def _json(found: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each row, for diffs that can be read."""
    parts = []
    for name, rows in found.items():
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/validation-composed.md"))
    parser.add_argument("--rows", type=Path, default=Path("docs/validation-composed.json"))
    given = parser.parse_args()
    rows = published.fastertransformer(given.data) + published.tensorrt(given.data) + published.splitwise(given.data)
    rows += published.served(given.data)
    for engine in ("vllm", "distserve"):
        rows += published.distserve(given.data, engine)
    checked = [check(row) for row in rows + published.optimum(given.data)]
    memory, products = memory_slopes(given.data), operators(given.data)
    capacities = kv_capacities(given.data)
    found = {
        "sets": sets(checked),
        "memory_per_request": memory,
        "kv_capacity": capacities,
        "products_against_vidur": products,
        "rows": [
            {
                **{k: v for k, v in c.row._asdict().items() if k != "conditions"},
                **{k: v for k, v in c.row.conditions.items() if v == v},
                "measured": digits(c.row.measured, 5),
                "composed": digits(c.composed, 5),
                "error": digits(c.error, 3),
                "was_fitted": c.was_fitted,
                "outside": c.outside,
            }
            for c in checked
        ],
    }
    write_text(given.rows, _json(found))
    write_text(given.page, page(checked, memory, capacities, products))
    for s in found["sets"]:
        errors = f"MAPE {s['mape']:6.1%}  signed {s['mean_signed']:+6.1%}  worst {s['worst']:+.0%}"
        print(f"{s['source']:22} {s['group']:34} n {s['rows']:4}  {errors}")


if __name__ == "__main__":
    main()
