"""Hold composed profiles against published end-to-end measurements; write the page and its rows.

    python scripts/validate_composed.py DATA [--page docs/validation-composed.md] [--rows docs/validation-composed.json]

Every row says whether a host preset was fitted on it; only the others count in the errors. Signed errors: composed over
measured, minus one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import published
from fit_curves import digits, vidur_products
from published import Row, prompts_read, static_batch

from heliosim.formats.files import write_json, write_text
from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.compose import ComposedModel, compose_model
from heliosim.hardware.device import open_device
from heliosim.hardware.kernels import Kernels

HOSTS = {
    "FasterTransformer": "fastertransformer-cpp",
    "TensorRT-LLM": "trt-llm-0.6",
    "Splitwise": "vllm-2024",
    "DistServe, vllm": "vllm-2024",
    "DistServe, distserve": "distserve",
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
def _model(source: str, device: str, model: str, tp: int, heads: int, layers: int) -> ComposedModel:
    a = published.gpt(heads, layers) if heads else open_architecture(model)
    return compose_model(a, open_device(device), dtype="fp16", tp=tp, host=HOSTS[source])


def model_of(row: Row) -> ComposedModel:
    c = row.conditions
    return _model(row.source, row.device, row.model, row.tp, c.get("heads", 0), c.get("layers", 0))


def check(row: Row) -> Checked:
    """Compose what a row measured, in its unit."""
    model, c = model_of(row), row.conditions
    batch, prompt = c["batch"], c.get("prompt", 0)
    tokens, context = batch * prompt, prompt + c.get("output", 128)
    if row.what == "latency":
        value = 1e3 * static_batch(model, batch, prompt, c["output"])
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


def page(checked: Sequence[Checked], memory: Sequence[dict[str, Any]], products: Sequence[dict[str, Any]]) -> str:
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
    return "\n\n".join(text) + "\n"


def _label(c: Checked) -> str:
    k = c.row.conditions
    size = f"{k['prompt']} + {k['output']}" if "output" in k else f"prompt {k['prompt']}" if "prompt" in k else ""
    size = f"context {k['context']}" if c.row.what == "decode" else size
    what = "" if c.row.what in ("latency", "decode", "prefill") else f" {c.row.what.replace('_', ' ')}"
    return f"{c.row.model}, {c.row.tp} ranks, {size}{what}"


HEAD = """# Composed profiles against published measurements

Made by `scripts/validate_composed.py` from the data folder; do not edit. Signed error: composed over measured, minus
one. What composed profiles are: [hardware.md](hardware.md). All rows, with every figure:
[validation-composed.json](validation-composed.json).

Kernels (products, attention, element-wise, all-reduce) come from tables that hold **no** end-to-end run: none of the
measurements below was used for them. Host presets rest on the few rows marked fitted; the errors count the others."""
NOTES = """{notes}"""
MEMORY = """What one more request adds to FasterTransformer's memory (GB of the source read as GiB). KV follows from the
shapes. What its buffers hold per prompt token (`activation_widths`) is fitted to the requests of 128 + 8 tokens and
tested on those of 512 + 32; the target is 10 %."""
ROWS = """## Every row

`*` a host preset was fitted on it (not counted); `†` outside the composed profile's fitted range (512 rows, 8,192
tokens in a step, the model's context window), so extrapolated. Rows are counted whether or not they are extrapolated,
but for prompts whose answer leaves Llama-2's window of 4,096 tokens, which the model was not made for."""
OPERATORS_TEXT = """## Products of a layer against Vidur's profiles

The four matrix products of a layer, summed, in Vidur's operator profiles (another library, other boards); no
GEMM curve was fitted to them. Vidur rounds to 1 microsecond."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/validation-composed.md"))
    parser.add_argument("--rows", type=Path, default=Path("docs/validation-composed.json"))
    given = parser.parse_args()
    rows = published.fastertransformer(given.data) + published.tensorrt(given.data) + published.splitwise(given.data)
    for engine in ("vllm", "distserve"):
        rows += published.distserve(given.data, engine)
    checked = [check(row) for row in rows + published.optimum(given.data)]
    memory, products = memory_slopes(given.data), operators(given.data)
    found = {
        "sets": sets(checked),
        "memory_per_request": memory,
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
    write_json(given.rows, found)
    write_text(given.page, page(checked, memory, products))
    for s in found["sets"]:
        errors = f"MAPE {s['mape']:6.1%}  signed {s['mean_signed']:+6.1%}  worst {s['worst']:+.0%}"
        print(f"{s['source']:22} {s['group']:34} n {s['rows']:4}  {errors}")


if __name__ == "__main__":
    main()
