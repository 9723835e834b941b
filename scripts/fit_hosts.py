"""Host presets: what engines of an era add to the kernels, from a few named rows each. Used by ``fit_devices.py``.

``graph`` and ``compiled`` are choices, said so. The others are fitted to the rows named in their origin, which
``validate_composed.py`` keeps out of what it tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import published
from fit_curves import SPLITWISE, digits, origin
from scipy.optimize import nnls

from heliosim.hardware.architecture import Architecture, open_architecture
from heliosim.hardware.device import Device, Host, Origin
from heliosim.hardware.kernels import Kernels
from heliosim.hardware.steps import StepTimes

FASTERTRANSFORMER = (
    "https://github.com/NVIDIA/FasterTransformer/blob/07fdd2fc6aa46f961f304d5f3791efad016e38a3/docs/gpt_guide.md"
)
DISTSERVE = "https://github.com/LLMServe/DistServe/tree/82831f1604cc6b10bebd360f6c437a07790dde9f"
OPTIMUM = "https://github.com/huggingface/optimum-benchmark/tree/f75d9f93bb14ed56058f4c70ae4670b6cf3a8ed1"
GRAPH_STEP_S = 1e-3
COMPILED_KERNELS, COMPILED_LAUNCH_S = 12, 6e-6


def placeholders() -> dict[str, Any]:
    """Presets before anything is fitted, so that a device can be read and its kernels be used."""
    nothing = origin("not fitted yet", "none", "none")
    names = ("graph", "compiled", "eager")
    return {n: {"origin": nothing, "step_s": 0.0, "layer_s": 0.0, "all_reduce": "custom"} for n in names}


def hosts(data: Path, a100: Device, h100: Device, name: str) -> dict[str, Any]:
    """The presets of device ``name``: A100's, with the Python ones scaled to H100's faster hosts where it is one."""
    made = _fitted(data, a100)
    if name == "A100-40GB":
        for preset in set(made) - {"graph", "compiled"}:
            made[preset]["origin"]["derivation"] = "A100-80GB's"
    if name.startswith("A100"):
        return made
    slow, fast = (_splitwise(data, gpu, "token") for gpu in ("A100-80GB", "H100-80GB"))
    for preset in ("vllm-2024", "eager", "distserve"):
        for term in ("step_s", "layer_s", "row_s", "prompt_s"):
            if term in made[preset]:
                made[preset][term] = digits(made[preset][term] * fast / slow, 3)
        made[preset]["origin"]["derivation"] = (
            f"A100's times {fast / slow:.2f}: H100's over A100's token in Splitwise, 8 ranks, batch 1, prompt 512"
        )
    for preset in ("fastertransformer-cpp", "trt-llm-0.6"):
        made[preset]["origin"]["derivation"] = "A100's"
    return made


def _fitted(data: Path, device: Device) -> dict[str, Any]:
    sync = _sync(data, device)
    cpp = {"all_reduce": "nccl", "step_s": 0.0, "layer_s": 0.0, "sync_s": sync, "has_older_gemm": True}
    model, tp, batch, prompt, output = published.FT_FITTED
    row = f"FasterTransformer {model}, {tp} ranks, batch {batch}, {prompt} + {output} tokens"
    waits = origin(f"ranks' waiting: {row}; no host time", "Apache-2.0", "1-8 ranks", url=FASTERTRANSFORMER, points=1)
    widths = _activation_widths(data)
    held = dict(waits, source=waits["source"] + "; buffers: GPT-6.7B's memory by batch at 128 + 8 tokens")
    return {
        "graph": {
            "origin": origin("a choice: scheduling, sampling, one launch", "none", "any", derivation="not fitted"),
            "all_reduce": "custom",
            "step_s": GRAPH_STEP_S,
            "layer_s": 0.0,
        },
        "compiled": {
            "origin": origin(
                f"a choice: {COMPILED_KERNELS} launches of {1e6 * COMPILED_LAUNCH_S:g} us a layer, no graphs",
                "none",
                "any",
                derivation="not fitted",
            ),
            "all_reduce": "nccl",
            "step_s": GRAPH_STEP_S,
            "layer_s": COMPILED_KERNELS * COMPILED_LAUNCH_S,
        },
        "eager": _eager(data, device),
        "vllm-2024": _vllm(data, device, sync),
        "distserve": _distserve(data, device, sync),
        "fastertransformer-cpp": cpp | {"origin": held, "is_fused": False, "activation_widths": widths},
        "trt-llm-0.6": cpp | {"origin": waits},
    }


def _times(device: Device, model: Architecture, tp: int, **host: Any) -> StepTimes:
    values = {"all_reduce": "nccl", "step_s": 0.0, "layer_s": 0.0, "has_older_gemm": True, **host}
    blank = Host(origin=Origin(source="", licence="", fitted_range=""), **values)
    return StepTimes(model, device, "float16", tp, blank, Kernels(device, "float16"))


def _sync(data: Path, device: Device) -> float:
    """What the fitted row takes beyond its kernels, for each all-reduce and doubling of the ranks."""
    model, tp, batch, prompt, output = published.FT_FITTED
    for row in published.fastertransformer(data):
        c = row.conditions
        if (row.model, row.tp, c["batch"], c["prompt"], c["output"]) == (model, tp, batch, prompt, output):
            break
    a = published.architecture_of(row)
    times = _times(device, a, tp, is_fused=False)
    kernels = times.prefill_step(batch, prompt)
    kernels += (output - 1) * times.decode_step(batch, prompt + output / 2)
    all_reduces = output * (2 * a.layers + 1)
    return digits((1e-3 * row.measured - kernels) / all_reduces / np.log2(tp), 3)


def _activation_widths(data: Path) -> float:
    """Memory per request beside KV and scores, over tokens and hidden bytes: FasterTransformer's rows of 128 + 8."""
    rows = [r for r in published.fastertransformer(data) if r.model == "gpt-6.7b" and r.conditions["prompt"] == 128]
    a = published.architecture_of(rows[0])
    slope = np.polyfit([r.conditions["batch"] for r in rows], [2**30 * r.conditions["memory_gb"] for r in rows], 1)[0]
    scores = 2 * a.heads * 128**2
    rest = slope - (128 + 8) * a.layers * a.kv_bytes("fp16") - scores
    return digits(rest / 128 / a.hidden_bytes("fp16"), 3)


