"""Inputs that several pages share. Units stand in the labels."""

from __future__ import annotations

from heliosim_app.question import GPUS, LOADS, MODELS, Question
from heliosim_app.state import Input, register

from heliosim.example_sets import MAX_BATCH, STEP_TOKENS

DEFAULT = Question()
NO_LIMIT = 0.0
"""A limit of 0 ms asks nothing."""

SHARED = (
    Input("models", "choice", "Models", DEFAULT.models, tuple(MODELS), names=MODELS),
    Input("device", "choice", "Device", DEFAULT.device, (*GPUS, "CPU")),
    Input("system", "choice", "System", DEFAULT.system, help="Who chooses model and depth."),
    Input("load", "choice", "Workload", DEFAULT.load, tuple(LOADS), names={k: v.label for k, v in LOADS.items()}),
    Input("rate", "number", "Rate (requests/s)", DEFAULT.rate_per_s, low=0.1, high=500, step=1.0, digits="%g"),
    Input("prompt", "whole", "Prompt, mean (tokens)", DEFAULT.prompt_tokens, low=4, high=900, step=20),
    Input("output", "whole", "Output, mean (tokens)", DEFAULT.output_tokens, low=4, high=900, step=20),
    Input("ttft", "number", "p99 TTFT ≤ (ms)", DEFAULT.ttft_ms, low=0, high=60_000, step=50.0, digits="%g"),
    Input("tpot", "number", "p99 TPOT ≤ (ms)", DEFAULT.tpot_ms, low=0, high=5_000, step=5.0, digits="%g"),
    Input("requests", "whole", "Requests per run", DEFAULT.requests, low=100, high=5_000, step=100),
    Input("seed", "whole", "Seed", DEFAULT.seed, low=0, high=2**31, step=1),
    Input("batch", "whole", "Batch cap (rows)", MAX_BATCH, low=1, high=256, step=8),
    Input("step_tokens", "whole", "Tokens per step", STEP_TOKENS, low=64, high=8192, step=64),
    Input("plan_devices", "several", "Devices to choose from", ["A100-80GB", "H100-80GB"], (*GPUS, "CPU")),
    Input("plan_systems", "several", "Systems to choose from", ["HELIOS offline", "early exit llama2-7b"]),
    Input("provider", "choice", "GPU prices of", "specialty-cloud", help="Edit them on Plan."),
    Input("prices", "text", "Edited prices", "", help="GPU:price:replicas, separated by commas"),
    Input("memory", "slider", "Memory for weights and KV (% of the device)", 90, low=30, high=95, step=5),
)


def register_all() -> None:
    """Make the shared inputs known; the same call again changes nothing."""
    register(*SHARED)
