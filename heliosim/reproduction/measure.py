"""What a reproduction keeps of a run: flat figures by name, so that they can be cached and paired."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa

from heliosim.formats.results import RunResults
from heliosim.metrics import Slo, summarise

KEPT = (
    "token_weighted_tpot_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_ttft_ms", "p99_ttft_ms", "p99_e2el_ms",
    "output_throughput", "request_throughput", "perplexity", "agreement", "low_confidence_share", "transitions",
    "load_s", "exposed_load_s", "wh_per_prompt", "wh_per_prompt_with_idle", "energy_j", "load_energy_j",
    "probe_energy_j", "completed", "duration", "probe_request_share", "mean_batch_size", "mean_exit_layer",
    "slo_attainment",
    "request_goodput", "mean_queue_ms",
)  # fmt: skip


def measure(results: RunResults, slo: Slo | None = None) -> dict[str, float]:
    """Summary figures, tokens by exit (``exit:MODEL@E``) and by placement (``state:MODEL@D``), reactions, digests of
    the tables (``table:NAME``).
    """
    summary = summarise(results, slo=slo)
    found = {name: float(v) for name in KEPT if (v := summary.value(name)) is not None}
    for model, mix in summary.exit_mix.items():
        found |= {f"exit:{model}@{layer}": share for layer, share in mix.items()}
    found |= _states(results)
    found |= _requests(results)
    found |= _events(results)
    found |= _evaluations(results, found["evaluations"])
    return found | _digests(results)


def _states(results: RunResults) -> dict[str, float]:
    """Share of tokens by the placement they were served under, probes included."""
    steps = results.steps
    names = np.asarray(
        [f"{m}@{d}" for m, d in zip(steps["model"].to_pylist(), steps["depth"].to_pylist(), strict=True)]
    )
    tokens = steps["tokens_out"].to_numpy()
    total = max(1, int(tokens.sum()))
    return {f"state:{name}": float(tokens[names == name].sum()) / total for name in sorted(set(names.tolist()))}


def _requests(results: RunResults) -> dict[str, float]:
    """Mean over requests of each one's decode rate, and share of requests served by a partial placement throughout."""
    table = results.requests
    first, finish = table["first_token_s"].to_numpy(), table["finish_s"].to_numpy()
    output = table["output_tokens"].to_numpy()
    many = (output > 1) & (finish > first)
    rates = (output[many] - 1) / (finish[many] - first[many])
    return {"per_request_tok_per_s": float(rates.mean()) if len(rates) else 0.0}


def _events(results: RunResults) -> dict[str, float]:
    """How often the controller evaluated and reacted."""
    kinds = results.events["kind"].to_pylist()
    details = results.events["detail"].to_pylist()
    reactions = [json.loads(d)["reaction"] for k, d in zip(kinds, details, strict=True) if k == "breach"]
    chosen = [json.loads(d)["placement"] for k, d in zip(kinds, details, strict=True) if k == "choose"]
    return {
        "evaluations": float(kinds.count("choose")),
        "reactions": float(len(reactions)),
        "reaction:load": float(reactions.count("load")),
        "reaction:switch": float(reactions.count("switch")),
    } | {f"chosen:{name}": chosen.count(name) / len(chosen) for name in set(chosen)}


def _evaluations(results: RunResults, count: float) -> dict[str, float]:
    """Seconds per evaluation: of the loads it asked for but the server's first, and of the steps of its probes."""
    if not count:
        return {}
    steps = results.steps
    seconds = steps["seconds"].to_numpy()
    is_load = np.asarray(steps["kind"].to_pylist()) == "load"
    for_evaluation = is_load & (np.asarray(steps["reason"].to_pylist()) == "evaluate")
    for_evaluation[np.flatnonzero(is_load)[:1]] = False
    is_probe = np.asarray(steps["is_probe"].to_pylist(), dtype=bool) & ~is_load
    return {
        "evaluation_load_s": float(seconds[for_evaluation].sum()) / count,
        "probe_s": float(seconds[is_probe].sum()) / count,
    }


def _digests(results: RunResults) -> dict[str, float]:
    """Whole tables as numbers: equal if and only if (but for a chance of 2^-52) the tables are, byte for byte."""
    tables = {
        "requests": results.requests,
        "tokens": results.tokens,
        "steps but reason": results.steps.drop_columns(["reason"]),
    }
    return {f"table:{name}": _digest(table) for name, table in tables.items()}


def _digest(table: pa.Table) -> float:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return float(int.from_bytes(hashlib.blake2b(sink.getvalue(), digest_size=8).digest(), "little") >> 12)