def _splitwise(data: Path, device: str, what: str) -> float:
    for row in published.splitwise(data):
        key = (row.tp, row.conditions["prompt"], row.conditions["batch"])
        if (row.device, row.what) == (device, what) and key == published.SPLITWISE_FITTED:
            return 1e-3 * row.measured
    raise LookupError(f"no such Splitwise row: {device}, {what}")


def _distserve_decode(data: Path, device: Device, engine: str) -> tuple[float, float]:
    """Seconds per step and row beyond the kernels: relative least squares over one rank's decode steps."""
    found = [r for r in published.distserve(data, engine) if r.group == "decode"]
    rows = [r for r in found if r.tp == published.DISTSERVE_FITTED_TP]
    times = _times(device, open_architecture("opt-13b"), published.DISTSERVE_FITTED_TP)
    y = np.array([1e-3 * r.measured for r in rows])
    rest = y - [times.decode_step(r.conditions["batch"], r.conditions["context"]) for r in rows]
    x = np.array([[1.0, r.conditions["batch"]] for r in rows])
    step, row = nnls(x / y[:, None], np.maximum(rest, 0) / y)[0]
    return float(step), float(row)


def _distserve(data: Path, device: Device, sync: float) -> dict[str, Any]:
    step, row = _distserve_decode(data, device, "distserve")
    return {
        "origin": origin(
            "DistServe's engine, OPT-13B on one A100-80GB: decode steps; ranks' waiting from FasterTransformer",
            "Apache-2.0",
            "OPT-13B, 1 rank, batch 1-192",
            url=DISTSERVE,
            points=len([r for r in published.distserve(data, "distserve") if r.group == "decode" and r.tp == 1]),
        ),
        "all_reduce": "nccl",
        "step_s": digits(step, 3),
        "layer_s": 0.0,
        "row_s": digits(row, 3),
        "sync_s": sync,
        "has_older_gemm": True,
    }


def _vllm(data: Path, device: Device, sync: float) -> dict[str, Any]:
    step, row = _distserve_decode(data, device, "vllm")
    a = open_architecture("llama2-70b")
    tp, prompt, batch = published.SPLITWISE_FITTED
    times = _times(device, a, tp, step_s=step, row_s=row, sync_s=sync)
    layer = (_splitwise(data, device.name, "token") - step - row * batch - times.head(batch)) / a.layers
    launched = _times(device, a, tp, step_s=step, row_s=row, sync_s=sync, layer_s=layer)
    start = _splitwise(data, device.name, "prompt") - launched.prefill_step(batch, prompt)
    return {
        "origin": origin(
            "steps and rows: DistServe's vLLM, OPT-13B decode on one A100-80GB; launches per layer and a starting "
            "request: Splitwise, Llama-2-70B, 8 ranks, batch 1, prompt 512; ranks' waiting from FasterTransformer",
            "Apache-2.0, MIT",
            "vLLM of 2023 to early 2024: eager, Python host",
            url=f"{DISTSERVE} {SPLITWISE}",
            points=2 + len([r for r in published.distserve(data, "vllm") if r.group == "decode" and r.tp == 1]),
        ),
        "all_reduce": "nccl",
        "step_s": digits(step, 3),
        "layer_s": digits(layer, 3),
        "row_s": digits(row, 3),
        "prompt_s": digits(max(0.0, start), 3),
        "sync_s": sync,
        "has_older_gemm": True,
    }


def _eager(data: Path, device: Device) -> dict[str, Any]:
    one = next(r for r in published.optimum(data) if r.group == "decode" and r.conditions["batch"] == 1)
    a = open_architecture("llama2-7b")
    layer = (1e-3 * one.measured - _times(device, a, 1).head(1)) / a.layers
    return {
        "origin": origin(
            "optimum-benchmark, eager PyTorch Llama-2-7B on A100: the decode step at batch 1 over its layers",
            "Apache-2.0",
            "batch 1",
            url=OPTIMUM,
            points=1,
        ),
        "all_reduce": "nccl",
        "step_s": 0.0,
        "layer_s": digits(layer, 3),
        "is_fused": False,
        "copies_kv": True,
        "has_older_gemm": True,
    }
